//! Which layers become MLA.

use std::str::FromStr;

use serde::Serialize;

/// Largest layer index that a list may name: far above any model.
const MOST_LAYERS: usize = 1 << 16;

/// Which layers become MLA; the others keep the source's attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MlaLayers {
    /// These, as ranges with both ends.
    List(Vec<(usize, usize)>),
    /// That many, those that conversion changes least.
    Auto(LayerCount),
}

/// How many layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerCount {
    /// A number.
    Count(usize),
    /// Percent of the model's layers, in `(0, 100]`, rounded to the nearest, one at least.
    Percent(f64),
}

impl LayerCount {
    /// Of a model with `layers`.
    pub fn of(self, layers: usize) -> usize {
        match self {
            LayerCount::Count(n) => n,
            LayerCount::Percent(p) => ((layers as f64 * p / 100.0).round() as usize).max(1),
        }
    }
}

impl FromStr for MlaLayers {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = |part: &str| {
            format!(
                "`{part}` in `{s}`: expected layers like `0,3-7`, or `auto`, `auto:12`, `auto:50%` to have them chosen"
            )
        };
        if let Some(rest) = s.strip_prefix("auto") {
            let count = match (rest, rest.strip_prefix(':').map(|r| (r, r.strip_suffix('%')))) {
                ("", _) => Some(LayerCount::Percent(50.0)),
                (_, Some((_, Some(p)))) => p.parse().ok().filter(|p| *p > 0.0 && *p <= 100.0).map(LayerCount::Percent),
                (_, Some((n, None))) => n.parse().ok().filter(|n| (1..=MOST_LAYERS).contains(n)).map(LayerCount::Count),
                _ => None,
            };
            return count.map(MlaLayers::Auto).ok_or_else(|| bad(s));
        }
        let index = |text: &str| text.trim().parse().ok().filter(|n| *n < MOST_LAYERS);
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            index(first).zip(index(last)).filter(|(a, b)| a <= b).ok_or_else(|| bad(part))
        };
        s.split(',').map(range).collect::<Result<_, _>>().map(MlaLayers::List)
    }
}

impl std::fmt::Display for MlaLayers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MlaLayers::Auto(LayerCount::Count(n)) => write!(f, "auto:{n}"),
            MlaLayers::Auto(LayerCount::Percent(p)) => write!(f, "auto:{p}%"),
            MlaLayers::List(ranges) => {
                let one = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
                f.write_str(&ranges.iter().map(one).collect::<Vec<_>>().join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_layers_are_read_and_written() {
        let read = |s: &str| s.parse::<MlaLayers>();
        assert_eq!(read("0,3-7"), Ok(MlaLayers::List(vec![(0, 0), (3, 7)])));
        assert_eq!(read("auto"), Ok(MlaLayers::Auto(LayerCount::Percent(50.0))));
        assert_eq!(read("auto:12"), Ok(MlaLayers::Auto(LayerCount::Count(12))));
        assert_eq!(read("auto:25%"), Ok(MlaLayers::Auto(LayerCount::Percent(25.0))));
        for s in ["0,3-7", "auto:12", "auto:25%", "5"] {
            assert_eq!(read(s).map(|l| l.to_string()), Ok(s.to_owned()));
        }
        for bad in ["", "7-3", "a", "1,", "-1", "auto:", "auto:0", "auto:101%", "auto12", "1-99999999999", "1--2"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}

//! Square matrices of shares as SVG: one cell per pair, a scale beside it. Same values, same bytes.

use std::fmt::Write as _;

use super::svg::{begin, escape};

/// A square matrix of values from 0 to 1, drawn as colours.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    /// Heading.
    pub title: String,
    /// What rows and columns are, such as `layer`.
    pub axis: String,
    /// What colours are.
    pub scale: String,
    /// `[n][n]`, row 0 at the top; what is not finite stays white.
    pub values: Vec<Vec<f64>>,
}

const SIDE: f64 = 480.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 56.0;
const SCALE_AT: f64 = LEFT + SIDE + 28.0;
const SCALE_WIDTH: f64 = 18.0;
const SCALE_STEPS: usize = 48;
const WIDTH: f64 = SCALE_AT + SCALE_WIDTH + 72.0;
const HEIGHT: f64 = TOP + SIDE + BOTTOM;
/// Labels along an axis, at most.
const LABELS: usize = 16;
/// From pale to dark, of even steps in lightness, so that order survives grey print and colour vision deficiencies.
const COLOURS: [[f64; 3]; 5] =
    [[247.0, 251.0, 255.0], [189.0, 215.0, 231.0], [107.0, 174.0, 214.0], [33.0, 113.0, 181.0], [8.0, 48.0, 107.0]];

/// The colour of a share.
fn colour(value: f64) -> String {
    let at = value.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f64;
    let low = (at as usize).min(COLOURS.len() - 2);
    let part = at - low as f64;
    let mix = |c: usize| (COLOURS[low][c] * (1.0 - part) + COLOURS[low + 1][c] * part).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

impl HeatMap {
    /// The matrix as an SVG document.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.draw(&mut out);
        out
    }

    fn draw(&self, out: &mut String) -> std::fmt::Result {
        begin(out, (WIDTH, HEIGHT), LEFT, &self.title)?;
        let n = self.values.len().max(1);
        let cell = SIDE / n as f64;
        for (i, row) in self.values.iter().enumerate() {
            for (j, value) in row.iter().take(n).enumerate().filter(|(_, v)| v.is_finite()) {
                let (x, y) = (LEFT + j as f64 * cell, TOP + i as f64 * cell);
                writeln!(
                    out,
                    "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{cell:.2}\" height=\"{cell:.2}\" fill=\"{}\">\
                     <title>{i}, {j}: {value:.3}</title></rect>",
                    colour(*value)
                )?;
            }
        }
        self.draw_labels(out, n, cell)?;
        self.draw_scale(out)?;
        writeln!(out, "</svg>")
    }

    fn draw_labels(&self, out: &mut String, n: usize, cell: f64) -> std::fmt::Result {
        for i in (0..n).step_by(n.div_ceil(LABELS)) {
            let at = (i as f64 + 0.5) * cell;
            writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{i}</text>", LEFT - 8.0, TOP + at + 4.0)?;
            writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{i}</text>",
                LEFT + at,
                TOP + SIDE + 18.0
            )?;
        }
        let (axis, middle) = (escape(&self.axis), TOP + SIDE / 2.0);
        writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{axis}</text>",
            LEFT + SIDE / 2.0,
            TOP + SIDE + 40.0
        )?;
        writeln!(
            out,
            "<text x=\"20\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 20 {middle:.1})\">{axis}</text>"
        )
    }

    fn draw_scale(&self, out: &mut String) -> std::fmt::Result {
        let step = SIDE / SCALE_STEPS as f64;
        for i in 0..SCALE_STEPS {
            let value = 1.0 - (i as f64 + 0.5) / SCALE_STEPS as f64;
            writeln!(
                out,
                "<path d=\"M{SCALE_AT:.2} {:.2}h{SCALE_WIDTH:.2}v{step:.2}h-{SCALE_WIDTH:.2}z\" fill=\"{}\"/>",
                TOP + i as f64 * step,
                colour(value)
            )?;
        }
        for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
            writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\">{share}</text>",
                SCALE_AT + SCALE_WIDTH + 6.0,
                TOP + (1.0 - share) * SIDE + 4.0
            )?;
        }
        let (x, y) = (WIDTH - 14.0, TOP + SIDE / 2.0);
        writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {x:.1} {y:.1})\">{}</text>",
            escape(&self.scale)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_cell_is_drawn_inside_the_square_darker_where_larger() {
        let map = HeatMap {
            title: "a < b".into(),
            axis: "layer".into(),
            scale: "share".into(),
            values: vec![vec![1.0, 0.25], vec![f64::NAN, 0.0]],
        };
        let svg = map.render();
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
        assert_eq!(svg.matches("</title></rect>").count(), 3);
        let lightness = |v: f64| u32::from_str_radix(&colour(v)[1..3], 16).expect("hexadecimal");
        let steps: Vec<u32> = (0..=20).map(|i| lightness(f64::from(i) / 20.0)).collect();
        assert!(steps.windows(2).all(|w| w[0] > w[1]), "{steps:?}");
        assert_eq!(colour(-3.0), colour(0.0));
    }

    #[test]
    fn many_layers_are_labelled_sparsely_and_none_is_no_panic() {
        let map = |n: usize| HeatMap {
            title: String::new(),
            axis: String::new(),
            scale: String::new(),
            values: vec![vec![0.5; n]; n],
        };
        let anchors = map(61).render().matches("text-anchor=\"end\"").count();
        assert!((8..=LABELS).contains(&anchors), "{anchors}");
        assert!(map(0).render().ends_with("</svg>\n"));
    }
}

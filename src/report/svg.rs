//! Line plots as SVG: axes, ticks, legend. Same values, same bytes.

use std::fmt::Write as _;

/// One line of a plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// `(x, y)` in the order they are joined. Points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// Named points as lines: one per name, in the order names first come, points in order of `x`.
    pub fn gather(points: impl IntoIterator<Item = (String, (f64, f64))>) -> Vec<Self> {
        let mut series: Vec<Self> = Vec::new();
        for (name, point) in points {
            match series.iter_mut().find(|s| s.name == name) {
                Some(s) => s.points.push(point),
                None => series.push(Self { name, points: vec![point] }),
            }
        }
        for s in &mut series {
            s.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        series
    }
}

/// A line plot. The vertical axis turns logarithmic where values span more than a factor of 20.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// Heading.
    pub title: String,
    /// Under the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Lines.
    pub series: Vec<Series>,
    /// A dashed horizontal line with its name.
    pub level: Option<(String, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 104.0;
/// Told apart also with the common colour vision deficiencies (Okabe and Ito's set).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const INK: &str = "#333";
/// Widest legend entry per character, in pixels, at the legend's font size.
const LEGEND_CHAR: f64 = 7.0;

/// A linear or logarithmic map from values to pixels, with its ticks.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone, may_log: bool, from: f64, to: f64) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if !low.is_finite() {
            return Self { low: 0.0, high: 1.0, log: false, from, to, ticks: vec![0.0, 1.0] };
        }
        if may_log && low > 0.0 && high / low > 20.0 {
            let ticks: Vec<f64> = log_ticks(low, high);
            let (low, high) = (ticks[0].min(low), ticks[ticks.len() - 1].max(high));
            return Self { low, high, log: true, from, to, ticks };
        }
        // A single value gets room on both sides.
        let span = if high > low { high - low } else { low.abs().max(1.0) * 0.2 };
        let step = nice_step(span / 5.0);
        let first = ((low - span * 0.04) / step).floor() as i64;
        let last = ((high + span * 0.04) / step).ceil() as i64;
        let ticks: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
        Self { low: first as f64 * step, high: last as f64 * step, log: false, from, to, ticks }
    }

    fn place(&self, v: f64) -> f64 {
        let share = if self.log {
            (v / self.low).ln() / (self.high / self.low).ln()
        } else {
            (v - self.low) / (self.high - self.low)
        };
        self.from + share * (self.to - self.from)
    }

    fn label(&self, v: f64) -> String {
        if self.log {
            return if v >= 1e6 { format!("{v:.0e}") } else { format!("{v}") };
        }
        let step = self.ticks.get(1).map_or(1.0, |t| t - self.ticks[0]);
        let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        // -0.0 would print its sign.
        format!("{:.digits$}", v + 0.0)
    }
}

/// 1, 2 or 5 times a power of ten, at least `x`.
fn nice_step(x: f64) -> f64 {
    let power = 10f64.powf(x.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= x * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// 1, 2, 5 in every decade that the values touch, thinned to the decades where there are many; never empty.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let factors: &[f64] = if last - first > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all: Vec<f64> = (first..=last).flat_map(|d| factors.iter().map(move |m| m * 10f64.powi(d))).collect();
    let from = all.iter().rposition(|t| *t <= low).unwrap_or(0);
    let to = all.iter().position(|t| *t >= high).unwrap_or(all.len() - 1);
    all[from..=to].to_vec()
}

impl Plot {
    /// The plot as an SVG document.
    pub fn render(&self) -> String {
        let points = || self.series.iter().flat_map(|s| s.points.iter().copied()).filter(|p| finite(*p));
        let level = self.level.as_ref().map(|l| l.1).filter(|y| y.is_finite());
        let x = Axis::new(points().map(|p| p.0), false, LEFT, WIDTH - RIGHT);
        let y = Axis::new(points().map(|p| p.1).chain(level), true, HEIGHT - BOTTOM, TOP);
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.draw(&mut out, &x, &y, level);
        out
    }

    fn draw(&self, out: &mut String, x: &Axis, y: &Axis, level: Option<f64>) -> std::fmt::Result {
        begin(out, (WIDTH, HEIGHT), LEFT, &self.title)?;
        self.draw_axes(out, x, y)?;
        if let Some(value) = level {
            let at = y.place(value);
            writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"{INK}\" \
                 stroke-dasharray=\"6 4\"/>",
                WIDTH - RIGHT
            )?;
        }
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let places: Vec<(f64, f64)> =
                series.points.iter().filter(|p| finite(**p)).map(|p| (x.place(p.0), y.place(p.1))).collect();
            let path: Vec<String> = places.iter().map(|(px, py)| format!("{px:.1},{py:.1}")).collect();
            writeln!(
                out,
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
                path.join(" ")
            )?;
            for (px, py) in places {
                writeln!(out, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"4\" fill=\"{colour}\"/>")?;
            }
        }
        self.draw_legend(out, level.is_some())?;
        writeln!(out, "</svg>")
    }

    fn draw_axes(&self, out: &mut String, x: &Axis, y: &Axis) -> std::fmt::Result {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in &y.ticks {
            let at = y.place(*tick);
            writeln!(out, "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#e4e4e4\"/>")?;
            writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                at + 4.0,
                y.label(*tick)
            )?;
        }
        for tick in &x.ticks {
            let at = x.place(*tick);
            writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{:.1}\" stroke=\"{INK}\"/>",
                bottom + 5.0
            )?;
            writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 20.0,
                x.label(*tick)
            )?;
        }
        writeln!(
            out,
            "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"{INK}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + right) / 2.0,
            bottom + 42.0,
            escape(&self.x_label)
        )?;
        let middle = (TOP + bottom) / 2.0;
        let log = if y.log { " (logarithmic)" } else { "" };
        writeln!(
            out,
            "<text x=\"20\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 20 {middle:.1})\">{}{log}</text>",
            escape(&self.y_label)
        )
    }

    fn draw_legend(&self, out: &mut String, level: bool) -> std::fmt::Result {
        let named = self.series.iter().enumerate().map(|(i, s)| (s.name.as_str(), COLOURS[i % COLOURS.len()], ""));
        let dashed = self.level.iter().filter(|_| level).map(|l| (l.0.as_str(), INK, " stroke-dasharray=\"6 4\""));
        let (mut at, mut row) = (LEFT, HEIGHT - 36.0);
        for (name, colour, dash) in named.chain(dashed) {
            let width = 46.0 + name.chars().count() as f64 * LEGEND_CHAR;
            if at + width > WIDTH && at > LEFT {
                (at, row) = (LEFT, row + 20.0);
            }
            writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{:.1}\" y1=\"{row:.1}\" y2=\"{row:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"2\"{dash}/>\n<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                at + 24.0,
                at + 30.0,
                row + 4.0,
                escape(name)
            )?;
            at += width;
        }
        Ok(())
    }
}

fn finite(p: (f64, f64)) -> bool {
    p.0.is_finite() && p.1.is_finite()
}

/// What every picture begins with: its size, a white ground, and the title above, from `left`.
pub(super) fn begin(out: &mut String, (width, height): (f64, f64), left: f64, title: &str) -> std::fmt::Result {
    let title = escape(title);
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">"
    )?;
    writeln!(out, "<title>{title}</title>")?;
    writeln!(out, "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>")?;
    writeln!(out, "<text x=\"{left}\" y=\"28\" font-size=\"15\" font-weight=\"600\">{title}</text>")
}

/// Text safe inside XML; characters XML 1.0 forbids become U+FFFD.
pub(super) fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>, level: Option<f64>) -> Plot {
        Plot {
            title: "a <b> & \"c\"\u{1b}".into(),
            x_label: "x".into(),
            y_label: "y".into(),
            series: vec![Series { name: "one".into(), points }],
            level: level.map(|l| ("level".into(), l)),
        }
    }

    /// Every coordinate of a drawn point.
    fn circles(svg: &str) -> Vec<(f64, f64)> {
        svg.lines()
            .filter(|l| l.starts_with("<circle"))
            .map(|l| {
                let part = |key: &str| -> f64 {
                    let rest = l.split(&format!("{key}=\"")).nth(1).expect("the attribute");
                    rest.split('"').next().expect("its end").parse().expect("a number")
                };
                (part("cx"), part("cy"))
            })
            .collect()
    }

    #[test]
    fn points_lie_inside_the_axes_and_keep_their_order() {
        for points in [
            vec![(96.0, 50.0), (192.0, 30.0), (256.0, 22.0)],
            vec![(96.0, 1e5), (192.0, 30.0), (256.0, 22.0)],
            vec![(192.0, 30.0)],
            vec![(0.0, -3.0), (1.0, -3.5)],
        ] {
            let svg = plot(points.clone(), Some(20.0)).render();
            let drawn = circles(&svg);
            assert_eq!(drawn.len(), points.len());
            for (x, y) in &drawn {
                assert!((LEFT..=WIDTH - RIGHT).contains(x) && (TOP..=HEIGHT - BOTTOM).contains(y), "({x}, {y})");
            }
            // All of these fall; pixels count downwards.
            assert!(drawn.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 < w[1].1), "{drawn:?}");
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_left_out() {
        let svg = plot(vec![(1.0, f64::NAN), (f64::INFINITY, 1.0), (2.0, 2.0)], Some(f64::NAN)).render();
        assert_eq!(circles(&svg).len(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(plot(Vec::new(), None).render().ends_with("</svg>\n"));
    }

    #[test]
    fn text_is_escaped() {
        let svg = plot(vec![(1.0, 1.0)], None).render();
        assert!(svg.contains("a &lt;b&gt; &amp; &quot;c&quot;\u{fffd}"));
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let axis = Axis::new([19.6, 34.3].into_iter(), true, 0.0, 1.0);
        assert!(axis.low <= 19.6 && axis.high >= 34.3);
        assert!(axis.ticks.iter().all(|t| (t / 5.0).fract() == 0.0), "{:?}", axis.ticks);
        let log = Axis::new([19.6, 2715.0].into_iter(), true, 0.0, 1.0);
        assert!(log.log && log.low <= 19.6 && log.high >= 2715.0, "{:?}", log.ticks);
    }
}

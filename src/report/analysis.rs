//! The document of `analyze`.

use std::fmt::Write as _;

use serde::Serialize;

use super::heatmap::HeatMap;
use super::svg::{Plot, Series};
use super::table::{Table, wrap};
use super::{SCHEMA_VERSION, units};
use crate::analyze::{Analysis, LEVELS, MatrixAnalysis};

/// Result of `analyze`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnalysisReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Model as the user named it.
    pub model: String,
    /// Where the text came from.
    pub text: String,
    /// What was found.
    #[serde(flatten)]
    pub analysis: Analysis,
}

/// Points of a curve, at most.
const POINTS: usize = 48;
/// Energy lost below this is not drawn.
const FLOOR: f64 = 1e-6;

impl AnalysisReport {
    /// Names are for the reader.
    pub fn new(model: &str, text: &str, analysis: Analysis) -> Self {
        Self { schema_version: SCHEMA_VERSION, model: model.to_owned(), text: text.to_owned(), analysis }
    }

    /// Ranks and caches per group size, then the alignment of layers.
    pub fn text(&self, width: usize) -> String {
        let a = &self.analysis;
        let mut headings = vec!["matrix".to_owned(), ">layers per group".to_owned(), ">most".to_owned()];
        for level in LEVELS {
            headings.push(format!(">rank for {:.0}%", level * 100.0));
            headings.push(">cache".to_owned());
        }
        let mut t = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
        for m in &a.matrices {
            for g in &m.groups {
                let mut row = vec![m.matrix.name().to_owned(), g.group.to_string(), g.max_rank.to_string()];
                for r in &g.ranks {
                    row.extend([r.rank.to_string(), units::percent(r.cache_share)]);
                }
                t.row(row);
            }
        }
        let mut out = t.render(width);
        out.push('\n');
        let mut t = Table::new(&["matrix", ">width", ">rank", ">neighbours", ">any two layers", ">by chance"]);
        for m in &a.matrices {
            let l = &m.alignment;
            t.row([
                m.matrix.name().to_owned(),
                m.width.to_string(),
                l.rank.to_string(),
                units::percent(l.neighbours),
                units::percent(l.pairs),
                units::percent(l.chance),
            ]);
        }
        out += &t.render(width);
        let note = format!(
            "{} layers, {} windows of {} tokens, {}; above: rank of a whole group that keeps a share of its energy, and \
             what its factors take of the cache of these tokens; below: overlap of the leading left singular subspaces \
             of layers",
            a.layers, a.windows, a.tokens, self.text
        );
        let _ = writeln!(out, "\n{}", wrap(&note, width).join("\n"));
        out
    }

    /// Every plot with the name of its file: a heat map and curves per matrix.
    pub fn plots(&self) -> Vec<(String, String)> {
        let plots = |m: &MatrixAnalysis| {
            let name = m.matrix.name();
            [(format!("alignment-{name}.svg"), heat_map(m)), (format!("energy-{name}.svg"), curves(m))]
        };
        self.analysis.matrices.iter().flat_map(plots).collect()
    }
}

fn heat_map(m: &MatrixAnalysis) -> String {
    HeatMap {
        title: format!("alignment of layers: {}", m.matrix.name()),
        axis: "layer".to_owned(),
        scale: format!(
            "overlap of the leading {} left singular vectors (chance {:.2})",
            m.alignment.rank, m.alignment.chance
        ),
        values: m.alignment.overlap.clone(),
    }
    .render()
}

/// Energy lost against rank per layer, so that group sizes are compared at equal caches.
fn curves(m: &MatrixAnalysis) -> String {
    let series = m.groups.iter().map(|g| {
        let count = g.energy.len();
        // Denser where the curve bends.
        let at = |i: usize| (count as f64).powf(i as f64 / (POINTS - 1) as f64).round() as usize;
        let mut ranks: Vec<usize> = (0..POINTS).map(at).collect();
        ranks.dedup();
        let point = |rank: usize| Some((rank as f64 / g.group as f64, 1.0 - g.energy.get(rank.checked_sub(1)?)?));
        let points = ranks.into_iter().filter_map(point).filter(|p| p.1 >= FLOOR).collect();
        Series { name: format!("{} layer{}", g.group, if g.group == 1 { "" } else { "s" }), points }
    });
    Plot {
        title: format!("energy lost against rank: {}", m.matrix.name()),
        x_label: format!("rank per layer (r / layers of the group; full width {})", m.width),
        y_label: "share of the energy lost".to_owned(),
        series: series.collect(),
        level: Some(("5% lost".to_owned(), 0.05)),
    }
    .render()
}

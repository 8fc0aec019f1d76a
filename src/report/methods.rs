//! Methods side by side: the document, table and plot of `compare`.

use serde::Serialize;

use super::SCHEMA_VERSION;
use super::svg::{Plot, Series};
use super::table::Table;
use super::units;

/// Result of `compare`.
#[derive(Debug, Clone, Serialize)]
pub struct MethodComparison {
    /// Version of this document.
    pub schema_version: u32,
    /// Source model as the user named it.
    pub source: String,
    /// Where the text came from.
    pub text: String,
    /// Tokens predicted.
    pub tokens: usize,
    /// Perplexity of the source.
    pub ppl_source: f64,
    /// `2 g d`.
    pub source_cache_values_per_token_per_layer: usize,
    /// One row per method and budget, in the order they were run.
    pub rows: Vec<MethodRow>,
}

/// One conversion, evaluated.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct MethodRow {
    pub method: String,
    /// Budget asked for; `None` for a method that takes none.
    pub budget: Option<String>,
    /// `None` where the method failed.
    #[serde(flatten)]
    pub figures: Option<MethodFigures>,
    /// Why the method failed.
    pub error: Option<String>,
}

/// Figures of one conversion.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct MethodFigures {
    pub kv_lora_rank: usize,
    pub qk_rope_head_dim: usize,
    pub cache_values_per_token_per_layer: usize,
    pub cache_percent: f64,
    pub perplexity: f64,
    /// `ln(perplexity / ppl_source)`, nats per token.
    pub excess_nats: f64,
    /// Mean error of a layer's attention output on the calibration text.
    pub calibration_error: f64,
    /// The same under its first name, until `schema_version` 2.
    pub predicted_error: f64,
    /// Wall seconds of the conversion.
    pub seconds: f64,
}

impl MethodComparison {
    /// A document without rows.
    pub fn new(source: &str, text: &str, tokens: usize, ppl_source: f64, source_cache: usize) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            source: source.to_owned(),
            text: text.to_owned(),
            tokens,
            ppl_source,
            source_cache_values_per_token_per_layer: source_cache,
            rows: Vec::new(),
        }
    }

    /// One line per row, the source first.
    pub fn table(&self) -> Table {
        let mut t =
            Table::new(&["method", ">cache", ">of source", ">perplexity", ">excess", ">time", "split / failure"]);
        let source = self.source_cache_values_per_token_per_layer.to_string();
        t.row(["(source)", &source, "100.0%", &units::figure(self.ppl_source), "0", "", ""]);
        for row in &self.rows {
            match (&row.figures, &row.error) {
                (Some(f), _) => t.row([
                    row.method.clone(),
                    f.cache_values_per_token_per_layer.to_string(),
                    format!("{:.1}%", f.cache_percent),
                    units::figure(f.perplexity),
                    format!("{:.4}", f.excess_nats),
                    units::seconds(f.seconds),
                    format!("{} latent + {} rope", f.kv_lora_rank, f.qk_rope_head_dim),
                ]),
                (None, error) => t.row([
                    row.method.clone(),
                    row.budget.clone().unwrap_or_default(),
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                    format!("failed: {}", error.as_deref().unwrap_or("unknown reason")),
                ]),
            };
        }
        t
    }

    /// Perplexity against cache, one line per method, as SVG.
    pub fn svg(&self) -> String {
        let points = self.rows.iter().filter_map(|row| {
            let f = row.figures.as_ref()?;
            Some((row.method.clone(), (f.cache_values_per_token_per_layer as f64, f.perplexity)))
        });
        Plot {
            title: format!("{}: perplexity against cache", self.source),
            x_label: "cached values per token and layer".to_owned(),
            y_label: "perplexity".to_owned(),
            series: Series::gather(points),
            level: Some((format!("source ({} values)", self.source_cache_values_per_token_per_layer), self.ppl_source)),
        }
        .render()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, cache: usize, ppl: f64) -> MethodRow {
        let figures = MethodFigures {
            kv_lora_rank: cache - 64,
            qk_rope_head_dim: 64,
            cache_values_per_token_per_layer: cache,
            cache_percent: cache as f64 / 3.84,
            perplexity: ppl,
            excess_nats: (ppl / 10.0).ln(),
            calibration_error: 0.1,
            predicted_error: 0.1,
            seconds: 1.0,
        };
        MethodRow { method: method.into(), budget: Some("50%".into()), figures: Some(figures), error: None }
    }

    #[test]
    fn a_failed_method_keeps_its_row_and_leaves_the_plot() {
        let mut c = MethodComparison::new("m", "text", 10, 10.0, 384);
        c.rows.push(row("care", 192, 12.0));
        c.rows.push(MethodRow {
            method: "transmla".into(),
            budget: Some("50%".into()),
            figures: None,
            error: Some("no such split".into()),
        });
        let table = c.table().render(120);
        assert!(table.contains("failed: no such split"), "{table}");
        assert!(!c.svg().contains("transmla"));
        let json = serde_json::to_value(&c).expect("plain data");
        assert_eq!(json["rows"][0]["perplexity"], 12.0);
        assert_eq!(json["rows"][1]["error"], "no such split");
    }
}

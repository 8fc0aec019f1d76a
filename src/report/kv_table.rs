//! Cache bytes per token of several models, as "Insights into DeepSeek-V3" (arXiv 2505.09343, table 1) compares them.

use serde::Serialize;

use super::InspectedModel;
use super::table::Table;

/// Cache of one model, beside the others. A kB is 1000 bytes, as in the paper.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KvRow {
    /// The model as the user named it.
    pub model: String,
    /// `mha`, `gqa`, `mqa` or `mla`.
    pub attention: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Cached values per token and layer.
    pub values_per_token_per_layer: usize,
    /// All layers, with a cache of bf16.
    pub bytes_per_token: u64,
    /// Of the first model's bytes.
    pub ratio_to_first: f64,
}

impl KvRow {
    /// Every model against the first.
    pub fn table(models: &[InspectedModel]) -> Vec<Self> {
        let first = models.first().map_or(1, |m| m.kv_bytes_per_token.max(1));
        let row = |m: &InspectedModel| Self {
            model: m.model.clone(),
            attention: m.attention,
            layers: m.layers,
            values_per_token_per_layer: m.kv_values_per_token_per_layer,
            bytes_per_token: m.kv_bytes_per_token,
            ratio_to_first: m.kv_bytes_per_token as f64 / first as f64,
        };
        models.iter().map(row).collect()
    }
}

/// The table for people.
pub(super) fn text(models: &[InspectedModel], width: usize) -> String {
    let mut t =
        Table::new(&["KV cache, bf16", "attention", ">values per layer", ">layers", ">per token", ">to the first"]);
    for row in KvRow::table(models) {
        t.row([
            row.model,
            row.attention.to_uppercase(),
            row.values_per_token_per_layer.to_string(),
            row.layers.to_string(),
            format!("{:.3} kB", row.bytes_per_token as f64 / 1000.0),
            format!("{:.2}x", row.ratio_to_first),
        ]);
    }
    t.render(width)
}

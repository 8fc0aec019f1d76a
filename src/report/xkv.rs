//! The document of `eval --xkv`.

use std::fmt::Write as _;

use serde::Serialize;

use super::table::Table;
use super::{SCHEMA_VERSION, units};
use crate::runtime::XkvSettings;
use crate::verify::{Evaluation, XkvEvaluation};

/// Result of `eval` with a compressed prompt.
#[derive(Debug, Clone, Serialize)]
pub struct XkvReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Model as the user named it.
    pub model: String,
    /// Where the text came from.
    pub text: String,
    /// Tokens per window.
    pub seq_len: usize,
    /// Ranks and group size.
    pub xkv: XkvSettings,
    /// The figures.
    #[serde(flatten)]
    pub figures: XkvEvaluation,
}

impl XkvReport {
    /// Names are for the reader.
    pub fn new(model: &str, (text, seq_len): (&str, usize), xkv: XkvSettings, figures: XkvEvaluation) -> Self {
        let (model, text) = (model.to_owned(), text.to_owned());
        Self { schema_version: SCHEMA_VERSION, model, text, seq_len, xkv, figures }
    }

    /// Both caches beside each other.
    pub fn text(&self, width: usize) -> String {
        let (f, bytes) = (&self.figures, self.figures.prompt_cache_bytes);
        let mut t = Table::new(&[">perplexity", ">nats/token", ">prompt's cache", ">of exact", "cache"]);
        let mut row = |e: &Evaluation, size: usize, name: String| {
            t.row([
                format!("{:.4}", e.perplexity),
                format!("{:.4}", e.nll_nats_per_token),
                units::bytes(size as u64),
                units::percent(size as f64 / bytes.exact as f64),
                name,
            ]);
        };
        row(&f.exact, bytes.exact, "exact".to_owned());
        let x = &self.xkv;
        row(&f.compressed, bytes.compressed, format!("xKV {},{},{}", x.rank_k, x.rank_v, x.group));
        let mut out = t.render(width);
        let _ = writeln!(
            out,
            "\n{} tokens after prompts of {}, {} windows of {}, {}; bytes as allocated for one window, f32",
            f.exact.tokens, f.prompt_tokens, f.exact.windows, self.seq_len, self.text
        );
        out
    }
}

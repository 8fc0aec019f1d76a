//! The documents of `generate` and `bench`.

use std::fmt::Write as _;

use serde::Serialize;

use super::svg::{Plot, Series};
use super::table::Table;
use super::{SCHEMA_VERSION, units};
use crate::runtime::{Stop, XkvBytes, XkvSettings, median};

/// Tokens in some time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Wall time.
    pub seconds: f64,
    /// `tokens / seconds`; 0 where nothing was done.
    pub tokens_per_second: f64,
}

impl Rate {
    /// `tokens` in `seconds`.
    pub fn new(tokens: usize, seconds: f64) -> Self {
        let rate = tokens as f64 / seconds;
        Self { tokens, seconds, tokens_per_second: if rate.is_finite() { rate } else { 0.0 } }
    }
}

/// Result of `generate`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerationReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Model as the user named it.
    pub model: String,
    /// Device it ran on.
    pub device: String,
    /// New text, without special tokens.
    pub text: String,
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// The prompt.
    pub prefill: Rate,
    /// Decoding, one token a step.
    pub decode: Rate,
    /// Bytes of the allocated caches.
    pub cache_bytes: usize,
    /// How the prompt's cache was compressed, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xkv: Option<CompressedPrompt>,
}

/// A prompt whose cache is kept as factors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CompressedPrompt {
    /// Ranks and group size.
    #[serde(flatten)]
    pub settings: XkvSettings,
    /// Bytes of the prompt's caches.
    pub prompt_cache_bytes: XkvBytes,
}

impl GenerationReport {
    /// Speed and cache in one line.
    pub fn summary(&self) -> String {
        let compressed = self.xkv.map_or_else(String::new, |x| {
            let of = |bytes: usize| units::bytes(bytes as u64);
            let bytes = x.prompt_cache_bytes;
            format!(" (the prompt's: {} instead of {})", of(bytes.compressed), of(bytes.exact))
        });
        format!(
            "prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s; cache: {}{compressed}; {}",
            self.prefill.tokens,
            self.prefill.tokens_per_second,
            self.tokens.len(),
            self.decode.tokens_per_second,
            units::bytes(self.cache_bytes as u64),
            self.device
        )
    }
}

/// One case of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchRow {
    /// Model as the user named it.
    pub model: String,
    /// Tokens in the cache of each sequence when decoding begins.
    pub context: usize,
    /// Sequences side by side.
    pub batch: usize,
    /// Filling the cache.
    pub prefill: Rate,
    /// Decoding at the median time of a step.
    pub decode: Rate,
    /// Seconds of every step, in order.
    pub decode_step_seconds: Vec<f64>,
    /// Bytes of the allocated caches of all sequences.
    pub cache_bytes: usize,
    /// Tokens that the caches have room for, all sequences together.
    pub cache_tokens: usize,
}

impl BenchRow {
    /// Figures of one case; every step decodes `batch` tokens.
    pub fn new(
        model: &str,
        (context, batch): (usize, usize),
        prefill_seconds: f64,
        steps: Vec<f64>,
        (cache_bytes, cache_tokens): (usize, usize),
    ) -> Self {
        Self {
            model: model.to_owned(),
            context,
            batch,
            prefill: Rate::new(context * batch, prefill_seconds),
            decode: Rate::new(batch, median(&steps)),
            decode_step_seconds: steps,
            cache_bytes,
            cache_tokens,
        }
    }
}

/// Result of `bench`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Device it ran on.
    pub device: String,
    /// Threads of the CPU that were used.
    pub threads: usize,
    /// Cases in the order they were measured, the models of a case next to each other.
    pub rows: Vec<BenchRow>,
}

impl BenchReport {
    /// A document without rows.
    pub fn new(device: &str, threads: usize) -> Self {
        Self { schema_version: SCHEMA_VERSION, device: device.to_owned(), threads, rows: Vec::new() }
    }

    /// One line per case and model; speeds also as multiples of the first model's in the same case.
    pub fn text(&self, width: usize) -> String {
        let mut t = Table::new(&[
            ">context",
            ">batch",
            ">prefill tokens/s",
            ">decode tokens/s",
            ">of first",
            ">cache",
            ">cache/token",
            "model",
        ]);
        let mut first: Option<&BenchRow> = None;
        for row in &self.rows {
            let base = match first {
                Some(f) if (f.context, f.batch) == (row.context, row.batch) => f,
                _ => row,
            };
            first = Some(base);
            let ratio = row.decode.tokens_per_second / base.decode.tokens_per_second;
            t.row([
                row.context.to_string(),
                row.batch.to_string(),
                format!("{:.1}", row.prefill.tokens_per_second),
                format!("{:.2}", row.decode.tokens_per_second),
                format!("{ratio:.2}x"),
                units::bytes(row.cache_bytes as u64),
                units::bytes((row.cache_bytes / row.cache_tokens.max(1)) as u64),
                row.model.clone(),
            ]);
        }
        let mut out = t.render(width);
        let threads = if self.device == "cpu" { format!(", {} threads", self.threads) } else { String::new() };
        let _ = writeln!(out, "\n{}{threads}, f32; decode at the median step", self.device);
        out
    }

    /// Decoding speed against context, one line per model and batch, as SVG.
    pub fn svg(&self) -> String {
        let batches = self.rows.windows(2).any(|w| w[0].batch != w[1].batch);
        let points = self.rows.iter().map(|row| {
            let name = match batches {
                true => format!("{}, batch {}", row.model, row.batch),
                false => row.model.clone(),
            };
            (name, (row.context as f64, row.decode.tokens_per_second))
        });
        Plot {
            title: format!("decoding speed against context ({})", self.device),
            x_label: "tokens in the cache".to_owned(),
            y_label: "tokens/s".to_owned(),
            series: Series::gather(points),
            level: None,
        }
        .render()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> BenchReport {
        let mut report = BenchReport::new("cpu", 2);
        for (context, slow) in [(128, 0.5), (1024, 1.0)] {
            report.rows.push(BenchRow::new("gqa", (context, 2), 4.0, vec![slow, 9.0, slow], (4000, 10)));
            report.rows.push(BenchRow::new("mla", (context, 2), 2.0, vec![slow / 2.0], (2000, 10)));
        }
        report
    }

    #[test]
    fn speeds_are_those_of_the_median_step_and_relative_to_the_first_model() {
        let report = report();
        assert_eq!(report.rows[0].decode.tokens_per_second, 4.0);
        assert_eq!(report.rows[3].prefill.tokens_per_second, 1024.0);
        let text = report.text(120);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].contains("1.00x") && lines[3].contains("2.00x") && lines[4].contains("1.00x"), "{text}");
        assert!(lines[3].contains("200 B") && lines[2].contains("4.0 kB"), "{text}");
    }

    #[test]
    fn the_plot_has_a_line_per_model() {
        let svg = report().svg();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(svg.contains(">gqa<") && svg.contains(">mla<"));
        assert!(BenchReport::new("cpu", 1).svg().ends_with("</svg>\n"));
    }

    #[test]
    fn nothing_in_no_time_is_no_rate() {
        assert_eq!(Rate::new(0, 0.0).tokens_per_second, 0.0);
    }
}

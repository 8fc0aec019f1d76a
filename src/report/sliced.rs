//! The document of `verify --tp`.

use serde::Serialize;

use super::table::Table;
use super::{SCHEMA_VERSION, units};
use crate::latent::Transform;
use crate::verify::{Comparison, Failure, SharedOut, SlicedComparison, SlicedFigures, Thresholds};

/// A single rank holds the whole latent, so that nothing may change but the order of sums.
const ONE_RANK: f64 = 2e-3;

/// Result of `verify --tp`.
#[derive(Debug, Clone, Serialize)]
pub struct SlicedVerification {
    /// Version of this document.
    pub schema_version: u32,
    /// Source model as the user named it.
    pub source: String,
    /// Converted model as the user named it.
    pub converted: String,
    /// Where the text came from.
    pub text: String,
    /// Tokens per window.
    pub seq_len: usize,
    /// Tokens of each window that are a prompt, run whole; figures are over the others.
    pub prefill: usize,
    /// Calibration tokens; 0 where none was needed.
    pub calibration_tokens: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Cached values per token and layer of the whole model.
    pub cache_values: usize,
    /// The converted model whole, against the source.
    pub whole: Comparison,
    /// Every way of sharing out.
    pub cases: Vec<SlicedCase>,
    /// Thresholds applied to each of them, against the source.
    pub thresholds: Thresholds,
    /// Whether all hold, figures are finite, decoding one by one agrees, and one rank is the whole model.
    pub passed: bool,
}

/// One way of sharing out, and its figures.
#[derive(Debug, Clone, Serialize)]
pub struct SlicedCase {
    /// What rotated the latents.
    pub transform: Transform,
    /// Ranks.
    pub tp: usize,
    /// Whether ranks share the root mean square.
    pub shared_rms: bool,
    /// Factor on the part of a rank's scores that comes from its slice.
    pub logit_scale: f64,
    /// Whether keys and values of the ranks were fitted on calibration text.
    pub refitted: bool,
    /// Figures.
    #[serde(flatten)]
    pub figures: SlicedFigures,
    /// Bytes of one rank's cache per token, all layers, in bf16.
    pub cache_bytes_per_token_per_rank: usize,
    /// Thresholds that do not hold.
    pub failed: Vec<Failure>,
}

impl SlicedVerification {
    /// Judge the figures.
    pub fn new(
        (source, converted): (&str, &str),
        (text, seq_len): (&str, usize),
        (layers, cache_values): (usize, usize),
        calibration_tokens: usize,
        (ways, figures): (&[SharedOut], SlicedComparison),
        thresholds: Thresholds,
    ) -> Self {
        let case = |(way, figures): (&SharedOut, &SlicedFigures)| {
            let mut failed = figures.against_source.verdict(&thresholds).failures;
            let (found, allowed) = (figures.max_abs_dlogit_whole, ONE_RANK);
            if way.sharing.ranks == 1 && way.sharing.logit_scale == 1.0 && (found.is_nan() || found > allowed) {
                failed.push(Failure { measure: "max_abs_dlogit_whole", found, allowed });
            }
            SlicedCase {
                transform: way.transform,
                tp: way.sharing.ranks,
                shared_rms: way.sharing.shared_rms,
                logit_scale: way.sharing.logit_scale,
                refitted: way.refitted.is_some(),
                figures: *figures,
                cache_bytes_per_token_per_rank: 2 * layers * figures.cache_values_per_rank,
                failed,
            }
        };
        let cases: Vec<SlicedCase> = ways.iter().zip(&figures.cases).map(case).collect();
        let finite = |c: &SlicedCase| {
            [c.figures.cost_nats_per_token, c.figures.kl_whole_nats_per_token, c.figures.against_source.ppl_converted]
                .iter()
                .all(|x| x.is_finite())
        };
        Self {
            schema_version: SCHEMA_VERSION,
            source: source.to_owned(),
            converted: converted.to_owned(),
            text: text.to_owned(),
            seq_len,
            prefill: figures.prefill,
            calibration_tokens,
            layers,
            cache_values,
            whole: figures.whole,
            passed: cases.iter().all(|c| c.failed.is_empty() && finite(c)),
            cases,
            thresholds,
        }
    }

    /// For the terminal.
    pub fn text(&self, width: usize) -> String {
        let mut t = Table::new(&[
            "transform",
            ">ranks",
            "rms",
            ">scale",
            "kv_b",
            ">cache/rank",
            ">of whole",
            ">bytes/rank",
            ">perplexity",
            ">cost, nats",
            ">KL to whole",
            ">same token",
        ]);
        let bytes = |values: usize| units::bytes(2 * (values * self.layers) as u64);
        t.row([
            "whole".to_owned(),
            "-".to_owned(),
            String::new(),
            String::new(),
            String::new(),
            self.cache_values.to_string(),
            units::percent(1.0),
            bytes(self.cache_values),
            units::figure(self.whole.ppl_converted),
            "-".to_owned(),
            "-".to_owned(),
            "-".to_owned(),
        ]);
        for c in &self.cases {
            let f = &c.figures;
            t.row([
                c.transform.name().to_owned(),
                c.tp.to_string(),
                if c.shared_rms { "shared" } else { "own" }.to_owned(),
                c.logit_scale.to_string(),
                if c.refitted { "refit" } else { "sliced" }.to_owned(),
                f.cache_values_per_rank.to_string(),
                units::percent(f.cache_values_per_rank as f64 / self.cache_values as f64),
                bytes(f.cache_values_per_rank),
                units::figure(f.against_source.ppl_converted),
                format!("{:+.4}", f.cost_nats_per_token),
                units::figure(f.kl_whole_nats_per_token),
                units::percent(f.top1_whole),
            ]);
        }
        let mut out = t.render(width);
        out += &format!(
            "\nsource: perplexity {}; {} decoded tokens after prompts of {} ({} windows of {}, {}); cache: values per token \
             and layer, bytes per token in bf16\n",
            units::figure(self.whole.ppl_source),
            self.whole.tokens,
            self.prefill,
            self.whole.windows,
            self.seq_len,
            self.text
        );
        for c in &self.cases {
            for f in &c.failed {
                out += &format!(
                    "failed: {} over {}: {} is {}, limit {}\n",
                    c.transform, c.tp, f.measure, f.found, f.allowed
                );
            }
        }
        out += if self.passed { "passed\n" } else { "NOT PASSED\n" };
        out
    }
}

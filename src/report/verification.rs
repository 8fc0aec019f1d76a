//! The documents of `verify` and `eval`.

use serde::Serialize;

use super::SCHEMA_VERSION;
use crate::verify::{self, Comparison, Failure, Thresholds};

/// Result of `verify`: the figures of [`Comparison`] and what was asked of them.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
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
    /// The figures.
    #[serde(flatten)]
    pub figures: Comparison,
    /// Thresholds applied.
    pub thresholds: Thresholds,
    /// Why those thresholds, in a few words.
    pub thresholds_from: String,
    /// Thresholds that do not hold.
    pub failed: Vec<Failure>,
    /// Whether all hold and every figure is a finite number.
    pub passed: bool,
}

impl Verification {
    /// Judge `figures`; names of the models, text and window length are for the reader.
    pub fn new(
        (source, converted): (&str, &str),
        (text, seq_len): (&str, usize),
        figures: Comparison,
        thresholds: Thresholds,
        thresholds_from: &str,
    ) -> Self {
        let verdict = figures.verdict(&thresholds);
        let c = &figures;
        let finite = [
            c.max_abs_dlogit,
            c.kl_nats_per_token,
            c.top1_agreement,
            c.ppl_source,
            c.ppl_converted,
            c.cached_vs_full_max_abs_dlogit,
        ];
        let passed = verdict.passed() && finite.iter().all(|x| x.is_finite());
        Self {
            schema_version: SCHEMA_VERSION,
            source: source.to_owned(),
            converted: converted.to_owned(),
            text: text.to_owned(),
            seq_len,
            figures,
            thresholds,
            thresholds_from: thresholds_from.to_owned(),
            failed: verdict.failures,
            passed,
        }
    }

    /// `ln(ppl_converted / ppl_source)`: what the conversion costs, nats per token.
    pub fn excess(&self) -> f64 {
        (self.figures.ppl_converted / self.figures.ppl_source).ln()
    }
}

/// Result of `eval`.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// Version of this document.
    pub schema_version: u32,
    /// Model as the user named it.
    pub model: String,
    /// Where the text came from.
    pub text: String,
    /// Tokens per window.
    pub seq_len: usize,
    /// The figures.
    #[serde(flatten)]
    pub figures: verify::Evaluation,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::report) fn verification(thresholds: Thresholds) -> Verification {
        Verification::new(("source", "converted"), ("text", 512), figures(), thresholds, "asked for")
    }

    fn figures() -> Comparison {
        Comparison {
            max_abs_dlogit: 1e-3,
            kl_nats_per_token: 1e-4,
            top1_agreement: 0.99,
            ppl_source: 10.0,
            ppl_converted: 11.0,
            tokens: 100,
            windows: 1,
            cached_vs_full_max_abs_dlogit: 1e-5,
        }
    }

    #[test]
    fn the_document_has_the_keys_that_scripts_rely_on() {
        let thresholds = Thresholds { max_abs_dlogit: Some(1e-4), ..Thresholds::default() };
        let json = serde_json::to_value(verification(thresholds)).expect("plain data");
        for key in [
            "schema_version",
            "max_abs_dlogit",
            "kl_nats_per_token",
            "top1_agreement",
            "ppl_source",
            "ppl_converted",
            "tokens",
            "cached_vs_full_max_abs_dlogit",
            "thresholds",
        ] {
            assert!(!json[key].is_null(), "{key}");
        }
        assert_eq!(json["passed"], false);
        assert_eq!(json["failed"][0]["measure"], "max_abs_dlogit");
    }

    #[test]
    fn a_figure_that_is_no_number_fails_without_thresholds() {
        let broken = Comparison { ppl_converted: f64::NAN, ..figures() };
        let v = Verification::new(("a", "b"), ("t", 2), broken, Thresholds::default(), "");
        assert!(!v.passed);
        assert!(verification(Thresholds::default()).passed);
    }
}

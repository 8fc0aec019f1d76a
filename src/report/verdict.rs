//! How close two models are: the documents of `verify` and `eval`.

use serde::Serialize;

use super::SCHEMA_VERSION;

/// What a comparison has to stay within; an absent limit is not checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Limits {
    /// Largest difference of any logit.
    pub max_dlogit: Option<f64>,
    /// Mean KL(source || converted), nats per token.
    pub max_kl: Option<f64>,
    /// Share of positions, in `[0, 1]`, whose likeliest token is the same.
    pub min_top1: Option<f64>,
    /// Perplexity of the converted model over that of the source.
    pub max_ppl_ratio: Option<f64>,
    /// Largest difference between logits of cached (one token at a time) and full decoding of the converted model.
    pub max_cached_vs_full: Option<f64>,
}

/// Result of `verify`.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Version of this document.
    pub schema_version: u32,
    /// Source model as the user named it.
    pub source: String,
    /// Converted model as the user named it.
    pub converted: String,
    /// Where the text came from.
    pub text: String,
    /// Tokens predicted.
    pub tokens: u64,
    /// Largest difference of any logit.
    pub max_abs_dlogit: f64,
    /// Mean KL(source || converted), nats per token.
    pub kl_nats_per_token: f64,
    /// Share of positions whose likeliest token is the same.
    pub top1_agreement: f64,
    /// Perplexity of the source.
    pub ppl_source: f64,
    /// Perplexity of the converted model.
    pub ppl_converted: f64,
    /// Largest difference between logits of cached and full decoding of the converted model.
    pub cached_vs_full_max_abs_dlogit: f64,
    /// Limits applied.
    pub thresholds: Limits,
    /// Why those limits, one sentence.
    pub thresholds_from: String,
    /// One sentence per limit that was not met.
    pub failed: Vec<String>,
    /// Whether every check held.
    pub passed: bool,
}

impl Verdict {
    /// `ln(ppl_converted / ppl_source)`: what conversion costs, nats per token.
    pub fn excess(&self) -> f64 {
        (self.ppl_converted / self.ppl_source).ln()
    }

    /// Apply `limits`: fills `thresholds`, `failed` and `passed`. A figure that is not finite fails whatever the limits.
    #[must_use]
    pub fn judged(mut self, limits: Limits, from: &str) -> Self {
        let mut failed = Vec::new();
        let figures = [
            ("max_abs_dlogit", self.max_abs_dlogit, limits.max_dlogit),
            ("kl_nats_per_token", self.kl_nats_per_token, limits.max_kl),
            ("ppl_source", self.ppl_source, None),
            ("ppl_converted", self.ppl_converted, None),
            ("ppl_converted / ppl_source", self.ppl_converted / self.ppl_source, limits.max_ppl_ratio),
            ("cached_vs_full_max_abs_dlogit", self.cached_vs_full_max_abs_dlogit, limits.max_cached_vs_full),
        ];
        for (name, value, limit) in figures {
            if !value.is_finite() {
                failed.push(format!("{name} is {value}"));
            } else if let Some(limit) = limit.filter(|l| value > *l) {
                failed.push(format!("{name} is {value:.6}, above {limit}"));
            }
        }
        match limits.min_top1 {
            Some(least) if self.top1_agreement < least => {
                failed.push(format!("top1_agreement is {:.6}, below {least}", self.top1_agreement));
            }
            _ if !self.top1_agreement.is_finite() => failed.push("top1_agreement is not a number".to_owned()),
            _ => {}
        }
        if self.tokens == 0 {
            failed.push("no token was compared".to_owned());
        }
        self.thresholds = limits;
        self.thresholds_from = from.to_owned();
        self.passed = failed.is_empty();
        self.failed = failed;
        self
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
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean negative log-likelihood, nats.
    pub nats_per_token: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Tokens per window.
    pub seq_len: usize,
    /// Windows.
    pub windows: usize,
}

impl Evaluation {
    /// A document from a perplexity.
    pub fn new(model: &str, text: &str, perplexity: f64, tokens: u64, seq_len: usize, windows: usize) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            model: model.to_owned(),
            text: text.to_owned(),
            perplexity,
            nats_per_token: perplexity.ln(),
            tokens,
            seq_len,
            windows,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::report) fn verdict() -> Verdict {
        Verdict {
            schema_version: SCHEMA_VERSION,
            source: "source".into(),
            converted: "converted".into(),
            text: "text".into(),
            tokens: 100,
            max_abs_dlogit: 1e-3,
            kl_nats_per_token: 1e-4,
            top1_agreement: 0.99,
            ppl_source: 10.0,
            ppl_converted: 11.0,
            cached_vs_full_max_abs_dlogit: 1e-5,
            thresholds: Limits::default(),
            thresholds_from: String::new(),
            failed: Vec::new(),
            passed: true,
        }
    }

    #[test]
    fn each_limit_is_checked_on_its_side() {
        let none = Limits::default();
        assert!(verdict().judged(none, "").passed);
        let cases = [
            Limits { max_dlogit: Some(9e-4), ..none },
            Limits { max_kl: Some(9e-5), ..none },
            Limits { min_top1: Some(0.991), ..none },
            Limits { max_ppl_ratio: Some(1.09), ..none },
            Limits { max_cached_vs_full: Some(9e-6), ..none },
        ];
        for limits in cases {
            let v = verdict().judged(limits, "");
            assert_eq!((v.passed, v.failed.len()), (false, 1), "{limits:?}");
        }
    }

    #[test]
    fn a_figure_that_is_no_number_never_passes() {
        for break_it in [
            |v: &mut Verdict| v.max_abs_dlogit = f64::NAN,
            |v: &mut Verdict| v.ppl_converted = f64::INFINITY,
            |v: &mut Verdict| v.top1_agreement = f64::NAN,
            |v: &mut Verdict| v.tokens = 0,
        ] {
            let mut v = verdict();
            break_it(&mut v);
            assert!(!v.judged(Limits::default(), "").passed);
        }
    }
}

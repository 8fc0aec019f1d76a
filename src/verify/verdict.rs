//! Thresholds, and whether they hold.

use serde::Serialize;

use super::Comparison;

/// What a conversion has to reach. `None` is not checked.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Thresholds {
    /// Largest `max_abs_dlogit`.
    pub max_abs_dlogit: Option<f64>,
    /// Largest `kl_nats_per_token`.
    pub kl: Option<f64>,
    /// Smallest `top1_agreement`, 0 to 1.
    pub top1: Option<f64>,
    /// Largest `ppl_converted / ppl_source`.
    pub ppl_ratio: Option<f64>,
    /// Largest `cached_vs_full_max_abs_dlogit`.
    pub cached_vs_full: Option<f64>,
}

/// A threshold that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Failure {
    /// Name of the measure, as in [`Comparison`]; `ppl_ratio` for the quotient.
    pub measure: &'static str,
    /// Measured.
    pub found: f64,
    /// Allowed: a maximum, for `top1_agreement` a minimum.
    pub allowed: f64,
}

/// Outcome of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Number of thresholds that were given.
    pub checked: usize,
    /// Those that do not hold.
    pub failures: Vec<Failure>,
}

impl Verdict {
    pub(super) fn new(c: &Comparison, t: &Thresholds) -> Self {
        let mut verdict = Self { checked: 0, failures: Vec::new() };
        verdict.check("max_abs_dlogit", c.max_abs_dlogit, t.max_abs_dlogit, |f, a| f <= a);
        verdict.check("kl_nats_per_token", c.kl_nats_per_token, t.kl, |f, a| f <= a);
        verdict.check("top1_agreement", c.top1_agreement, t.top1, |f, a| f >= a);
        verdict.check("ppl_ratio", c.ppl_converted / c.ppl_source, t.ppl_ratio, |f, a| f <= a);
        let cached = c.cached_vs_full_max_abs_dlogit;
        verdict.check("cached_vs_full_max_abs_dlogit", cached, t.cached_vs_full, |f, a| f <= a);
        verdict
    }

    /// Whether every threshold holds.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// `holds` is false for NaN on either side, so NaN fails.
    fn check(&mut self, measure: &'static str, found: f64, allowed: Option<f64>, holds: fn(f64, f64) -> bool) {
        let Some(allowed) = allowed else { return };
        self.checked += 1;
        if !holds(found, allowed) {
            self.failures.push(Failure { measure, found, allowed });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison() -> Comparison {
        Comparison {
            max_abs_dlogit: 0.5,
            kl_nats_per_token: 0.01,
            top1_agreement: 0.9,
            ppl_source: 10.0,
            ppl_converted: 11.0,
            tokens: 100,
            windows: 1,
            cached_vs_full_max_abs_dlogit: 1e-4,
        }
    }

    #[test]
    fn each_threshold_fails_on_its_own_side() {
        let met = Thresholds {
            max_abs_dlogit: Some(0.5),
            kl: Some(0.01),
            top1: Some(0.9),
            ppl_ratio: Some(1.11),
            cached_vs_full: Some(1e-4),
        };
        assert!(comparison().verdict(&met).passed());
        let missed = Thresholds {
            max_abs_dlogit: Some(0.49),
            kl: Some(0.009),
            top1: Some(0.91),
            ppl_ratio: Some(1.09),
            cached_vs_full: Some(9e-5),
        };
        let verdict = comparison().verdict(&missed);
        assert_eq!((verdict.checked, verdict.failures.len()), (5, 5));
        assert_eq!(comparison().verdict(&Thresholds::default()).checked, 0);
    }

    #[test]
    fn nan_never_passes() {
        let broken = Comparison { kl_nats_per_token: f64::NAN, top1_agreement: f64::NAN, ..comparison() };
        let thresholds = Thresholds { kl: Some(1.0), top1: Some(0.0), ..Thresholds::default() };
        assert_eq!(broken.verdict(&thresholds).failures.len(), 2);
    }
}

//! CARE in the MLA path (arXiv 2603.17946): rotated keys as TransMLA's RoRoPE, then the covariance-aware joint low rank.
//!
//! In HF orientation the factorisation of `[W_kN; W_v]` in the input covariance's metric is given by the left singular
//! vectors `U` of `W C~ W^T`: down-projection `U_r^T W`, up-projection `U_r` (algorithms.md 9.1), with the published
//! shrinkage `C~ = 0.99 C + 0.01 mean(diag C) I`.

use super::MethodError;
use super::transmla::{Converted, Metric, Settings};
use crate::arch::AttentionSource;
use crate::calibrate::Moments;

/// Convert one layer from the second moments of its input. `settings.balance` is not used.
///
/// # Errors
/// As [`super::transmla::convert`].
pub fn convert(source: &AttentionSource, moments: &Moments, settings: &Settings) -> Result<Converted, MethodError> {
    super::transmla::convert(source, moments, settings, Metric::Care)
}

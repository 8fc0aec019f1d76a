//! CARE in the MLA path (arXiv 2603.17946): rotated keys as TransMLA's RoRoPE, then the covariance-aware joint low rank.
//!
//! In HF orientation the factorisation of `[W_kN; W_v]` in the input covariance's metric is given by the left singular
//! vectors `U` of `W C~ W^T`: down-projection `U_r^T W`, up-projection `U_r` (docs/maths.md, section 9), with the published
//! shrinkage `C~ = 0.99 C + 0.01 mean(diag C) I`.

use super::Entry;
use super::transmla::{BALANCE_KV_RATIO, FREQFOLD, Metric, Rorope};

/// Registry line of the method.
pub const ENTRY: Entry = Entry {
    name: "care",
    options: &[&FREQFOLD, &BALANCE_KV_RATIO],
    make: |given| Ok(Rorope { metric: Metric::Care, ..Rorope::from_options(given)? }.into()),
};

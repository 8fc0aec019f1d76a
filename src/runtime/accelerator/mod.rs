//! What device backends share: keeping the first failure, guarding drivers, narrowing weights, cutting attention.

mod failure;
mod guard;
mod pack;
mod work;

pub(super) use failure::{Failure, FirstFailure};
pub(super) use guard::{guarded, panic_text};
pub(super) use pack::pack;
#[cfg(feature = "cuda")]
pub(super) use pack::pack_rounded;
#[cfg(feature = "gpu")]
pub(super) use work::RUN;
pub(super) use work::{Work, cut_into_runs, span_table};

/// Positions, rows and the like, for a kernel.
pub(super) fn words(values: impl Iterator<Item = usize>) -> Vec<u32> {
    values.map(|v| v as u32).collect()
}

//! Two models side by side on text: logits, next-token distributions, perplexity, and a verdict against thresholds.
//!
//! Models are streamed layer by layer, then the output head in blocks of rows: memory is two hidden states, one layer
//! and one block of logits of each model, whatever the size of the models. Sums run in a fixed order in f64, so the
//! figures do not depend on the number of threads.

mod compare;
mod defaults;
mod error;
mod perplexity;
mod rows;
mod sliced;
mod verdict;
mod windows;
mod xkv;

pub use compare::{Comparison, compare};
pub use defaults::{CACHED_VS_FULL, default_thresholds};
pub use error::VerifyError;
pub use perplexity::{Evaluation, perplexity};
pub use sliced::{SharedOut, SlicedComparison, SlicedFigures, compare_sliced};
pub use verdict::{Failure, Thresholds, Verdict};
pub use windows::windows_from_text;
use windows::windows_of;
pub use xkv::{XkvEvaluation, xkv_perplexity};

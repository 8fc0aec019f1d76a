//! From named tensors to a published model folder.
//!
//! Nothing appears under the output path before it is complete: a [`ShardPlan`] fixes every byte's place, a
//! [`Staging`] folder next to the output takes the files, a [`StagedWriter`] streams, hashes and syncs them, and one
//! rename publishes the folder. Whatever happens before that rename, the output path is as it was. A journal in the
//! staging folder tells a later run how far this one came.

mod error;
pub(crate) mod exact_json;
mod journal;
mod leftover;
mod lock;
pub(crate) mod manifest;
pub(crate) mod ops;
mod plan;
mod publish;
mod resume;
mod staging;
mod writer;

pub use error::WriteError;
pub use journal::JournalRecord;
pub use manifest::{MANIFEST, Manifest, ManifestReport, verify_manifest};
pub use plan::{PlannedShard, PlannedTensor, ShardPlan};
pub use publish::Published;
pub use resume::{Mark, Progress, verify_marks};
pub use staging::{Leftover, Staging, StagingOptions};
pub use writer::StagedWriter;

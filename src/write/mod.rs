//! From named tensors to a published model folder.
//!
//! Nothing appears under the output path before it is complete: a [`ShardPlan`] fixes every byte's place, a
//! [`Staging`] folder next to the output takes the files, a [`StagedWriter`] streams, hashes and syncs them, and one
//! rename publishes the folder. Whatever happens before that rename, the output path is as it was.

mod error;
mod lock;
mod manifest;
mod plan;
mod publish;
mod staging;
mod writer;

pub use error::WriteError;
pub use manifest::{MANIFEST, Manifest, ManifestReport, verify_manifest};
pub use plan::{PlacedTensor, PlannedShard, PlannedTensor, ShardPlan};
pub use publish::Published;
pub use staging::{Staging, StagingOptions};
pub use writer::StagedWriter;

//! Rotating and slicing the latents of MLA checkpoints (TPLA, arXiv 2508.15881; docs/maths.md, 11 and 12; docs/tpla.md).
//!
//! Under tensor parallelism every rank of a plain MLA model caches the whole latent. TPLA gives each of `T` ranks a slice of
//! it, and each rank attends by its slice alone. How much that costs depends on the coordinates the latent is sliced in,
//! and those are free: an orthogonal matrix folds into the weights around the latent, exactly.

mod fold;
mod held;
mod refit;
mod rotate;
mod shard;
mod slicing;
mod statistics;
mod transform;
mod weights;

pub use fold::{LatentWeights, common_gain};
pub use held::Held;
pub use refit::{predict_keys, refit_values, refitted_ranks};
pub use rotate::{
    ROTATION_FILE, ROTATION_SCHEMA, RotateSettings, RotatedLayer, RotationExtras, RotationReport, rotate,
};
pub use shard::{RankEntry, SHARDS_FILE, SHARDS_SCHEMA, ShardReport, ShardSettings, ShardedLayer, shard};
pub use slicing::{Sharing, rms_corrections};
pub use statistics::{LatentMoments, latent_moments, latent_windows};
pub use transform::{LatentTransform, Transform, principal, transform_of};
pub use weights::{check_slices, need_mla};

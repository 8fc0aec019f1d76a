//! Widths of an MLA layer.

use serde::{Deserialize, Serialize};

/// Widths of the MLA layer that will be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Geometry {
    pub kv_lora_rank: usize,
    pub q_lora_rank: Option<usize>,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
}

impl Geometry {
    /// These widths with another split of the cache.
    #[must_use]
    pub fn with_split(self, split: Split) -> Self {
        Self { kv_lora_rank: split.rank, qk_rope_head_dim: split.rope, ..self }
    }
}

/// Widths of the cached key and latent, values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// `d_R`.
    pub rope: usize,
    /// `r`.
    pub rank: usize,
}

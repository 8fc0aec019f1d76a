//! Keys and values as compressors of caches see them: before RoPE, and of a latent before its norm.

use ndarray::{Array2, s};

use super::{AttentionBlock, Kind};
use crate::runtime::{Backend, RuntimeError};

/// What a cache is made of, one row per token, before position enters.
///
/// RoPE gives every token another basis, and the norm of a latent another factor: both spoil low rank, so xKV (arXiv
/// 2503.18893) works on these matrices and applies RoPE and norm to what it reconstructs.
#[derive(Debug, Clone, PartialEq)]
pub struct RawKv {
    /// GQA: keys, after a norm of keys where there is one, `[T, g d]`. MLA: latents before their norm, `[T, r]`.
    pub keys: Array2<f32>,
    /// GQA: values, `[T, g d]`. MLA has none: they come from the latent.
    pub values: Option<Array2<f32>>,
    /// MLA: the shared key before RoPE, `[T, d_R]`.
    pub rope_key: Option<Array2<f32>>,
}

impl<B: Backend> AttentionBlock<B> {
    /// [`RawKv`] of attention inputs `x [T, D]`.
    pub(in crate::runtime) fn raw(&self, backend: &B, x: &B::Tensor) -> Result<RawKv, RuntimeError> {
        match &self.kind {
            Kind::Gqa(a) => {
                let mut keys = a.k.apply(backend, x);
                if let Some(norm) = &a.norm {
                    norm.keys(backend, &mut keys, 0, a.shape.head_dim, a.shape.kv_heads)?;
                }
                let values = backend.download(a.v.apply(backend, x))?;
                Ok(RawKv { keys: backend.download(keys)?, values: Some(values), rope_key: None })
            }
            Kind::Mla(a) => {
                let (rank, rope) = (a.shape.kv_lora_rank, a.shape.qk_rope_head_dim);
                let mut both = a.kv_a.apply(backend, x);
                if let Some(norm) = &a.norm {
                    norm.keys(backend, &mut both, rank, a.shape.norm_width, rope / a.shape.norm_width)?;
                }
                let both = backend.download(both)?;
                let part = |columns| both.slice(s![.., columns]).to_owned();
                Ok(RawKv { keys: part(0..rank), values: None, rope_key: Some(part(rank..rank + rope)) })
            }
        }
    }
}

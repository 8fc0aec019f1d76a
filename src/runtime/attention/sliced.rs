//! Latent attention as `T` ranks decode it: TPLA (arXiv 2508.15881; docs/maths.md, section 12).
//!
//! Rank `t` caches the coordinates `S_t` of the latent and, like every rank, the rotated key. It attends for all heads by
//! its slice alone, with a softmax of its own, and the ranks' outputs are summed, which is the one all-reduce of a layer:
//!
//! ```text
//! p_t = softmax_j( alpha ( <q^N, UK_t c_{j,S_t}> + <q^R, k^R_j> ) )
//! o   = sum_t UV_t sum_j p_t(j) c_{j,S_t}
//! ```
//!
//! Where all `p_t` were the same this would be the attention of the whole latent; that they are not is the approximation.
//! `o_proj` is linear, so summing before it is the same as summing after it. Prompts are not sliced: they are run by
//! the layer's own attention (`prefill`).

use std::ops::Range;

use ndarray::Array2;

use super::{
    AttentionBlock, Backend, HeadColumns, HeadPart, Kind, Mla, Rotation, RuntimeError, Span, check, core, vector,
};
use crate::runtime::AttentionShape;

/// What one rank holds of what the ranks of a layer share out.
#[derive(Debug, Clone, PartialEq)]
pub struct RankTensors {
    /// Coordinates of the latent that it caches, `S_t`.
    pub columns: Range<usize>,
    /// Gain of the latent's norm there, `[r / T]`; read where a rank norms its slice by itself.
    pub gain: Vec<f32>,
    /// `[UK_t; UV_t]` head by head: `kv_b_proj` of the slice, `[H (d_N + d_V), r / T]`.
    pub kv_b: Array2<f32>,
}

/// The ranks of a layer on a backend.
pub struct Ranks<B: Backend> {
    ranks: Vec<Rank<B>>,
    shared_rms: bool,
}

impl<B: Backend> std::fmt::Debug for Ranks<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranks").field("ranks", &self.ranks.len()).field("shared_rms", &self.shared_rms).finish()
    }
}

struct Rank<B: Backend> {
    columns: Range<usize>,
    gain: Option<B::Tensor>,
    kv_b: B::Weight,
}

/// Rows of some windows: what they attend with, and what they leave in a cache.
pub(in crate::runtime) struct LatentRows<T> {
    /// Queries, `[T, H (d_N + d_R)]`, rotated.
    queries: T,
    /// The normed latent and the rotated key, `[T, r + d_R]`.
    whole: T,
    /// The latent before its norm, `[T, r]`, where ranks norm their slices.
    raw: Option<T>,
}

impl<B: Backend> AttentionBlock<B> {
    fn mla(&self) -> Result<&Mla<B>, RuntimeError> {
        match &self.kind {
            Kind::Mla(mla) => Ok(mla),
            Kind::Gqa(_) => Err(RuntimeError::Variant { expected: "mla", found: "gqa" }),
        }
    }

    /// Put the ranks of this layer on a backend. With `shared_rms` every rank knows the whole latent's root mean square, else
    /// each norms its slice by the slice's own.
    pub(in crate::runtime) fn ranks(
        &self,
        backend: &B,
        tensors: Vec<RankTensors>,
        shared_rms: bool,
    ) -> Result<Ranks<B>, RuntimeError> {
        let s = &self.mla()?.shape;
        let rows = self.mla()?.heads * (s.qk_nope_head_dim + s.v_head_dim);
        let rank = |t: RankTensors| {
            let width = t.columns.len();
            check("kv_b of a rank", &[rows, width], t.kv_b.shape())?;
            if t.columns.end > s.kv_lora_rank {
                return Err(RuntimeError::Shape {
                    role: "slice of the latent",
                    expected: vec![s.kv_lora_rank],
                    found: vec![t.columns.end],
                });
            }
            let gain = match s.latent_norm {
                true => Some(vector(backend, "kv_a_norm of a rank", t.gain, width)?),
                false => None,
            };
            Ok(Rank { columns: t.columns, gain, kv_b: backend.upload_weight(t.kv_b.into()) })
        };
        Ok(Ranks { ranks: tensors.into_iter().map(rank).collect::<Result<_, _>>()?, shared_rms })
    }

    /// What rows `x [T, D]` attend with and leave behind.
    pub(in crate::runtime) fn latent_rows(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
        ranks: &Ranks<B>,
    ) -> Result<LatentRows<B::Tensor>, RuntimeError> {
        let mla = self.mla()?;
        let rank = mla.shape.kv_lora_rank;
        // Without a norm the latent is what it is.
        let own = !ranks.shared_rms && mla.shape.latent_norm;
        let raw = own.then(|| {
            let both = mla.kv_a.apply(backend, x);
            backend.gather_heads(&[HeadPart { from: &both, columns: HeadColumns::dense(rank) }], 1)
        });
        Ok(LatentRows {
            queries: mla.queries(backend, x, rotation, positions)?,
            whole: mla.latent(backend, x, rotation, positions)?,
            raw,
        })
    }

    /// The layer's own attention among some rows: head outputs of rows `rows`, windows as `spans` has them.
    pub(in crate::runtime) fn attend_whole(
        &self,
        backend: &B,
        all: &LatentRows<B::Tensor>,
        rows: &[usize],
        spans: &[Span],
    ) -> Result<B::Tensor, RuntimeError> {
        let queries = backend.gather_rows(&all.queries, rows)?;
        let cached = backend.gather_rows(&all.whole, rows)?;
        let expanded = self.mla()?.expand(backend, queries, &cached);
        self.attend(backend, &expanded, spans)
    }

    /// What each rank caches of some rows: `[T, r/T + d_R]`.
    pub(in crate::runtime) fn sliced_rows(
        &self,
        backend: &B,
        all: &LatentRows<B::Tensor>,
        ranks: &Ranks<B>,
    ) -> Result<Vec<B::Tensor>, RuntimeError> {
        let s = &self.mla()?.shape;
        let rope = HeadColumns { start: s.kv_lora_rank, stride: 0, width: s.qk_rope_head_dim };
        let slice = |rank: &Rank<B>| {
            let columns = HeadColumns { start: rank.columns.start, stride: 0, width: rank.columns.len() };
            let (own, columns) = match (&all.raw, &rank.gain) {
                (Some(raw), Some(gain)) => {
                    let part = backend.gather_heads(&[HeadPart { from: raw, columns }], 1);
                    let normed = backend.rms_norm(&part, gain, s.latent_eps);
                    (Some(normed), HeadColumns::dense(columns.width))
                }
                _ => (None, columns),
            };
            let from = own.as_ref().unwrap_or(&all.whole);
            backend.gather_heads(&[HeadPart { from, columns }, HeadPart { from: &all.whole, columns: rope }], 1)
        };
        Ok(ranks.ranks.iter().map(slice).collect())
    }

    /// What the queries of `rows` pool from each rank's cache, `sum_j p_t(j) c_{j,S_t}`: `[rows, H r / T]` per rank.
    pub(in crate::runtime) fn pool_sliced(
        &self,
        backend: &B,
        all: &LatentRows<B::Tensor>,
        rows: &[usize],
        caches: &[B::Tensor],
        ranks: &Ranks<B>,
        spans: &[Span],
    ) -> Result<Vec<B::Tensor>, RuntimeError> {
        let mla = self.mla()?;
        let s = &mla.shape;
        let (nope, rope, value) = (s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim);
        let queries = backend.gather_rows(&all.queries, rows)?;
        let plain = HeadColumns { start: 0, stride: mla.qk(), width: nope };
        let plain = backend.gather_heads(&[HeadPart { from: &queries, columns: plain }], mla.heads);
        let key_rows = HeadColumns { start: 0, stride: nope + value, width: nope };
        let pool = |(rank, cached): (&Rank<B>, &B::Tensor)| {
            let width = rank.columns.len();
            let absorbed = backend.head_linear(&plain, &rank.kv_b, key_rows, mla.heads, true);
            let parts = [
                HeadPart { from: &absorbed, columns: HeadColumns::dense(width) },
                HeadPart { from: &queries, columns: mla.rotated_query() },
            ];
            let q = backend.gather_heads(&parts, mla.heads);
            let shape = AttentionShape {
                heads: mla.heads,
                kv_heads: 1,
                keys: HeadColumns { start: 0, stride: 0, width: width + rope },
                values: HeadColumns { start: 0, stride: 0, width },
                scale: s.score_scale,
                sliding_window: mla.window,
            };
            core(backend, self.cap, (&q, cached, cached), &shape, spans)
        };
        ranks.ranks.iter().zip(caches).map(pool).collect()
    }

    /// Attention of the queries of `rows` over the ranks' caches, summed over the ranks: `[rows, H d_V]`.
    pub(in crate::runtime) fn attend_sliced(
        &self,
        backend: &B,
        all: &LatentRows<B::Tensor>,
        rows: &[usize],
        caches: &[B::Tensor],
        ranks: &Ranks<B>,
        spans: &[Span],
    ) -> Result<B::Tensor, RuntimeError> {
        let mla = self.mla()?;
        let (nope, value) = (mla.shape.qk_nope_head_dim, mla.shape.v_head_dim);
        let value_rows = HeadColumns { start: nope, stride: nope + value, width: value };
        let mut sum = backend.zeros(rows.len(), mla.heads * value);
        for (rank, pooled) in ranks.ranks.iter().zip(self.pool_sliced(backend, all, rows, caches, ranks, spans)?) {
            backend.add(&mut sum, &backend.head_linear(&pooled, &rank.kv_b, value_rows, mla.heads, false));
        }
        Ok(sum)
    }
}

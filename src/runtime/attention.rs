//! The two attention variants on a backend: projections, cores and caches.

mod compressed;
mod projection;
mod raw;
mod sliced;

pub(super) use compressed::{CompressedPrompt, Factored};
use projection::check;
pub(super) use projection::{Projection, vector, vector_of};
pub use raw::RawKv;
pub use sliced::{RankTensors, Ranks};

use super::tensors::{AttentionTensors, GqaTensors, LayerExtras, MlaTensors, QueryTensors};
use super::{AttentionShape, Backend, HeadColumns, HeadPart, HostWeight, Rotation, RuntimeError, Span};
use crate::arch::{Architecture, Attention, GqaShape, MlaShape, QkNormScope};

/// Queries, keys and values of every head, rotated.
pub(super) struct Expanded<T> {
    /// `[T, H d_qk]`.
    pub q: T,
    /// `[S, kv_heads d_qk]`.
    pub k: T,
    /// `[S, ..]`, columns as `shape.values` says.
    pub v: T,
    pub shape: AttentionShape,
}

/// What decoding keeps of earlier tokens, one row per position.
pub(super) enum Cache<T> {
    /// Rotated keys and values, `[capacity, g d]` each.
    Gqa { k: T, v: T },
    /// `[capacity, r + d_R]`: the normed latent, then the rotated shared key.
    Mla(T),
}

impl<T> Cache<T> {
    /// Bytes allocated.
    pub(super) fn bytes<B: Backend<Tensor = T>>(&self, backend: &B) -> usize {
        let of = |t: &T| {
            let (rows, columns) = backend.shape(t);
            rows * columns * size_of::<f32>()
        };
        match self {
            Cache::Gqa { k, v } => of(k) + of(v),
            Cache::Mla(rows) => of(rows),
        }
    }
}

/// How decoding reads an MLA cache. Both are the same function; they differ in cost and rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LatentPath {
    /// Attention over the latent itself, `kv_b` folded into queries and outputs: cost per key `H (2 r + d_R)`.
    Absorbed,
    /// Expand keys and values of all cached rows first: cheaper once there are many query rows.
    Expanded,
}

/// New rows of a session: where they go, and how they are turned.
pub(super) struct Step<'a> {
    /// Table over at least the new positions.
    pub rotation: &'a Rotation,
    /// Position of each new row in its sequence.
    pub positions: &'a [usize],
    /// Cache row of each new row.
    pub slots: &'a [usize],
    /// New rows of each sequence, and all its cache rows, the new ones included.
    pub spans: &'a [Span],
    pub path: LatentPath,
}

impl Step<'_> {
    /// Cache rows of all spans under each other, and the spans over them.
    fn gather<B: Backend>(&self, backend: &B, cache: &B::Tensor) -> (B::Tensor, Vec<Span>) {
        let mut spans = Vec::with_capacity(self.spans.len());
        let mut total = 0;
        for span in self.spans {
            spans.push(Span { queries: span.queries.clone(), keys: total..total + span.keys.len() });
            total += span.keys.len();
        }
        if let [only] = self.spans {
            return (backend.rows(cache, only.keys.clone()), spans);
        }
        let mut rows = backend.zeros(total, backend.shape(cache).1);
        for (to, from) in spans.iter().zip(self.spans) {
            let to: Vec<usize> = to.keys.clone().collect();
            backend.write_rows(&mut rows, &to, &backend.rows(cache, from.keys.clone()));
        }
        (rows, spans)
    }
}

/// Norms of queries and keys before RoPE.
struct QkNorm<T> {
    scope: QkNormScope,
    q: T,
    k: T,
    q_eps: f64,
    k_eps: f64,
}

impl<T> QkNorm<T> {
    fn new<B: Backend<Tensor = T>>(
        backend: &B,
        arch: &Architecture,
        extras: &LayerExtras,
        widths: (usize, usize),
    ) -> Result<Option<Self>, RuntimeError> {
        let (Some(scope), Some(q), Some(k)) = (arch.qk_norm, &extras.q_norm, &extras.k_norm) else { return Ok(None) };
        let mut q = q.clone();
        let (mut q_eps, k_eps) = (arch.norm_eps, arch.norm_eps);
        if let (Some(shape), QkNormScope::All) = (arch.mla(), scope) {
            // The mean is over the source's values; the others in the rotated width of each head are zero.
            let share = shape.norm_width as f64 / shape.qk_rope_head_dim as f64;
            q_eps *= share;
            q.iter_mut().for_each(|g| *g = (f64::from(*g) * share.sqrt()) as f32);
        }
        let q = vector(backend, "q_norm", q, widths.0)?;
        Ok(Some(Self { scope, q, k: vector(backend, "k_norm", k.clone(), widths.1)?, q_eps, k_eps }))
    }

    /// Norm queries, of `heads` blocks of `width`.
    fn queries<B: Backend<Tensor = T>>(
        &self,
        b: &B,
        q: &mut T,
        width: usize,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        match self.scope {
            QkNormScope::Head => b.rms_norm_heads(q, &self.q, self.q_eps, HeadColumns::dense(width), heads),
            QkNormScope::All => {
                *q = b.rms_norm(q, &self.q, self.q_eps);
                Ok(())
            }
        }
    }

    /// Norm keys, `heads` blocks of `width` from column `start`.
    fn keys<B: Backend<Tensor = T>>(
        &self,
        b: &B,
        k: &mut T,
        start: usize,
        width: usize,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        let (width, heads) = match self.scope {
            QkNormScope::Head => (width, heads),
            QkNormScope::All => (width * heads, 1),
        };
        b.rms_norm_heads(k, &self.k, self.k_eps, HeadColumns { start, stride: width, width }, heads)
    }
}

/// Attention of one layer.
pub(super) struct AttentionBlock<B: Backend> {
    kind: Kind<B>,
    /// Cap of the scores.
    cap: Option<f64>,
}

enum Kind<B: Backend> {
    Gqa(Gqa<B>),
    Mla(Mla<B>),
}

impl<B: Backend> AttentionBlock<B> {
    pub(super) fn new(
        backend: &B,
        arch: &Architecture,
        tensors: AttentionTensors<HostWeight>,
        extras: &LayerExtras,
    ) -> Result<Self, RuntimeError> {
        let kind = match (&arch.attention, tensors) {
            (Attention::Gqa(shape), AttentionTensors::Gqa(t)) => Kind::Gqa(Gqa::new(backend, arch, *shape, t, extras)?),
            (Attention::Mla(shape), AttentionTensors::Mla(t)) => Kind::Mla(Mla::new(backend, arch, *shape, t, extras)?),
            (Attention::Gqa(_), _) => return Err(RuntimeError::Variant { expected: "gqa", found: "mla" }),
            (Attention::Mla(_), _) => return Err(RuntimeError::Variant { expected: "mla", found: "gqa" }),
        };
        Ok(Self { kind, cap: arch.score_softcap })
    }

    /// Cap of the scores.
    pub(super) fn cap(&self) -> Option<f64> {
        self.cap
    }

    /// Project and rotate: `x [T, D]`, one position per row.
    pub(super) fn expand(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
    ) -> Result<Expanded<B::Tensor>, RuntimeError> {
        match &self.kind {
            Kind::Gqa(a) => a.expand(backend, x, rotation, positions),
            Kind::Mla(a) => {
                let latent = a.latent(backend, x, rotation, positions)?;
                let q = a.queries(backend, x, rotation, positions)?;
                Ok(a.expand(backend, q, &latent))
            }
        }
    }

    /// What MLA caches: `[T, r + d_R]`.
    pub(super) fn latents(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
    ) -> Result<B::Tensor, RuntimeError> {
        match &self.kind {
            Kind::Mla(a) => a.latent(backend, x, rotation, positions),
            Kind::Gqa(_) => Err(RuntimeError::Variant { expected: "mla", found: "gqa" }),
        }
    }

    /// Attention over expanded keys and values: head outputs.
    pub(super) fn attend(
        &self,
        backend: &B,
        all: &Expanded<B::Tensor>,
        spans: &[Span],
    ) -> Result<B::Tensor, RuntimeError> {
        core(backend, self.cap, (&all.q, &all.k, &all.v), &all.shape, spans)
    }

    pub(super) fn output(&self, backend: &B, heads: &B::Tensor) -> B::Tensor {
        match &self.kind {
            Kind::Gqa(a) => a.o.apply(backend, heads),
            Kind::Mla(a) => a.o.apply(backend, heads),
        }
    }

    /// Width of the head outputs, `H d_V`.
    pub(super) fn heads_width(&self) -> usize {
        match &self.kind {
            Kind::Gqa(a) => a.heads * a.shape.head_dim,
            Kind::Mla(a) => a.heads * a.shape.v_head_dim,
        }
    }

    pub(super) fn cache(&self, backend: &B, capacity: usize) -> Cache<B::Tensor> {
        match &self.kind {
            Kind::Gqa(a) => {
                let width = a.shape.kv_heads * a.shape.head_dim;
                Cache::Gqa { k: backend.zeros(capacity, width), v: backend.zeros(capacity, width) }
            }
            Kind::Mla(a) => Cache::Mla(backend.zeros(capacity, a.shape.kv_lora_rank + a.shape.qk_rope_head_dim)),
        }
    }

    /// Append rows to the cache and attend from them to all of it: `x [new, D]` to head outputs `[new, H d_V]`.
    pub(super) fn decode(
        &self,
        backend: &B,
        x: &B::Tensor,
        cache: &mut Cache<B::Tensor>,
        step: &Step<'_>,
    ) -> Result<B::Tensor, RuntimeError> {
        match (&self.kind, cache) {
            (Kind::Gqa(a), Cache::Gqa { k, v }) => {
                let new = a.expand(backend, x, step.rotation, step.positions)?;
                backend.write_rows(k, step.slots, &new.k);
                backend.write_rows(v, step.slots, &new.v);
                core(backend, self.cap, (&new.q, k, v), &new.shape, step.spans)
            }
            (Kind::Mla(a), Cache::Mla(rows)) => {
                let latent = a.latent(backend, x, step.rotation, step.positions)?;
                backend.write_rows(rows, step.slots, &latent);
                let q = a.queries(backend, x, step.rotation, step.positions)?;
                match step.path {
                    LatentPath::Absorbed => a.attend_latent(backend, self.cap, &q, rows, step.spans),
                    LatentPath::Expanded => {
                        let (cached, spans) = step.gather(backend, rows);
                        let all = a.expand(backend, q, &cached);
                        self.attend(backend, &all, &spans)
                    }
                }
            }
            (Kind::Gqa(_), _) => Err(RuntimeError::Variant { expected: "gqa", found: "mla" }),
            (Kind::Mla(_), _) => Err(RuntimeError::Variant { expected: "mla", found: "gqa" }),
        }
    }
}

/// Softmax attention, with capped scores where there is a cap.
fn core<B: Backend>(
    backend: &B,
    cap: Option<f64>,
    (q, k, v): (&B::Tensor, &B::Tensor, &B::Tensor),
    shape: &AttentionShape,
    spans: &[Span],
) -> Result<B::Tensor, RuntimeError> {
    match cap {
        None => Ok(backend.attention(q, k, v, shape, spans)),
        Some(cap) => backend.capped_attention(q, k, v, shape, cap, spans),
    }
}

/// Grouped-query attention.
pub(super) struct Gqa<B: Backend> {
    heads: usize,
    shape: GqaShape,
    q: Projection<B>,
    k: Projection<B>,
    v: Projection<B>,
    o: Projection<B>,
    norm: Option<QkNorm<B::Tensor>>,
    window: Option<usize>,
}

impl<B: Backend> Gqa<B> {
    fn new(
        backend: &B,
        arch: &Architecture,
        shape: GqaShape,
        t: GqaTensors<HostWeight>,
        extras: &LayerExtras,
    ) -> Result<Self, RuntimeError> {
        let (heads, hidden) = (arch.heads, arch.hidden);
        let (q, kv) = (heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let widths = match arch.qk_norm {
            Some(QkNormScope::All) => (q, kv),
            _ => (shape.head_dim, shape.head_dim),
        };
        Ok(Self {
            heads,
            shape,
            norm: QkNorm::new(backend, arch, extras, widths)?,
            window: extras.window,
            q: Projection::new(backend, "q", t.q, q, hidden)?,
            k: Projection::new(backend, "k", t.k, kv, hidden)?,
            v: Projection::new(backend, "v", t.v, kv, hidden)?,
            o: Projection::new(backend, "o", t.o, hidden, q)?,
        })
    }

    fn expand(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
    ) -> Result<Expanded<B::Tensor>, RuntimeError> {
        let (d, kv_heads) = (self.shape.head_dim, self.shape.kv_heads);
        let columns = HeadColumns::dense(d);
        let turned = HeadColumns { width: self.shape.rotary_dim, ..columns };
        let mut q = self.q.apply(backend, x);
        let mut k = self.k.apply(backend, x);
        let v = self.v.apply(backend, x);
        if let Some(norm) = &self.norm {
            norm.queries(backend, &mut q, d, self.heads)?;
            norm.keys(backend, &mut k, 0, d, kv_heads)?;
        }
        backend.rope(&mut q, rotation, positions, turned, self.heads);
        backend.rope(&mut k, rotation, positions, turned, kv_heads);
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: self.shape.kv_heads,
            keys: columns,
            values: columns,
            scale: self.shape.score_scale,
            sliding_window: self.window,
        };
        Ok(Expanded { q, k, v, shape })
    }
}

/// The query path of MLA.
enum Query<B: Backend> {
    Direct(Projection<B>),
    LowRank { a: Projection<B>, norm: Option<B::Tensor>, b: Projection<B> },
}

/// Multi-head latent attention.
pub(super) struct Mla<B: Backend> {
    heads: usize,
    shape: MlaShape,
    query: Query<B>,
    kv_a: Projection<B>,
    kv_a_norm: Option<B::Tensor>,
    kv_b: Projection<B>,
    o: Projection<B>,
    norm: Option<QkNorm<B::Tensor>>,
    window: Option<usize>,
}

impl<B: Backend> Mla<B> {
    fn new(
        backend: &B,
        arch: &Architecture,
        shape: MlaShape,
        t: MlaTensors<HostWeight>,
        extras: &LayerExtras,
    ) -> Result<Self, RuntimeError> {
        let gain = |role: &'static str, values: Vec<f32>, len: usize| match shape.latent_norm {
            true => vector(backend, role, values, len).map(Some),
            false => Ok(None),
        };
        let (heads, hidden, rank) = (arch.heads, arch.hidden, shape.kv_lora_rank);
        let q = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim);
        let query = match t.query {
            QueryTensors::Direct(linear) => Query::Direct(Projection::new(backend, "q", linear, q, hidden)?),
            QueryTensors::LowRank { a, norm, b } => {
                let rank = a.weight.shape().0;
                Query::LowRank {
                    a: Projection::new(backend, "q_a", a, rank, hidden)?,
                    norm: gain("q_a_norm", norm, rank)?,
                    b: Projection::new(backend, "q_b", b, q, rank)?,
                }
            }
        };
        let kv = heads * (shape.qk_nope_head_dim + shape.v_head_dim);
        if let Some(bias) = &t.kv_b.bias {
            // It could not be absorbed, and no stock class has one.
            return Err(RuntimeError::Shape { role: "kv_b bias", expected: vec![], found: vec![bias.len()] });
        }
        Ok(Self {
            heads,
            shape,
            query,
            kv_a: Projection::new(backend, "kv_a", t.kv_a, rank + shape.qk_rope_head_dim, hidden)?,
            kv_a_norm: gain("kv_a_norm", t.kv_a_norm, rank)?,
            norm: QkNorm::new(backend, arch, extras, arch.mla_norm_widths(&shape))?,
            window: extras.window,
            kv_b: Projection::new(backend, "kv_b", t.kv_b, kv, rank)?,
            o: Projection::new(backend, "o", t.o, hidden, heads * shape.v_head_dim)?,
        })
    }

    /// Width of a query or key, `d_N + d_R`.
    fn qk(&self) -> usize {
        self.shape.qk_nope_head_dim + self.shape.qk_rope_head_dim
    }

    /// Queries `[T, H (d_N + d_R)]`, the last `d_R` of each head rotated.
    fn queries(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
    ) -> Result<B::Tensor, RuntimeError> {
        let mut q = match &self.query {
            Query::Direct(q) => q.apply(backend, x),
            Query::LowRank { a, norm, b } => {
                let mut latent = a.apply(backend, x);
                if let Some(norm) = norm {
                    latent = backend.rms_norm(&latent, norm, self.shape.latent_eps);
                }
                b.apply(backend, &latent)
            }
        };
        if let Some(norm) = &self.norm {
            let width = self.shape.norm_width;
            norm.queries(backend, &mut q, width, self.heads * self.shape.qk_rope_head_dim / width)?;
        }
        backend.rope(&mut q, rotation, positions, self.rotated_query(), self.heads);
        Ok(q)
    }

    fn rotated_query(&self) -> HeadColumns {
        HeadColumns { start: self.shape.qk_nope_head_dim, stride: self.qk(), width: self.shape.qk_rope_head_dim }
    }

    /// What is cached per token: `[T, r + d_R]`, normed latent and rotated key.
    fn latent(
        &self,
        backend: &B,
        x: &B::Tensor,
        rotation: &Rotation,
        positions: &[usize],
    ) -> Result<B::Tensor, RuntimeError> {
        let (rank, rope) = (self.shape.kv_lora_rank, self.shape.qk_rope_head_dim);
        let mut both = self.kv_a.apply(backend, x);
        let rotated = HeadColumns { start: rank, stride: 0, width: rope };
        if let Some(norm) = &self.norm {
            norm.keys(backend, &mut both, rank, self.shape.norm_width, rope / self.shape.norm_width)?;
        }
        backend.rope(&mut both, rotation, positions, rotated, 1);
        if let Some(gain) = &self.kv_a_norm {
            backend.rms_norm_heads(&mut both, gain, self.shape.latent_eps, HeadColumns::dense(rank), 1)?;
        }
        Ok(both)
    }

    /// Keys and values of every head from cached rows.
    fn expand(&self, backend: &B, q: B::Tensor, cached: &B::Tensor) -> Expanded<B::Tensor> {
        let s = &self.shape;
        let (rank, nope, value) = (s.kv_lora_rank, s.qk_nope_head_dim, s.v_head_dim);
        let latent = backend.gather_heads(&[HeadPart { from: cached, columns: HeadColumns::dense(rank) }], 1);
        let v = self.kv_b.apply(backend, &latent);
        let parts = [
            HeadPart { from: &v, columns: HeadColumns { start: 0, stride: nope + value, width: nope } },
            HeadPart { from: cached, columns: HeadColumns { start: rank, stride: 0, width: s.qk_rope_head_dim } },
        ];
        let k = backend.gather_heads(&parts, self.heads);
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: self.heads,
            keys: HeadColumns::dense(self.qk()),
            values: HeadColumns { start: nope, stride: nope + value, width: value },
            scale: s.score_scale,
            sliding_window: self.window,
        };
        Expanded { q, k, v, shape }
    }

    /// Absorbed attention: `q [T, H (d_N + d_R)]` over `cached [S, r + d_R]` to `[T, H d_V]`.
    fn attend_latent(
        &self,
        backend: &B,
        cap: Option<f64>,
        q: &B::Tensor,
        cached: &B::Tensor,
        spans: &[Span],
    ) -> Result<B::Tensor, RuntimeError> {
        let (q, shape) = self.absorb(backend, q);
        let mixed = core(backend, cap, (&q, cached, cached), &shape, spans)?;
        Ok(self.unabsorb(backend, &mixed))
    }

    /// Queries for cached rows: `q [T, H (d_N + d_R)]` to `[T, H (r + d_R)]`, and how they attend.
    fn absorb(&self, backend: &B, q: &B::Tensor) -> (B::Tensor, AttentionShape) {
        let s = &self.shape;
        let (rank, nope, rope, value) = (s.kv_lora_rank, s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim);
        let key_rows = HeadColumns { start: 0, stride: nope + value, width: nope };
        let q = backend.absorb(q, &self.kv_b.weight, key_rows, self.heads);
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: 1,
            keys: HeadColumns { start: 0, stride: 0, width: rank + rope },
            values: HeadColumns { start: 0, stride: 0, width: rank },
            scale: s.score_scale,
            sliding_window: self.window,
        };
        (q, shape)
    }

    /// Head outputs `[T, H d_V]` of mixed latents `[T, H r]`.
    fn unabsorb(&self, backend: &B, mixed: &B::Tensor) -> B::Tensor {
        let (nope, value) = (self.shape.qk_nope_head_dim, self.shape.v_head_dim);
        let value_rows = HeadColumns { start: nope, stride: nope + value, width: value };
        backend.head_linear(mixed, &self.kv_b.weight, value_rows, self.heads, false)
    }
}

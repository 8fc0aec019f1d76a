//! Attention tensors of a converted layer: one list of names, dtypes, shapes and contents, from which the plan and the values
//! are made (docs/targets.md, sections 1 to 5).

use std::borrow::Cow;

use ndarray::{Array1, Array2, Axis, s};

use super::neutral::{Carried, Latent, Plain};
use super::spec::TargetSpec;
use super::{OutTensor, pad};
use crate::arch::Architecture;
use crate::mla::MlaLayer;
use crate::source::Dtype;
use crate::write::PlannedTensor;

/// An attention tensor of any layer.
#[derive(Debug, Clone)]
pub struct AttentionTensor {
    /// Name within the layer's attention.
    pub name: &'static str,
    /// Dtype.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// What it holds.
    pub holds: Holds,
}

/// What an attention tensor holds; a layer has each at most once. `d_N`, `d_R` and `d_V` are the widths of a head without and
/// with rotation and of its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// From the latent of the queries, or the input, to the queries: `[H (d_N + d_R), r_q or D]`.
    Queries,
    /// Biases of the queries: `[H (d_N + d_R)]`.
    QueryBias,
    /// From the input to the latent of the queries: `[r_q, D]`.
    QueryLatent,
    /// Its bias: `[r_q]`.
    QueryLatentBias,
    /// Weight of the norm of it: `[r_q]`.
    QueryLatentNorm,
    /// From the input to the latent and the rotated key: `[r + d_R, D]`.
    LatentAndKey,
    /// Its bias: `[r + d_R]`.
    LatentAndKeyBias,
    /// Weight of the norm of the latent: `[r]`.
    LatentNorm,
    /// From the latent to keys and values: `[H (d_N + d_V), r]`.
    KeysAndValues,
    /// From the values of all heads to the residual stream: `[D, H d_V]`.
    Output,
    /// Its bias: `[D]`.
    OutputBias,
}

impl AttentionTensor {
    /// The tensor in layer `layer`.
    pub(super) fn planned(self, layer: usize) -> PlannedTensor {
        PlannedTensor { name: self.full_name(layer), dtype: self.dtype, shape: self.shape }
    }

    /// The tensor in layer `layer` with its values.
    pub(super) fn with_values(self, layer: usize, values: &mut Values) -> OutTensor {
        let (name, values) = (self.full_name(layer), values.take(self.holds));
        debug_assert_eq!(values.len(), self.shape.iter().product::<usize>(), "{name}");
        OutTensor { name, shape: self.shape, values }
    }

    fn full_name(&self, layer: usize) -> String {
        format!("model.layers.{layer}.self_attn.{}", self.name)
    }
}

/// Attention tensors with the names of DeepSeek's classes, in writing order.
pub fn tensors(spec: &TargetSpec, arch: &Architecture) -> Vec<AttentionTensor> {
    let (g, d, heads) = (spec.output(), arch.hidden, arch.heads);
    let (plain, inexact, base) = (spec.plain_dtype(), spec.storage.inexact(), spec.storage.base());
    let normed = spec.latent_norm.is_some();
    let query_bias = spec.query_bias && spec.class.has_query_biases();
    let mut out = Vec::new();
    let mut push = |name, dtype, shape: &[usize], holds| {
        out.push(AttentionTensor { name, dtype, shape: shape.to_vec(), holds });
    };
    let q = heads * (g.qk_nope_head_dim + g.qk_rope_head_dim);
    let queries = if has_plain_scale(spec, arch) { plain } else { inexact };
    match g.q_lora_rank {
        None => {
            push("q_proj.weight", queries, &[q, d], Holds::Queries);
            if query_bias {
                push("q_proj.bias", queries, &[q], Holds::QueryBias);
            }
        }
        Some(rank) => {
            push("q_a_proj.weight", inexact, &[rank, d], Holds::QueryLatent);
            if spec.bias {
                push("q_a_proj.bias", inexact, &[rank], Holds::QueryLatentBias);
            }
            if normed {
                push("q_a_layernorm.weight", base, &[rank], Holds::QueryLatentNorm);
            }
            push("q_b_proj.weight", queries, &[q, rank], Holds::Queries);
            if query_bias {
                push("q_b_proj.bias", queries, &[q], Holds::QueryBias);
            }
        }
    }
    let kv_a = g.kv_lora_rank + g.qk_rope_head_dim;
    push("kv_a_proj_with_mqa.weight", plain, &[kv_a, d], Holds::LatentAndKey);
    if spec.bias {
        push("kv_a_proj_with_mqa.bias", plain, &[kv_a], Holds::LatentAndKeyBias);
    }
    if normed {
        push("kv_a_layernorm.weight", base, &[g.kv_lora_rank], Holds::LatentNorm);
    }
    // Of an exact conversion it holds zeros and ones, times what the latent's norm leaves.
    let up = if normed { inexact } else { plain };
    let kv_b = heads * (g.qk_nope_head_dim + g.v_head_dim);
    push("kv_b_proj.weight", up, &[kv_b, g.kv_lora_rank], Holds::KeysAndValues);
    let scaled = (spec.stream_scale(arch) * arch.multipliers.residual).log2().fract() != 0.0;
    let o = if scaled { inexact } else { plain };
    push("o_proj.weight", o, &[d, heads * g.v_head_dim], Holds::Output);
    if spec.bias {
        push("o_proj.bias", inexact, &[d], Holds::OutputBias);
    }
    out
}

/// Whether what multiplies the queries is a power of two, so that they keep the source's digits.
fn has_plain_scale(spec: &TargetSpec, arch: &Architecture) -> bool {
    if spec.class.has_own_score_scale() {
        return true;
    }
    let width = (spec.geometry.qk_nope_head_dim + spec.geometry.qk_rope_head_dim) as f64;
    let scale = |score_scale: f64| score_scale * arch.rope.amplitude.powi(2) * width.sqrt();
    arch.gqa().is_some_and(|shape| scale(shape.score_scale).log2().fract().abs() < 1e-12)
}

/// Everything that the attention tensors of one layer hold.
pub(super) struct Values {
    /// With [`Carried::up`] the queries, heads one after the other.
    query: Carried,
    query_bias: Array1<f64>,
    /// With [`Carried::up`] keys and values, heads one after the other.
    latent: Carried,
    /// `[d_R, D]`.
    key: Array2<f64>,
    /// `[d_R]`.
    key_bias: Array1<f64>,
    output: Array2<f64>,
    output_bias: Array1<f64>,
}

impl Values {
    /// The values of a layer as the spec's class holds it: padded, its pairs in the class's order, the class's norms of latents
    /// neutralised. `gain` is the weight of the layer's input norm.
    pub fn new(spec: &TargetSpec, arch: &Architecture, mla: &MlaLayer, gain: &[f64]) -> Self {
        let mla = &*fitted(spec, arch, mla);
        let (heads, width) = (mla.heads, mla.nope_dim() + mla.rope_dim());
        // Stock classes scale scores by the width of a head; what is missing multiplies the queries.
        let factor = if spec.class.has_own_score_scale() { 1.0 } else { mla.score_scale * (width as f64).sqrt() };
        let query_bias = query_bias(mla) * factor;
        let mut query = query(spec, mla, factor, &query_bias, gain);
        let mut latent = Latent {
            down: &mla.latent,
            up: by_head(heads, &mla.k_up, &mla.v_up),
            constant: None,
            used: spec.geometry.kv_lora_rank,
            width: spec.output().kv_lora_rank,
            gain,
            plain: Plain::Down,
        }
        .carry(spec.latent_norm);
        let (stream_scale, input_scale) = (spec.stream_scale(arch), spec.input_scale());
        let mut key = mla.k_rope.clone();
        if input_scale != 1.0 {
            let reads_input = if query.down.is_empty() { &mut query.up } else { &mut query.down };
            for map in [reads_input, &mut latent.down, &mut key] {
                *map /= input_scale;
            }
        }
        let zeros = |bias: &Option<Array1<f64>>, n: usize| bias.clone().unwrap_or_else(|| Array1::zeros(n));
        Self {
            query,
            query_bias,
            latent,
            key,
            key_bias: zeros(&mla.k_rope_bias, mla.rope_dim()),
            output: &mla.wo * stream_scale,
            output_bias: zeros(&mla.wo_bias, mla.hidden()) * stream_scale,
        }
    }

    /// Row-major values of a tensor. They are moved out, as they may be large: a second time there are none.
    fn take(&mut self, holds: Holds) -> Vec<f64> {
        match holds {
            Holds::Queries => flat(&mut self.query.up),
            Holds::QueryBias => self.query_bias.to_vec(),
            Holds::QueryLatent => flat(&mut self.query.down),
            Holds::QueryLatentBias => self.query.bias.to_vec(),
            Holds::QueryLatentNorm => self.query.weight.clone(),
            Holds::LatentAndKey => {
                let mut rows = flat(&mut self.latent.down);
                rows.append(&mut flat(&mut self.key));
                rows
            }
            Holds::LatentAndKeyBias => self.latent.bias.iter().chain(&self.key_bias).copied().collect(),
            Holds::LatentNorm => self.latent.weight.clone(),
            Holds::KeysAndValues => flat(&mut self.latent.up),
            Holds::Output => flat(&mut self.output),
            Holds::OutputBias => self.output_bias.to_vec(),
        }
    }
}

/// The queries: directly from the input, or through a latent, in which a constant row may carry their bias (docs/maths.md, (5.5)).
fn query(spec: &TargetSpec, mla: &MlaLayer, factor: f64, bias: &Array1<f64>, gain: &[f64]) -> Carried {
    let up = by_head(mla.heads, &mla.query.nope, &mla.query.rope) * factor;
    let Some(width) = spec.geometry.q_lora_rank else {
        return Carried { down: Array2::zeros((0, 0)), bias: Array1::zeros(0), weight: Vec::new(), up };
    };
    let down = match &mla.query.down {
        Some(down) => Cow::Borrowed(down),
        None => Cow::Owned(Array2::eye(mla.hidden())),
    };
    let constant = spec.has_constant_row().then(|| bias.clone());
    let used = down.nrows();
    Latent { down: &down, up, constant, used, width, gain, plain: Plain::Up }.carry(spec.latent_norm)
}

/// The layer with the widths of the output and rotated pairs in the order of the class.
fn fitted<'a>(spec: &TargetSpec, arch: &Architecture, mla: &'a MlaLayer) -> Cow<'a, MlaLayer> {
    let output = spec.output();
    let mut out = Cow::Borrowed(mla);
    if output != spec.geometry {
        out = Cow::Owned(pad::pad(&out, &output, arch.rope.theta));
    }
    if !spec.class.interleaves_pairs() {
        out = Cow::Owned(split_pairs(&out));
    }
    out
}

/// Pairs `(2p, 2p + 1)` of the rotated part become `(p, p + d_R / 2)`.
fn split_pairs(mla: &MlaLayer) -> MlaLayer {
    let rope = mla.rope_dim();
    let rows = |heads: usize| -> Vec<usize> {
        (0..heads * rope).map(|i| i / rope * rope + i % rope % (rope / 2) * 2 + i % rope / (rope / 2)).collect()
    };
    let (query, key) = (rows(mla.heads), rows(1));
    let mut out = mla.clone();
    out.query.rope = mla.query.rope.select(Axis(0), &query);
    out.query.rope_bias = mla.query.rope_bias.as_ref().map(|b| b.select(Axis(0), &query));
    out.k_rope = mla.k_rope.select(Axis(0), &key);
    out.k_rope_bias = mla.k_rope_bias.as_ref().map(|b| b.select(Axis(0), &key));
    out
}

/// Rows of both matrices head by head: those of `a`, then those of `b`. `a` `[H m, columns]`, `b` `[H n, columns]`.
fn by_head(heads: usize, a: &Array2<f64>, b: &Array2<f64>) -> Array2<f64> {
    let (m, n) = (a.nrows() / heads, b.nrows() / heads);
    let mut out = Array2::zeros((heads * (m + n), a.ncols()));
    for h in 0..heads {
        let at = h * (m + n);
        out.slice_mut(s![at..at + m, ..]).assign(&a.slice(s![h * m..(h + 1) * m, ..]));
        out.slice_mut(s![at + m..at + m + n, ..]).assign(&b.slice(s![h * n..(h + 1) * n, ..]));
    }
    out
}

/// Biases of the queries, `[H (d_N + d_R)]`; zero where there are none.
fn query_bias(mla: &MlaLayer) -> Array1<f64> {
    let column = |b: &Option<Array1<f64>>, n: usize| match b {
        Some(b) => b.clone().insert_axis(Axis(1)),
        None => Array2::zeros((mla.heads * n, 1)),
    };
    let (nope, rope) = (column(&mla.query.nope_bias, mla.nope_dim()), column(&mla.query.rope_bias, mla.rope_dim()));
    by_head(mla.heads, &nope, &rope).column(0).to_owned()
}

/// Row-major values of a matrix, moved out of it.
fn flat(a: &mut Array2<f64>) -> Vec<f64> {
    let a = std::mem::take(a);
    if !a.is_standard_layout() {
        return a.iter().copied().collect();
    }
    let len = a.len();
    let (mut values, offset) = a.into_raw_vec_and_offset();
    let start = offset.unwrap_or(0);
    values.truncate(start + len);
    values.drain(..start);
    values
}

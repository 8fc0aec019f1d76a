//! Attention tensors of each target class.
//!
//! What the stock graphs impose, and how it is met exactly (targets.md 0, 1, 7):
//! - `kv_a_layernorm` (and `q_a_layernorm`) are always applied, with epsilon 1e-6 in transformers and `rms_norm_eps`
//!   elsewhere: both are made 1e-6, and the norms are neutralised by a dominant epsilon ([`crate::factor::norm`]);
//! - a source with another epsilon `e` has its residual stream scaled by `a = sqrt(1e-6 / e)`: embedding, output and down
//!   projections times `a`, head untied and unscaled, since `RMSNorm(a x; a^2 e) = RMSNorm(x; e)`;
//! - query biases go through a constant row of `q_a_proj`;
//! - MiniCPM3 pairs the halves of the rotated part, and always has a query latent.
//!
//! The generic class of this tool has none of these: biases where they are, no norm on the latent, its own score scale.

use ndarray::{Array1, Array2, Axis, s};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rope::{RopeConfig, rope_config};
use super::{OutTensor, TargetKind, pad};
use crate::arch::{Architecture, LongRope};
use crate::factor::norm::{NormScales, neutral_scales, rms_bound};
use crate::mla::{Geometry, MlaLayer};
use crate::source::Dtype;
use crate::write::PlannedTensor;

/// Epsilon of the latent norms, and so of every norm of the output.
pub const LATENT_EPS: f64 = 1e-6;

/// Everything that decides names, shapes and dtypes of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetSpec {
    /// Class that is written for; never `auto`.
    pub kind: TargetKind,
    /// Widths before padding. `q_lora_rank` counts the constant row, if there is one.
    pub geometry: Geometry,
    /// Whether the output is for engines' own classes, which know the stock grid and YaRN only.
    pub portable: bool,
    /// Whether widths are padded to those of kernels.
    pub pad: bool,
    /// Whether rotated slots have to lie on the config's grid.
    pub stock_grid: bool,
    /// `attention_bias`: biases on `kv_a`, `o` and, behind a query latent, `q_a`.
    pub bias: bool,
    /// Generic class: whether the queries' own projection has a bias.
    pub query_bias: bool,
    /// Generic class: whether norms of queries and keys are carried over.
    pub qk_norm: bool,
    /// Whether linear layers are written in FP8.
    pub fp8: bool,
    /// Whether what is copied keeps its dtype.
    pub keep_dtypes: bool,
    /// Whether queries go through `q_a_proj`, and whether its last row is the constant that carries their bias.
    pub constant_row: bool,
    /// Dtype of rounded tensors.
    #[serde(with = "dtype_by_name")]
    pub base: Dtype,
    /// Whether a tensor that `base` would round is written in f32 instead.
    pub lossless: bool,
    /// Whether the query and key/value weights are the source's own times powers of two (method `exact`).
    pub plain_weights: bool,
    /// Whether the score scale is a power of two, so that queries keep the source's digits.
    pub plain_scale: bool,
    /// Factor on the residual stream, `sqrt(1e-6 / eps)`.
    pub stream_scale: f64,
    /// Layers that keep the source's attention, `[layers]`; empty: none.
    pub kept: Vec<bool>,
}

impl TargetSpec {
    /// Factor on the residual stream for a source epsilon.
    pub fn stream_scale(source_eps: f64) -> f64 {
        // An epsilon that is 1e-6 up to how it was printed needs no scaling.
        if (source_eps / LATENT_EPS - 1.0).abs() < 1e-6 { 1.0 } else { (LATENT_EPS / source_eps).sqrt() }
    }

    /// Dtype of a tensor that `base` would round.
    pub fn rounded(&self) -> Dtype {
        if self.lossless { Dtype::F32 } else { self.base }
    }

    /// Whether layer `layer` keeps the source's attention.
    pub fn keeps(&self, layer: usize) -> bool {
        self.kept.get(layer) == Some(&true)
    }

    fn is_remote(&self) -> bool {
        self.kind == TargetKind::HfRemote
    }

    /// Widths of the output.
    pub fn output(&self) -> Geometry {
        match self.pad {
            true => pad::kernel_shape(&self.geometry, self.stock_grid).unwrap_or(self.geometry),
            false => self.geometry,
        }
    }

    /// Cached values per token and layer of the output.
    pub fn cache_values(&self) -> usize {
        self.output().kv_lora_rank + self.output().qk_rope_head_dim
    }

    fn plain(&self) -> Dtype {
        if self.plain_weights { self.base } else { self.rounded() }
    }

    /// Attention tensors of layer `layer`, in writing order.
    pub fn planned_attention(&self, arch: &Architecture, layer: usize) -> Vec<PlannedTensor> {
        let (g, d) = (&self.output(), arch.hidden);
        let prefix = format!("model.layers.{layer}.self_attn.");
        let q = arch.heads * (g.qk_nope_head_dim + g.qk_rope_head_dim);
        let queries = if self.plain_scale || self.is_remote() { self.plain() } else { self.rounded() };
        let remote = self.is_remote();
        let mut out = Vec::new();
        let mut push = |name: &str, dtype: Dtype, shape: Vec<usize>| {
            out.push(PlannedTensor { name: format!("{prefix}{name}"), dtype, shape });
        };
        match g.q_lora_rank {
            None => {
                push("q_proj.weight", queries, vec![q, d]);
                if self.query_bias {
                    push("q_proj.bias", queries, vec![q]);
                }
            }
            Some(rank) => {
                push("q_a_proj.weight", self.rounded(), vec![rank, d]);
                if self.bias {
                    push("q_a_proj.bias", self.rounded(), vec![rank]);
                }
                if !remote {
                    push("q_a_layernorm.weight", self.base, vec![rank]);
                }
                push("q_b_proj.weight", queries, vec![q, rank]);
                if self.query_bias {
                    push("q_b_proj.bias", queries, vec![q]);
                }
            }
        }
        let kv_a = g.kv_lora_rank + g.qk_rope_head_dim;
        push("kv_a_proj_with_mqa.weight", self.plain(), vec![kv_a, d]);
        if self.bias {
            push("kv_a_proj_with_mqa.bias", self.plain(), vec![kv_a]);
        }
        if !remote {
            push("kv_a_layernorm.weight", self.base, vec![g.kv_lora_rank]);
        }
        let kv_b = arch.heads * (g.qk_nope_head_dim + g.v_head_dim);
        // Of an exact conversion it holds zeros and ones, times what the latent's norm leaves.
        let up = if remote { self.plain() } else { self.rounded() };
        push("kv_b_proj.weight", up, vec![kv_b, g.kv_lora_rank]);
        let scaled = (self.stream_scale * arch.multipliers.residual).log2().fract() != 0.0;
        let o = if self.plain_weights && !scaled { self.base } else { self.rounded() };
        push("o_proj.weight", o, vec![d, arch.heads * g.v_head_dim]);
        if self.bias {
            push("o_proj.bias", self.rounded(), vec![d]);
        }
        out
    }

    /// Values of [`TargetSpec::planned_attention`]'s tensors, in the same order. `gain` is the weight of the layer's input
    /// norm, which bounds what the latent norms can meet.
    pub fn attention_tensors(&self, arch: &Architecture, layer: usize, mla: &MlaLayer, gain: &[f64]) -> Vec<OutTensor> {
        let planned = self.planned_attention(arch, layer);
        let mut values: Vec<Vec<f64>> = Vec::new();
        let mut fitted;
        let mut mla = mla;
        let output = self.output();
        if output != self.geometry {
            fitted = pad::pad(mla, &output, arch.rope.theta);
            mla = &fitted;
        }
        if self.kind == TargetKind::Minicpm3 {
            fitted = split_pairs(mla);
            mla = &fitted;
        }
        let (heads, nope, rope) = (mla.heads, mla.nope_dim(), mla.rope_dim());
        let remote = self.is_remote();
        let f = if remote { 1.0 } else { mla.score_scale * ((nope + rope) as f64).sqrt() };
        let q = by_head(heads, &mla.query.nope, &mla.query.rope) * f;
        match self.geometry.q_lora_rank {
            None => values.push(flat(&q)),
            Some(_) if remote => {
                values.push(flat(&mla.query.down.clone().unwrap_or_else(|| Array2::eye(mla.hidden()))));
                if self.bias {
                    values.push(vec![0.0; output.q_lora_rank.unwrap_or(0)]);
                }
                values.push(flat(&q));
            }
            Some(rank) => self.query_through_latent(mla, q, f, rank, gain, &mut values),
        }
        if self.query_bias {
            values.push(flat(&query_bias(mla)));
        }
        let scales = match remote {
            true => NormScales { down: 1.0, weight: 1.0, up: 1.0 },
            false => neutral_scales(rms_bound(&mla.latent, gain, None), LATENT_EPS),
        };
        let (r, d) = (mla.rank(), mla.hidden());
        let mut kv_a = Array2::zeros((r + rope, d));
        kv_a.slice_mut(s![..r, ..]).assign(&(&mla.latent * scales.down));
        kv_a.slice_mut(s![r.., ..]).assign(&mla.k_rope);
        values.push(flat(&kv_a));
        if self.bias {
            let mut bias = vec![0.0; r];
            bias.extend(mla.k_rope_bias.clone().unwrap_or_else(|| Array1::zeros(rope)));
            values.push(bias);
        }
        if !remote {
            values.push(vec![scales.weight; r]);
        }
        values.push(flat(&(by_head(heads, &mla.k_up, &mla.v_up) * scales.up)));
        values.push(flat(&(&mla.wo * self.stream_scale)));
        if self.bias {
            let bias = mla.wo_bias.clone().unwrap_or_else(|| Array1::zeros(d));
            values.push((bias * self.stream_scale).to_vec());
        }
        planned.into_iter().zip(values).map(|(p, values)| OutTensor { name: p.name, shape: p.shape, values }).collect()
    }

    /// `q_a = [s X; 0]`, bias `[0; s]`, `q_b = [W_q | b_q]` (T8): the constant last latent carries the query bias. `X` is the
    /// identity, or the query latent's down-projection where there is one.
    fn query_through_latent(
        &self,
        mla: &MlaLayer,
        q: Array2<f64>,
        f: f64,
        rank: usize,
        gain: &[f64],
        values: &mut Vec<Vec<f64>>,
    ) {
        let d = mla.hidden();
        let down = mla.query.down.clone().unwrap_or_else(|| Array2::eye(d));
        let inner = down.nrows();
        let one = self.constant_row.then(|| Array1::from_elem(1, 1.0));
        let scales = neutral_scales(rms_bound(&down, gain, one.as_ref()), LATENT_EPS);
        // The factor that no power of two holds goes to `q_a`, so that `q_b` keeps the source's digits.
        let s = scales.down * scales.up;
        let mut q_a = Array2::zeros((rank, d));
        q_a.slice_mut(s![..inner, ..]).assign(&(down * s));
        values.push(flat(&q_a));
        if self.bias {
            let mut bias = vec![0.0; rank];
            if self.constant_row {
                bias[inner] = s;
            }
            values.push(bias);
        }
        values.push(vec![scales.weight; rank]);
        let mut q_b = Array2::zeros((q.nrows(), rank));
        q_b.slice_mut(s![.., ..inner]).assign(&q);
        if self.constant_row {
            q_b.column_mut(inner).assign(&(query_bias(mla).column(0).to_owned() * f));
        }
        values.push(flat(&q_b));
    }

    /// Frequencies as the output's config will express them. `frequencies` are those of the slots, radians per token.
    pub fn rope(&self, frequencies: &[f64], arch: &Architecture, source: &Value, max_position: usize) -> RopeConfig {
        let frequencies = &pad::frequencies(frequencies, self.output().qk_rope_head_dim, arch.rope.theta);
        let scaling = ["rope_scaling", "rope_parameters"].iter().find_map(|k| source.get(k).and_then(Value::as_object));
        // Slots turn as pairs of the source, so each finds there what it turns by past the original context.
        let long = arch.rope.long.as_ref().filter(|l| max_position > l.original).map(|long| {
            let beyond = |f: &f64| {
                let pair = arch.rope.inv_freq.iter().position(|own| own == f);
                pair.map_or(*f, |j| long.inv_freq[j])
            };
            LongRope { original: long.original, inv_freq: frequencies.iter().map(beyond).collect() }
        });
        rope_config(frequencies, long, arch.rope.theta, scaling, max_position, self.portable)
    }
}

/// A dtype as its name in a safetensors header.
mod dtype_by_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::source::Dtype;

    pub fn serialize<S: Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(dtype.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
        let name = String::deserialize(deserializer)?;
        Dtype::from_name(&name).ok_or_else(|| D::Error::custom(format!("unknown dtype `{name}`")))
    }
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

/// Biases of the queries, `[H (d_N + d_R), 1]`; zero where there are none.
fn query_bias(mla: &MlaLayer) -> Array2<f64> {
    let column = |b: &Option<Array1<f64>>, n: usize| match b {
        Some(b) => b.clone().insert_axis(Axis(1)),
        None => Array2::zeros((mla.heads * n, 1)),
    };
    let (nope, rope) = (column(&mla.query.nope_bias, mla.nope_dim()), column(&mla.query.rope_bias, mla.rope_dim()));
    by_head(mla.heads, &nope, &rope)
}

/// Row-major values.
fn flat(a: &Array2<f64>) -> Vec<f64> {
    a.as_standard_layout().iter().copied().collect()
}

//! The weights of one layer by role, in host memory.

use ndarray::Array2;

use super::RuntimeError;
use crate::arch::{Architecture, Attention, LayerNames};
use crate::source::ModelSource;

/// A linear layer `y = W x + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl From<Array2<f32>> for Linear {
    fn from(weight: Array2<f32>) -> Self {
        Self { weight, bias: None }
    }
}

/// Grouped-query attention: `q [H d, D]`, `k` and `v [g d, D]`, `o [D, H d]`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct GqaTensors {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
}

/// How MLA makes its queries.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryTensors {
    /// `q_proj [H (d_N + d_R), D]`, per head `[nope | rope]`.
    Direct(Linear),
    /// Through a normed latent of width `r_q`.
    LowRank {
        /// `q_a_proj [r_q, D]`.
        a: Linear,
        /// Gain of `q_a_layernorm`, `[r_q]`.
        norm: Vec<f32>,
        /// `q_b_proj [H (d_N + d_R), r_q]`, per head `[nope | rope]`.
        b: Linear,
    },
}

/// Multi-head latent attention, DeepSeek layout.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaTensors {
    /// Queries.
    pub query: QueryTensors,
    /// `kv_a_proj_with_mqa [r + d_R, D]`, rows `[latent | rope key]`.
    pub kv_a: Linear,
    /// Gain of `kv_a_layernorm`, `[r]`.
    pub kv_a_norm: Vec<f32>,
    /// `kv_b_proj [H (d_N + d_V), r]`, per head `[key | value]`.
    pub kv_b: Linear,
    /// `o_proj [D, H d_V]`.
    pub o: Linear,
}

/// Attention weights of either variant.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum AttentionTensors {
    Gqa(GqaTensors),
    Mla(MlaTensors),
}

/// Gated MLP `down(silu(gate x) * up x)`: `gate` and `up [I, D]`, `down [D, I]`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct MlpTensors {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// All weights of one decoder layer, f32. Rounding to a narrower dtype is the caller's business.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTensors {
    /// Gain of the norm before attention, `[D]`.
    pub input_norm: Vec<f32>,
    /// Attention.
    pub attention: AttentionTensors,
    /// Gain of the norm before the MLP, `[D]`.
    pub post_norm: Vec<f32>,
    /// MLP.
    pub mlp: MlpTensors,
}

impl LayerTensors {
    /// Read layer `layer` of a checkpoint.
    ///
    /// # Errors
    /// [`RuntimeError::Source`] for a tensor that cannot be read, [`RuntimeError::Shape`] for one of another shape than
    /// the architecture implies.
    pub fn load(source: &ModelSource, arch: &Architecture, layer: usize) -> Result<Self, RuntimeError> {
        let load = Loader { source, names: arch.names.layer(layer) };
        let (d, i) = (arch.hidden, arch.intermediate);
        let attention = match &arch.attention {
            Attention::Gqa(a) => {
                let (q, kv) = (arch.heads * a.head_dim, a.kv_heads * a.head_dim);
                AttentionTensors::Gqa(GqaTensors {
                    q: load.linear("q", q, d, a.qkv_bias)?,
                    k: load.linear("k", kv, d, a.qkv_bias)?,
                    v: load.linear("v", kv, d, a.qkv_bias)?,
                    o: load.linear("o", d, q, a.out_bias)?,
                })
            }
            Attention::Mla(a) => {
                let q = arch.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim);
                let query = match a.q_lora_rank {
                    None => QueryTensors::Direct(load.linear("q", q, d, false)?),
                    Some(rank) => QueryTensors::LowRank {
                        a: load.linear("q_a", rank, d, a.bias)?,
                        norm: load.vector("q_a_norm", &load.names.role("q_a_norm"), rank)?,
                        b: load.linear("q_b", q, rank, false)?,
                    },
                };
                let r = a.kv_lora_rank;
                AttentionTensors::Mla(MlaTensors {
                    query,
                    kv_a: load.linear("kv_a", r + a.qk_rope_head_dim, d, a.bias)?,
                    kv_a_norm: load.vector("kv_a_norm", &load.names.role("kv_a_norm"), r)?,
                    kv_b: load.linear("kv_b", arch.heads * (a.qk_nope_head_dim + a.v_head_dim), r, false)?,
                    o: load.linear("o", d, arch.heads * a.v_head_dim, a.bias)?,
                })
            }
        };
        Ok(Self {
            input_norm: load.vector("input_norm", &load.names.role("input_norm"), d)?,
            attention,
            post_norm: load.vector("post_norm", &load.names.role("post_norm"), d)?,
            mlp: MlpTensors {
                gate: load.linear("gate", i, d, arch.mlp_bias)?,
                up: load.linear("up", i, d, arch.mlp_bias)?,
                down: load.linear("down", d, i, arch.mlp_bias)?,
            },
        })
    }
}

struct Loader<'a> {
    source: &'a ModelSource,
    names: LayerNames<'a>,
}

impl Loader<'_> {
    fn linear(&self, role: &'static str, out: usize, inner: usize, bias: bool) -> Result<Linear, RuntimeError> {
        let weight = load_matrix(self.source, role, &self.names.weight(role), out, inner)?;
        let bias = match bias {
            true => Some(self.vector(role, &self.names.bias(role), out)?),
            false => None,
        };
        Ok(Linear { weight, bias })
    }

    fn vector(&self, role: &'static str, name: &str, len: usize) -> Result<Vec<f32>, RuntimeError> {
        let view = self.source.tensors.view(name)?;
        if view.shape != [len] {
            return Err(RuntimeError::Shape { role, expected: vec![len], found: view.shape.to_vec() });
        }
        Ok(view.to_f32())
    }
}

/// Read one matrix `[out, in]` as f32.
pub(super) fn load_matrix(
    source: &ModelSource,
    role: &'static str,
    name: &str,
    out: usize,
    inner: usize,
) -> Result<Array2<f32>, RuntimeError> {
    let view = source.tensors.view(name)?;
    let shape = || RuntimeError::Shape { role, expected: vec![out, inner], found: view.shape.to_vec() };
    if view.shape != [out, inner] {
        return Err(shape());
    }
    Array2::from_shape_vec((out, inner), view.to_f32()).map_err(|_| shape())
}

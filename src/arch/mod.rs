//! Families as data: from a `config.json` and tensor names to one normal form.
//!
//! A family is a TOML file in `families/` (embedded), read by the interpreter here. Everything downstream sees only an
//! [`Architecture`], never a family name: adding a llama-shaped family adds no Rust.

mod attention;
mod config;
mod error;
mod family;
mod rope;
mod tensors;

pub use attention::{AttentionSource, load_attention_source};
pub use error::ArchError;
pub use family::{Family, known_families};
pub(crate) use rope::base_power;
pub use rope::{Rope, RopeLayout};
pub use tensors::{ExpectedTensor, LayerNames, TensorNames, check_tensors};

use crate::source::Dtype;

/// A decoder-only transformer in normal form: what the reference runtime and the converter need to know.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// Family name, the stem of its TOML file, such as `llama`.
    pub family: String,
    /// `model_type` of the config.
    pub model_type: String,
    /// Hidden size `D`.
    pub hidden: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads `H`.
    pub heads: usize,
    /// Vocabulary size `V` (rows of the embedding).
    pub vocab: usize,
    /// MLP width `I`.
    pub intermediate: usize,
    /// Epsilon of the RMSNorms on the residual stream.
    pub norm_eps: f64,
    /// Gate activation of the MLP.
    pub activation: Activation,
    /// Whether `lm_head` is the embedding.
    pub tied_head: bool,
    /// Whether gate, up and down projections carry biases.
    pub mlp_bias: bool,
    /// Longest position the config allows.
    pub max_position: usize,
    /// Rotary embedding of the attention's rotated part.
    pub rope: Rope,
    /// Attention variant.
    pub attention: Attention,
    /// Tensor names.
    pub names: TensorNames,
    /// Dtype the config claims for its weights.
    pub config_dtype: Option<Dtype>,
}

/// Gate activation of a gated MLP `down(act(gate x) * up x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// Attention variant of a decoder layer.
#[derive(Debug, Clone)]
pub enum Attention {
    /// Grouped-query attention (MHA and MQA are the ends of it).
    Gqa(GqaShape),
    /// Multi-head latent attention, DeepSeek layout.
    Mla(MlaShape),
}

/// Geometry of grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GqaShape {
    /// KV heads `g`.
    pub kv_heads: usize,
    /// Head size `d` of queries, keys and values.
    pub head_dim: usize,
    /// Whether q, k and v projections carry biases.
    pub qkv_bias: bool,
    /// Whether the output projection carries a bias.
    pub out_bias: bool,
    /// Sliding window in tokens, where one limits attention.
    pub sliding_window: Option<usize>,
}

/// Geometry of multi-head latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlaShape {
    /// Latent width `r`.
    pub kv_lora_rank: usize,
    /// Query latent width, `None` for a direct `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Query/key width per head without RoPE, `d_N`.
    pub qk_nope_head_dim: usize,
    /// Width of the shared rotated key, `d_R`.
    pub qk_rope_head_dim: usize,
    /// Value width per head, `d_V`.
    pub v_head_dim: usize,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` carry biases (`attention_bias`).
    pub bias: bool,
    /// Epsilon of `kv_a_layernorm` and `q_a_layernorm`: stock transformers hard-codes 1e-6.
    pub latent_eps: f64,
    /// What multiplies `<q, k>` before the softmax.
    pub score_scale: f64,
}

impl Architecture {
    /// Cached values per token per layer: `2 g d` for GQA, `r + d_R` for MLA.
    pub fn cache_values(&self) -> usize {
        match &self.attention {
            Attention::Gqa(a) => 2 * a.kv_heads * a.head_dim,
            Attention::Mla(a) => a.kv_lora_rank + a.qk_rope_head_dim,
        }
    }

    /// The GQA geometry, or `None` for an MLA model.
    pub fn gqa(&self) -> Option<&GqaShape> {
        match &self.attention {
            Attention::Gqa(a) => Some(a),
            Attention::Mla(_) => None,
        }
    }

    /// The MLA geometry, or `None` for a GQA model.
    pub fn mla(&self) -> Option<&MlaShape> {
        match &self.attention {
            Attention::Mla(a) => Some(a),
            Attention::Gqa(_) => None,
        }
    }
}

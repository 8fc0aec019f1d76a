//! Families as data: from a `config.json` and tensor names to one normal form.
//!
//! A family is a TOML file in `families/` (embedded), read by the interpreter here. Everything downstream sees only an
//! [`Architecture`], never a family name: adding a llama-shaped family adds no Rust.

mod attention;
mod config;
mod error;
mod family;
mod hybrid;
mod interpret;
mod moe;
mod rope;
mod scale;
mod tensors;
mod weights;
mod wrapper;

pub use attention::{AttentionSource, load_attention_source};
pub use error::ArchError;
pub use family::{Family, MlpKind, QkNormScope, known_families};
pub use hybrid::Hybrid;
pub use moe::{ExpertGroups, GroupScore, Moe, Scoring, Selection};
pub(crate) use rope::base_power;
pub use rope::{LongRope, Rope, RopeLayout};
pub use tensors::{ExpectedTensor, LayerNames, Part, TensorNames, check_tensors};
pub use weights::{BLOCK, SCALE_SUFFIX, StoredPart};
pub use wrapper::language_config;

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
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether the MLP has a gate.
    pub mlp: MlpKind,
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
    /// Layers of an MLA model that are not MLA.
    pub hybrid: Option<Hybrid>,
    /// Tensor names.
    pub names: TensorNames,
    /// Dtype the config claims for its weights.
    pub config_dtype: Option<Dtype>,
    /// Added to every stored norm weight.
    pub norm_offset: f64,
    /// Norm of queries and keys before RoPE.
    pub qk_norm: Option<QkNormScope>,
    /// Factors that some families put where others have none.
    pub multipliers: Multipliers,
    /// Cap `c` of attention scores: `c tanh(s / c)`.
    pub score_softcap: Option<f64>,
    /// Cap of the logits.
    pub logit_softcap: Option<f64>,
    /// Sliding window of each layer, `[layers]`.
    pub windows: Vec<Option<usize>>,
    /// Mixture of experts, where some layer has one.
    pub moe: Option<Moe>,
    /// Layers after the last one that predict further tokens (DeepSeek-V3's MTP, arXiv 2412.19437, section 2.2). They may
    /// be stored; no figure here counts them, and the reference runtime does not run them.
    pub mtp_layers: usize,
}

/// Factors on the residual stream and at its ends; 1 where a family has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Multipliers {
    /// On the rows of the embedding.
    pub embedding: f64,
    /// On the output of attention and MLP, before it is added to the stream.
    pub residual: f64,
    /// On the logits.
    pub logits: f64,
}

/// Activation of an MLP: on the gate of `down(act(gate x) * up x)`, or of `down(act(up x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x Phi(x)`.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
}

impl Activation {
    /// Every activation with the names configs have for it, the preferred one first.
    pub const NAMES: [(Activation, &'static [&'static str]); 5] = [
        (Activation::Silu, &["silu", "swish"]),
        (Activation::Gelu, &["gelu"]),
        (Activation::GeluTanh, &["gelu_pytorch_tanh", "gelu_new"]),
        (Activation::Relu, &["relu"]),
        (Activation::Relu2, &["relu2"]),
    ];

    /// Name in a config.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(a, _)| *a == self).map_or("silu", |(_, names)| names[0])
    }
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
    /// Shortest sliding window of any layer in tokens, where one limits attention.
    pub sliding_window: Option<usize>,
    /// Rotated width: the first `rotary_dim` of a head's `d` values turn.
    pub rotary_dim: usize,
    /// What multiplies `<q, k>` before the softmax, RoPE's amplitude not counted.
    pub score_scale: f64,
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
    /// Whether `q_proj` (`q_b_proj`) carries one; no stock class has it.
    pub query_bias: bool,
    /// Whether latents are normed, as in every stock class.
    pub latent_norm: bool,
    /// Epsilon of `kv_a_layernorm` and `q_a_layernorm`: stock transformers hard-codes 1e-6.
    pub latent_eps: f64,
    /// Where rotated queries and keys are normed ([`Architecture::qk_norm`]): values per head of the source. The rotated
    /// width holds the source's KV heads side by side.
    pub norm_width: usize,
    /// What multiplies `<q, k>` before the softmax.
    pub score_scale: f64,
}

impl Architecture {
    /// Whether layer `layer` has experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|m| m.sparse.get(layer) == Some(&true))
    }

    /// Cached values per token per layer: `2 g d` for GQA, `r + d_R` for MLA (of a hybrid, its MLA layers).
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

//! What engines look at in an MLA checkpoint.

use serde_json::Value;

use crate::arch::{Architecture, Attention, RopeLayout};
use crate::mla::Geometry;
use crate::source::{DtypeExt, TensorDirectory};
use crate::target::{RopeGrid, Target};

/// Why a folder cannot be judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FactsError {
    /// It is no MLA model.
    #[error(
        "config.json: no `kv_lora_rank`: this is not an MLA model\n\nhint: `gqa2mla inspect` says which engines would load a conversion of it"
    )]
    NotMla,
    /// A key that every MLA config has is missing or no number.
    #[error("config.json: `{key}` is {found}, expected a whole number")]
    BadValue {
        /// Config key.
        key: &'static str,
        /// What is there.
        found: String,
    },
}

/// Routing of a mixture of experts, as the config says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// `scoring_func`.
    pub scoring: Option<String>,
    /// `norm_topk_prob`, where it changes anything: where not every expert is chosen.
    pub renormalised: bool,
    /// `topk_method`.
    pub method: Option<String>,
}

/// What engines see of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// `model_type`.
    pub model_type: String,
    /// Whether the config points to code of its own.
    pub own_code: bool,
    /// Widths of the attention.
    pub geometry: Geometry,
    /// `hidden_size`.
    pub hidden: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `attention_bias`, or a planned bias.
    pub bias: bool,
    /// Bias tensors that no stock class has: of `q_proj`, `q_b_proj`, `kv_b_proj`.
    pub stray_biases: bool,
    /// Whether bias tensors are there just where the config says so; `true` where the tensors are not known.
    pub biases_match: bool,
    /// Norms of queries or keys per head.
    pub head_norms: bool,
    /// Whether every latent norm has a weight; `true` where the tensors are not known.
    pub latent_norms: bool,
    /// Whether the latent norms look neutralised: large weights after tiny rows.
    pub neutral_norms: bool,
    /// Size of the latent's rows of `kv_a_proj_with_mqa` (and of `q_a_proj`, where that is smaller).
    pub rows: LatentRows,
    /// Whether the config is the language model's inside that of a model of several kinds of input.
    pub wrapped: bool,
    /// Whether a constant in the latent outweighs the rest, so that its norm does nothing whatever its epsilon.
    pub constant_latent: bool,
    /// RoPE scheme.
    pub rope: CandidateRope,
    /// Name of the scheme.
    pub rope_name: String,
    /// Whether `rope_scaling` is missing or null.
    pub no_scaling: bool,
    /// Whether a llama3 scheme has YaRN's betas fitted to it.
    pub fitted: bool,
    /// Whether a `rope_theta` stands beside the RoPE parameters rather than only in them, or is the one that engines assume.
    pub top_level_theta: bool,
    /// Whether rotated pairs are neighbours.
    pub interleaved: bool,
    /// `rms_norm_eps`.
    pub eps: f64,
    /// `hidden_act`.
    pub activation: String,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// Whether a head is stored; `true` where the tensors are not known.
    pub head: bool,
    /// Experts, in any layer.
    pub routing: Option<Routing>,
    /// Whether a shared expert is stored in layers of experts; `true` where the tensors are not known.
    pub shared_expert: bool,
    /// Whether keys that loaders do arithmetic on are missing or null: `n_routed_experts`, `n_shared_experts`.
    pub null_experts: bool,
    /// Whether `moe_layer_freq`, `scoring_func` and `topk_method` are all there.
    pub sglang_keys: bool,
    /// `index_topk` is there.
    pub sparse_index: bool,
    /// Whether weights are loaded as f16.
    pub f16: bool,
    /// Quantisation of the weights.
    pub quantised: Option<String>,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// Whether the tokenizer is SentencePiece's (byte fallback).
    pub sentencepiece: bool,
    /// Whether layers after the last one, which predict further tokens, are stored.
    pub further_layers: bool,
}

/// How large the rows are that make a latent, which decides the dtypes that hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LatentRows {
    /// Zero, where a norm with large weights says that they were not.
    Lost,
    /// The largest is below the smallest normal number of f16, 2^-14.
    Tiny,
    /// As weights are.
    Usual,
}

/// RoPE scheme as engines tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandidateRope {
    /// `theta^(-2p/d_R)`, no scaling.
    Default,
    /// One factor per pair.
    LongRope,
    /// YaRN.
    Yarn,
    /// Any other scheme that transformers knows (llama3, linear, dynamic).
    Other,
    /// A scheme of no known name.
    Unknown,
}

/// Base of the rotary embedding that engines assume where they find none.
const ASSUMED_THETA: f64 = 10000.0;

/// Model types that engines have classes for, whatever code a folder brings.
const NATIVE: [&str; 5] = ["deepseek_v2", "deepseek_v3", "kimi_k2", "youtu", "minicpm3"];

/// Values of the first tensor of this name; `None` where there is none in floating point.
fn values(tensors: &TensorDirectory, suffix: &str) -> Option<Vec<f32>> {
    let name = tensors.names().find(|n| n.ends_with(suffix))?;
    let view = tensors.view(name).ok().filter(|view| view.dtype.is_float())?;
    Some(view.to_f32())
}

/// The config of an MLA language model: the document itself, or what a model of several kinds of input (Kimi-K2.5, Mistral Large 3,
/// DeepSeek-VL2) keeps of its language model. The flag says which.
fn language_model(config: &Value) -> Option<(&Value, bool)> {
    const KEYS: [&str; 4] = ["text_config", "language_config", "llm_config", "language_model"];
    let is_mla = |c: &&Value| c.get("kv_lora_rank").is_some_and(|v| !v.is_null());
    if is_mla(&config) {
        return Some((config, false));
    }
    KEYS.iter().filter_map(|key| config.get(key)).find(is_mla).map(|inner| (inner, true))
}

impl CandidateRope {
    fn of(name: &str) -> Self {
        match name {
            "default" | "explicit" => Self::Default,
            "longrope" => Self::LongRope,
            "yarn" | "deepseek_yarn" => Self::Yarn,
            "llama3" | "linear" | "dynamic" => Self::Other,
            _ => Self::Unknown,
        }
    }
}

impl Facts {
    /// A dense DeepSeek-V3 model of these widths with nothing that any engine minds.
    fn plain(geometry: Geometry) -> Self {
        Self {
            model_type: "deepseek_v3".into(),
            own_code: false,
            geometry,
            hidden: 128,
            heads: 1,
            kv_heads: 1,
            layers: 1,
            bias: false,
            stray_biases: false,
            biases_match: true,
            head_norms: false,
            latent_norms: true,
            neutral_norms: true,
            rows: LatentRows::Usual,
            wrapped: false,
            constant_latent: false,
            rope: CandidateRope::Default,
            rope_name: "default".into(),
            no_scaling: true,
            fitted: false,
            top_level_theta: true,
            interleaved: true,
            eps: 1e-6,
            activation: "silu".into(),
            tied: false,
            head: true,
            routing: None,
            shared_expert: true,
            null_experts: false,
            sglang_keys: true,
            sparse_index: false,
            f16: false,
            quantised: None,
            intermediate: 128,
            sentencepiece: false,
            further_layers: false,
        }
    }

    /// What a conversion to `geometry` on `grid` writes for `target`: the free grid carries frequencies as LongRoPE factors
    /// and constants as biases, the stock grid has neither. Its latent norm is neutralised by tiny rows, that of the free grid by a constant.
    pub fn planned(geometry: Geometry, grid: RopeGrid, target: Target) -> Self {
        let free = grid == RopeGrid::Free;
        Self {
            model_type: target.model_type().into(),
            own_code: target.brings_code(),
            bias: free,
            rope: if free { CandidateRope::LongRope } else { CandidateRope::Default },
            rope_name: if free { "longrope" } else { "default" }.into(),
            interleaved: target.interleaves_pairs(),
            rows: if free { LatentRows::Usual } else { LatentRows::Tiny },
            neutral_norms: !free,
            constant_latent: free,
            ..Self::plain(geometry)
        }
    }

    /// What an MLA model that this tool reads is; `None` for a GQA model.
    pub fn of_model(arch: &Architecture) -> Option<Self> {
        let Attention::Mla(mla) = &arch.attention else { return None };
        let geometry = Geometry {
            kv_lora_rank: mla.kv_lora_rank,
            q_lora_rank: mla.q_lora_rank,
            qk_nope_head_dim: mla.qk_nope_head_dim,
            qk_rope_head_dim: mla.qk_rope_head_dim,
            v_head_dim: mla.v_head_dim,
        };
        Some(Self {
            model_type: arch.model_type.clone(),
            own_code: arch.model_type == "gqa2mla",
            bias: mla.bias,
            rope: CandidateRope::of(&arch.rope.kind),
            rope_name: arch.rope.kind.clone(),
            interleaved: arch.rope.layout == RopeLayout::Interleaved,
            activation: arch.activation.name().into(),
            routing: arch.moe.as_ref().map(|moe| Routing {
                scoring: Some(moe.scoring.name().to_owned()),
                renormalised: moe.renormalise && moe.per_token < moe.experts,
                method: None,
            }),
            ..Self::plain(geometry)
        })
    }

    /// Read a config, of whatever tool, and the tensors where they are there.
    ///
    /// # Errors
    /// [`FactsError`] for a config that is not MLA's.
    pub fn read(config: &Value, tensors: Option<&TensorDirectory>) -> Result<Self, FactsError> {
        let (config, wrapped) = language_model(config).ok_or(FactsError::NotMla)?;
        let get = |key: &str| config.get(key).filter(|v| !v.is_null());
        let number = |key: &'static str| {
            let found = get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
            get(key).and_then(Value::as_u64).map(|n| n as usize).ok_or(FactsError::BadValue { key, found })
        };
        let text = |key: &str, default: &str| get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
        let flag = |key: &str| get(key).and_then(Value::as_bool).unwrap_or(false);
        let geometry = Geometry {
            kv_lora_rank: number("kv_lora_rank")?,
            q_lora_rank: get("q_lora_rank").and_then(Value::as_u64).map(|n| n as usize),
            qk_nope_head_dim: number("qk_nope_head_dim")?,
            qk_rope_head_dim: number("qk_rope_head_dim")?,
            v_head_dim: number("v_head_dim")?,
        };
        let model_type = text("model_type", "");
        let heads = number("num_attention_heads")?;
        let layers = number("num_hidden_layers")?;
        let scaling = get("rope_scaling").filter(|s| s.as_object().is_some_and(|m| !m.is_empty()));
        let scaling = scaling.or(get("rope_parameters"));
        let rope_name = scaling
            .and_then(|s| s.get("rope_type").or_else(|| s.get("type")))
            .and_then(Value::as_str)
            .unwrap_or("default")
            .to_owned();
        let first_dense = get("first_k_dense_replace").and_then(Value::as_u64).unwrap_or(0) as usize;
        let may_route = !["youtu", "minicpm3", "plm"].contains(&model_type.as_str());
        let counts = ["n_routed_experts", "n_shared_experts"].iter().all(|k| get(k).is_some_and(Value::is_u64));
        let sparse = may_route && first_dense < layers && get("n_routed_experts").is_some();
        let routing = sparse.then(|| Routing {
            scoring: get("scoring_func").and_then(Value::as_str).map(str::to_owned),
            renormalised: flag("norm_topk_prob")
                && get("num_experts_per_tok").and_then(Value::as_u64) < get("n_routed_experts").and_then(Value::as_u64),
            method: get("topk_method").and_then(Value::as_str).map(str::to_owned),
        });
        let mut facts = Self {
            // Published models of these types bring code too, and engines have classes of their own for them.
            own_code: get("auto_map").is_some() && !NATIVE.contains(&model_type.as_str()),
            hidden: number("hidden_size")?,
            heads,
            kv_heads: get("num_key_value_heads").and_then(Value::as_u64).map_or(heads, |n| n as usize),
            layers,
            bias: flag("attention_bias"),
            rope: CandidateRope::of(&rope_name),
            no_scaling: get("rope_scaling").is_none(),
            wrapped,
            fitted: rope_name == "llama3" && scaling.is_some_and(|s| s.get("beta_fast").is_some()),
            top_level_theta: get("rope_theta").is_some()
                || rope_name == "default"
                    && scaling.and_then(|s| s.get("rope_theta")).and_then(Value::as_f64) == Some(ASSUMED_THETA),
            rope_name,
            interleaved: match model_type.as_str() {
                "minicpm3" => false,
                _ => get("rope_interleave").and_then(Value::as_bool).unwrap_or(true),
            },
            eps: get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6),
            activation: text("hidden_act", "silu"),
            tied: flag("tie_word_embeddings"),
            routing,
            null_experts: ["deepseek_v2", "deepseek_v3", "kimi_k2"].contains(&model_type.as_str()) && !counts,
            sglang_keys: ["moe_layer_freq", "scoring_func", "topk_method"].iter().all(|k| get(k).is_some()),
            sparse_index: get("index_topk").is_some(),
            f16: ["float16", "half"].contains(&text("dtype", &text("torch_dtype", "")).as_str()),
            quantised: get("quantization_config")
                .map(|q| q.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed").to_owned()),
            intermediate: get("intermediate_size").and_then(Value::as_u64).unwrap_or(0) as usize,
            neutral_norms: false,
            constant_latent: false,
            model_type,
            ..Self::plain(geometry)
        };
        if let Some(tensors) = tensors {
            facts.read_tensors(tensors);
        }
        Ok(facts)
    }

    fn read_tensors(&mut self, tensors: &TensorDirectory) {
        let ends = |suffix: &str| tensors.names().any(|n| n.ends_with(suffix));
        self.stray_biases =
            ["q_proj.bias", "q_b_proj.bias", "kv_b_proj.bias"].iter().any(|b| ends(&format!("self_attn.{b}")));
        self.biases_match = ends("self_attn.kv_a_proj_with_mqa.bias") == self.bias;
        self.head_norms = ends("self_attn.q_norm.weight") || ends("self_attn.k_norm.weight");
        self.latent_norms = ends("self_attn.kv_a_layernorm.weight")
            && (self.geometry.q_lora_rank.is_none() || ends("self_attn.q_a_layernorm.weight"));
        self.head = ends("lm_head.weight");
        let further = format!("model.layers.{}.", self.layers);
        self.further_layers = tensors.names().any(|n| n.starts_with(&further));
        self.shared_expert = self.routing.is_none() || ends("mlp.shared_experts.down_proj.weight");
        let (latent, query) = (self.geometry.kv_lora_rank, self.geometry.q_lora_rank);
        if let Some(weight) = values(tensors, "self_attn.kv_a_layernorm.weight") {
            // A norm that is made the identity by its epsilon has weights of hundreds, where trained ones are near one; one that
            // a constant outweighs has a weight of zero for it, and the latent has a bias there.
            self.neutral_norms = weight.iter().fold(f32::INFINITY, |m, x| m.min(x.abs())) > 16.0;
            self.constant_latent = values(tensors, "self_attn.kv_a_proj_with_mqa.bias")
                .is_some_and(|bias| weight.iter().zip(bias.iter()).any(|(w, b)| *w == 0.0 && b.abs() >= 256.0));
        }
        let kv = self.rows_of(tensors, "self_attn.kv_a_proj_with_mqa.weight", latent);
        let q = query.and_then(|rank| self.rows_of(tensors, "self_attn.q_a_proj.weight", rank));
        self.rows = kv.into_iter().chain(q).min().unwrap_or(LatentRows::Usual);
    }

    /// Size of the first `rank` rows of the first tensor of this name; `None` where there is none in floating point.
    fn rows_of(&self, tensors: &TensorDirectory, suffix: &str, rank: usize) -> Option<LatentRows> {
        /// 2^-14.
        const SMALLEST_F16: f32 = 6.103_515_6e-5;
        let rows = values(tensors, suffix)?;
        let largest = rows.iter().take(rank * self.hidden).fold(0f32, |m, x| m.max(x.abs()));
        Some(match largest {
            0.0 if self.neutral_norms => LatentRows::Lost,
            x if x > 0.0 && x < SMALLEST_F16 => LatentRows::Tiny,
            _ => LatentRows::Usual,
        })
    }

    /// Values the latent cache holds per token and layer, `r + d_R`.
    pub fn cache_width(&self) -> usize {
        self.geometry.kv_lora_rank + self.geometry.qk_rope_head_dim
    }

    /// `(nope, rope, v)`.
    pub(super) fn head_shape(&self) -> (usize, usize, usize) {
        (self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim, self.geometry.v_head_dim)
    }

    pub(super) fn is(&self, model_types: &[&str]) -> bool {
        model_types.contains(&self.model_type.as_str())
    }
}

//! `config.json` of each target class.

use serde_json::{Map, Value, json};

use super::rope::RopeConfig;
use super::spec::{LATENT_EPS, TargetSpec};
use super::{REMOTE_FILE, fp8};
use crate::arch::{Architecture, Hybrid, QkNormScope};
use crate::convert::TargetKind;
use crate::source::Dtype;

/// What a config is made from.
struct Made<'a> {
    spec: &'a TargetSpec,
    arch: &'a Architecture,
    rope: &'a RopeConfig,
    max_position: usize,
}

impl TargetSpec {
    /// `config.json`. Special token ids come from the source's; nothing else of it survives.
    pub fn config(&self, arch: &Architecture, source: &Value, rope: &RopeConfig, max_position: usize) -> Value {
        let made = Made { spec: self, arch, rope, max_position };
        let mut map = made.common();
        map.extend(match self.kind {
            TargetKind::HfRemote => made.remote(),
            TargetKind::Youtu => made.stock("YoutuForCausalLM", "youtu", Value::Null),
            TargetKind::Minicpm3 => made.stock("MiniCPM3ForCausalLM", "minicpm3", made.minicpm3()),
            TargetKind::DeepseekV2 => made.stock("DeepseekV2ForCausalLM", "deepseek_v2", made.experts()),
            _ => made.stock("DeepseekV3ForCausalLM", "deepseek_v3", made.experts()),
        });
        if self.fp8 {
            map.insert(
                "quantization_config".into(),
                json!({
                    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [fp8::BLOCK, fp8::BLOCK]
                }),
            );
        }
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(value) = source.get(key) {
                map.insert(key.to_owned(), value.clone());
            }
        }
        Value::Object(map)
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

impl Made<'_> {
    fn common(&self) -> Map<String, Value> {
        let (spec, arch, g) = (self.spec, self.arch, self.spec.output());
        object(json!({
            "vocab_size": arch.vocab,
            "hidden_size": arch.hidden,
            "intermediate_size": arch.intermediate,
            "num_hidden_layers": arch.layers,
            "num_attention_heads": arch.heads,
            "num_key_value_heads": arch.heads,
            "kv_lora_rank": g.kv_lora_rank,
            "q_lora_rank": g.q_lora_rank,
            "qk_nope_head_dim": g.qk_nope_head_dim,
            "qk_rope_head_dim": g.qk_rope_head_dim,
            "qk_head_dim": g.qk_nope_head_dim + g.qk_rope_head_dim,
            "head_dim": g.qk_rope_head_dim,
            "v_head_dim": g.v_head_dim,
            "max_position_embeddings": self.max_position,
            "hidden_act": arch.activation.name(),
            "attention_bias": spec.bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "use_cache": true,
            "initializer_range": 0.02,
            "torch_dtype": match spec.base {
                Dtype::Bf16 => "bfloat16",
                Dtype::F16 => "float16",
                _ => "float32",
            },
        }))
    }

    /// Keys of the stock classes, with `more` of one class.
    fn stock(&self, class: &str, model_type: &str, more: Value) -> Map<String, Value> {
        let mut map = object(json!({
            "architectures": [class],
            "model_type": model_type,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.scaling,
            "rope_interleave": self.spec.kind != TargetKind::Minicpm3,
            "rms_norm_eps": LATENT_EPS,
            "pretraining_tp": 1,
        }));
        map.extend(object(more));
        map
    }

    /// Experts, or the absence of them said the way every loader can do arithmetic on.
    fn experts(&self) -> Value {
        let Some(moe) = &self.arch.moe else {
            return json!({
                "first_k_dense_replace": self.arch.layers,
                "moe_layer_freq": 1,
                "moe_intermediate_size": 128,
                "n_routed_experts": 2,
                "num_experts_per_tok": 1,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "norm_topk_prob": false,
                "routed_scaling_factor": 1.0,
                "num_nextn_predict_layers": 0,
            });
        };
        json!({
            "first_k_dense_replace": moe.sparse.iter().position(|s| *s).unwrap_or(self.arch.layers),
            "moe_layer_freq": 1,
            "moe_intermediate_size": moe.width,
            "n_routed_experts": moe.experts,
            "num_experts_per_tok": moe.per_token,
            // Where the source has no shared expert, one of zeros is written.
            "n_shared_experts": moe.shared_width.map_or(1, |w| w / moe.width.max(1)),
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": moe.renormalise,
            "routed_scaling_factor": moe.scale,
            "num_nextn_predict_layers": 0,
        })
    }

    /// Multipliers that change nothing.
    fn minicpm3(&self) -> Value {
        json!({
            "scale_emb": 1,
            "scale_depth": (self.arch.layers as f64).sqrt(),
            "dim_model_base": self.arch.hidden,
            "mlp_bias": false,
        })
    }

    /// Keys of the generic class.
    fn remote(&self) -> Map<String, Value> {
        let arch = self.arch;
        let names = arch.names.layer(0);
        let module = REMOTE_FILE.0.trim_end_matches(".py");
        let gqa = arch.gqa();
        let amplitude = arch.rope.amplitude.powi(2);
        let window = arch.windows.iter().flatten().next();
        let mut map = object(json!({
            "architectures": ["Gqa2MlaForCausalLM"],
            "model_type": "gqa2mla",
            "auto_map": {
                "AutoConfig": format!("{module}.Gqa2MlaConfig"),
                "AutoModel": format!("{module}.Gqa2MlaModel"),
                "AutoModelForCausalLM": format!("{module}.Gqa2MlaForCausalLM"),
            },
            "rms_norm_eps": arch.norm_eps,
            "latent_norm": false,
            "query_bias": self.spec.query_bias,
            "mlp_bias": arch.mlp_bias,
            "attention_scale": gqa.map(|a| a.score_scale * amplitude),
            "rotary_frequencies": self.rope.frequencies,
            "score_softcap": arch.score_softcap,
            "logit_softcap": arch.logit_softcap,
            "embedding_multiplier": arch.multipliers.embedding,
            // Folded into what is added to the stream.
            "residual_multiplier": 1.0,
            "logit_multiplier": arch.multipliers.logits,
            "input_norm": names.has("input_norm"),
            "post_norm": names.has("post_norm"),
            "attention_out_norm": names.has("attention_out_norm"),
            "mlp_out_norm": names.has("mlp_out_norm"),
        }));
        if let Some(long) = &self.rope.long {
            map.insert("rotary_frequencies_long".into(), json!(long.inv_freq));
            map.insert("original_max_position_embeddings".into(), json!(long.original));
        }
        if self.spec.qk_norm {
            let scope = if arch.qk_norm == Some(QkNormScope::All) { "all" } else { "head" };
            map.insert("qk_norm".into(), json!(scope));
            map.insert("qk_norm_width".into(), json!(gqa.map(|a| a.head_dim)));
        }
        if let Some(kept) = Hybrid::config(arch, &self.spec.kept).filter(|_| self.spec.kept.contains(&true)) {
            map.insert("gqa".into(), kept);
        }
        // Windows at least as long as the context change nothing.
        if let Some(window) = window.filter(|w| **w < self.max_position) {
            map.insert("window_size".into(), json!(window));
            map.insert("window_layers".into(), arch.windows.iter().map(Option::is_some).collect());
        }
        if let Some(moe) = &arch.moe {
            let dense: Vec<usize> = (0..arch.layers).filter(|i| !arch.is_sparse(*i)).collect();
            map.extend(object(json!({
                "n_routed_experts": moe.experts,
                "num_experts_per_tok": moe.per_token,
                "moe_intermediate_size": moe.width,
                "norm_topk_prob": moe.renormalise,
                "shared_expert_intermediate_size": moe.shared_width,
                "shared_expert_gate": moe.shared_gated,
                "dense_layers": dense,
            })));
        }
        map
    }
}

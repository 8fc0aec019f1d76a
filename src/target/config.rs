//! `config.json` of the output: the keys that all classes share; each class adds its own.

use serde_json::{Map, Value, json};

use super::class::ConfigInput;
use super::fp8;
use super::rope::RopeConfig;
use super::spec::TargetSpec;
use crate::arch::Architecture;
use crate::source::Dtype;

/// The map of a JSON object; empty for any other value.
pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Name of a dtype in a config: that of its weights.
pub fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

impl TargetSpec {
    /// `config.json`. Special token ids come from the source's; nothing else of it survives.
    pub fn config(&self, arch: &Architecture, source: &Value, rope: &RopeConfig, max_position: usize) -> Value {
        let g = self.output();
        let mut map = object(json!({
            "architectures": [self.class.architecture()],
            "model_type": self.class.model_type(),
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
            "max_position_embeddings": max_position,
            "hidden_act": arch.activation.name(),
            "rms_norm_eps": self.norm_eps(arch),
            "attention_bias": self.bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "use_cache": true,
            "initializer_range": 0.02,
            "torch_dtype": torch_name(self.storage.base()),
        }));
        map.extend(self.class.config(&ConfigInput { spec: self, arch, rope, max_position }));
        if self.storage.is_fp8() {
            map.insert("quantization_config".into(), fp8::config());
        }
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(value) = source.get(key) {
                map.insert(key.to_owned(), value.clone());
            }
        }
        Value::Object(map)
    }
}

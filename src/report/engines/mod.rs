//! Which engines run an MLA checkpoint, as data.
//!
//! Rules about transformers, MLX-LM, llama.cpp and mistral.rs are held to runs of these engines: `scripts/engines/check_engines.py`
//! asks `check` first and then the engine (docs/engines.md has the versions). Those about SGLang, and about GPU kernels of
//! vLLM, state what was read in their sources. An engine whose rules have nothing to say about a checkpoint runs it as it is.

mod facts;
mod rules;

pub use facts::{CandidateRope, Facts, FactsError, LatentRows, Routing};

use serde::Serialize;

/// Whether an engine takes a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loads {
    /// As it is.
    Yes,
    /// With the setting, or the limit, that the reasons name.
    Conditionally,
    /// No rule is about this class of model.
    NotKnown,
    /// Not, or only with wrong results.
    No,
}

impl Loads {
    /// A word for tables.
    pub fn word(self) -> &'static str {
        match self {
            Loads::Yes => "yes",
            Loads::Conditionally => "if",
            Loads::NotKnown => "not known",
            Loads::No => "no",
        }
    }
}

/// Verdict on one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineVerdict {
    /// Engine and, where it has several, the code path.
    pub engine: &'static str,
    /// Whether it takes the checkpoint.
    pub loads: Loads,
    /// What makes it so, one sentence each. What would be a condition goes unsaid where something else forbids.
    pub reasons: Vec<&'static str>,
    /// What to change for each reason.
    pub changes: Vec<&'static str>,
    /// What the folder is not for, although the engine runs it; one sentence each.
    pub warnings: Vec<&'static str>,
}

/// Engines as `check --engine` names them.
pub const ENGINE_NAMES: [&str; 7] =
    ["transformers", "transformers-4", "vllm", "sglang", "llama.cpp", "mlx", "mistral.rs"];

/// Verdicts of every engine, in a fixed order.
pub fn judge(facts: &Facts) -> Vec<EngineVerdict> {
    let verdict = |engine: &'static str| {
        let applies = |r: &&rules::Rule| r.engines.contains(&engine) && (r.when)(facts);
        // What other rules would say of a class that none of them is about means nothing.
        let speaks = |r: &&rules::Rule| !rules::unknown(facts) || r.then == Loads::NotKnown;
        let hits: Vec<_> = rules::RULES.iter().filter(applies).filter(speaks).collect();
        let loads = hits.iter().map(|r| r.then).max().unwrap_or(Loads::Yes);
        let decisive = || hits.iter().filter(|r| r.then == loads);
        EngineVerdict {
            engine,
            loads,
            reasons: decisive().map(|r| r.why).collect(),
            changes: decisive().map(|r| r.change).collect(),
            warnings: warnings(engine, facts),
        }
    };
    rules::ENGINES.into_iter().map(verdict).collect()
}

/// What trainers, which use this engine, should know of the folder.
fn warnings(engine: &str, facts: &Facts) -> Vec<&'static str> {
    let trains = [rules::TRANSFORMERS, rules::TRANSFORMERS_4].contains(&engine);
    match trains && facts.neutral_norms && !facts.constant_latent {
        true => vec![rules::NOT_FOR_TRAINING],
        false => Vec::new(),
    }
}

/// The code path that an engine of [`ENGINE_NAMES`] takes by itself.
pub fn default_path(engine: &str, facts: &Facts) -> Option<&'static str> {
    match engine {
        "transformers" => Some(rules::TRANSFORMERS),
        "transformers-4" => Some(rules::TRANSFORMERS_4),
        // vLLM runs transformers' code for classes it has not.
        "vllm" if facts.is(&["youtu"]) => Some(rules::VLLM_TF),
        "vllm" => Some(rules::VLLM),
        "sglang" => Some(rules::SGLANG),
        "llama.cpp" => Some(rules::LLAMA),
        "mlx" => Some(rules::MLX),
        "mistral.rs" => Some(rules::MISTRAL),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{Geometry, RopeGrid};
    use crate::target::classes::deepseek_v3::TARGET;

    fn shape(r: usize, nope: usize, rope: usize, v: usize) -> Geometry {
        Geometry { kv_lora_rank: r, q_lora_rank: None, qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: v }
    }

    fn verdict(c: &Facts, engine: &str) -> Loads {
        judge(c).into_iter().find(|v| v.engine == engine).map(|v| v.loads).expect("a known engine")
    }

    #[test]
    fn deepseeks_own_shape_loads_everywhere() {
        let c = Facts::planned(shape(512, 128, 64, 128), RopeGrid::Stock, TARGET);
        for engine in ["transformers", "vLLM", "vLLM (--model-impl transformers)", "SGLang", "MLX-LM"] {
            assert_eq!(verdict(&c, engine), Loads::Yes, "{engine}");
        }
        // Only because the query has no latent.
        assert_eq!(verdict(&c, "llama.cpp"), Loads::Conditionally);
    }

    #[test]
    fn free_frequencies_and_biases_load_where_transformers_code_runs() {
        let c = Facts::planned(shape(512, 128, 64, 128), RopeGrid::Free, TARGET);
        assert_eq!(verdict(&c, "transformers"), Loads::Yes);
        assert_eq!(verdict(&c, "vLLM (--model-impl transformers)"), Loads::Yes);
        for engine in ["vLLM", "SGLang", "llama.cpp", "MLX-LM"] {
            assert_eq!(verdict(&c, engine), Loads::No, "{engine}");
        }
    }

    #[test]
    fn a_no_comes_with_everything_that_forbids() {
        let c = Facts::planned(shape(128, 64, 64, 64), RopeGrid::Free, TARGET);
        let vllm = judge(&c).into_iter().find(|v| v.engine == "vLLM").expect("vLLM");
        assert_eq!((vllm.loads, vllm.reasons.len()), (Loads::No, 2));
        assert_eq!(vllm.reasons.len(), vllm.changes.len());
    }

    #[test]
    fn every_rule_names_known_engines_and_what_to_do() {
        for rule in rules::RULES {
            assert!(!rule.engines.is_empty() && rule.then != Loads::Yes, "{}", rule.why);
            assert!(rule.engines.iter().all(|e| rules::ENGINES.contains(e)), "{}", rule.why);
            assert!(!rule.why.is_empty() && !rule.change.is_empty());
        }
    }

    #[test]
    fn a_class_that_no_rule_is_about_is_not_judged() {
        let config = serde_json::json!({
            "model_type": "glm4_moe_lite", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
            "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16
        });
        let verdicts = judge(&Facts::read(&config, None).expect("an MLA config"));
        assert!(verdicts.iter().all(|v| v.loads == Loads::NotKnown && v.reasons.len() == 1), "{verdicts:?}");
        // Code beside the weights is judged as such.
        let mut own = config;
        own["auto_map"] = serde_json::json!({ "AutoConfig": "x.Y" });
        let verdicts = judge(&Facts::read(&own, None).expect("an MLA config"));
        assert!(verdicts.iter().all(|v| v.loads != Loads::NotKnown), "{verdicts:?}");
    }

    #[test]
    fn the_language_model_in_a_wrapper_is_judged() {
        let plain = shape(512, 64, 64, 128);
        let inner = serde_json::json!({
            "model_type": "kimi_k2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
            "kv_lora_rank": plain.kv_lora_rank, "qk_nope_head_dim": plain.qk_nope_head_dim,
            "qk_rope_head_dim": plain.qk_rope_head_dim, "v_head_dim": plain.v_head_dim, "n_routed_experts": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 2, "moe_layer_freq": 1, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "rms_norm_eps": 1e-6, "rope_theta": 1e4
        });
        for key in ["text_config", "language_config"] {
            let config = serde_json::json!({ "model_type": "kimi_k25", key: inner.clone() });
            let facts = Facts::read(&config, None).expect("an MLA config inside");
            assert_eq!((facts.model_type.as_str(), facts.geometry), ("kimi_k2", plain));
            assert!(
                facts.wrapped && judge(&facts).iter().all(|v| v.loads == Loads::Conditionally),
                "{:?}",
                judge(&facts)
            );
        }
    }

    #[test]
    fn rows_that_a_dtype_lost_are_told() {
        let mut c = Facts::planned(shape(512, 64, 64, 128), RopeGrid::Stock, TARGET);
        c.rows = LatentRows::Lost;
        assert!(judge(&c).iter().all(|v| v.loads == Loads::No && v.reasons.len() == 1), "{:?}", judge(&c));
        c.rows = LatentRows::Tiny;
        c.f16 = true;
        assert_eq!(verdict(&c, "transformers"), Loads::No);
        c.rows = LatentRows::Usual;
        assert_eq!(verdict(&c, "transformers"), Loads::Yes);
    }

    #[test]
    fn what_transmla_wrote_is_told() {
        let config = serde_json::json!({
            "model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": null, "attention_bias": true, "rms_norm_eps": 1e-5
        });
        let verdicts = judge(&Facts::read(&config, None).expect("an MLA config"));
        assert!(verdicts.iter().all(|v| v.loads == Loads::No));
        assert!(verdicts[0].reasons.len() >= 2, "{:?}", verdicts[0]);
        assert!(Facts::read(&serde_json::json!({ "model_type": "llama" }), None).is_err());
    }
}

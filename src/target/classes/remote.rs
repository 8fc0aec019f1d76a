//! `hf-remote`: the generic class of this tool, as a modeling file beside the weights (docs/targets.md, section 13).

use serde_json::{Map, Value, json};

use super::stock;
use crate::arch::{Architecture, Hybrid, QkNormScope, Scoring};
use crate::target::Target;
use crate::target::class::{Class, ClassFile, ConfigInput};
use crate::target::config::object;

/// Registry line of the class.
pub const TARGET: Target = Target::new(&Remote);

/// The modeling file.
const CODE: ClassFile = ("modeling_gqa2mla.py", include_str!("../remote/modeling_gqa2mla.py"));

/// The generic class: it has what stock classes have no place for, and needs none of the tricks that these need.
#[derive(Debug)]
struct Remote;

impl Class for Remote {
    fn name(&self) -> &'static str {
        "hf-remote"
    }

    fn id(&self) -> &'static str {
        "hf_remote"
    }

    fn model_type(&self) -> &'static str {
        "gqa2mla"
    }

    fn architecture(&self) -> &'static str {
        "Gqa2MlaForCausalLM"
    }

    fn obstacles(&self, arch: &Architecture, _linear_norms: bool) -> Vec<String> {
        let mut out = stock::unsupported(arch);
        if arch.moe.as_ref().is_some_and(|m| m.scoring == Scoring::Sigmoid) {
            out.push("sigmoid routing".to_owned());
        }
        out
    }

    fn files(&self) -> &'static [ClassFile] {
        &[CODE]
    }

    fn norms_latents(&self) -> bool {
        false
    }

    fn fp8_obstacle(&self) -> Option<&'static str> {
        Some("no engine reads block scales in a class of ours")
    }

    fn has_windows(&self) -> bool {
        true
    }

    fn has_own_score_scale(&self) -> bool {
        true
    }

    fn has_any_frequencies(&self) -> bool {
        true
    }

    fn has_query_biases(&self) -> bool {
        true
    }

    fn has_multipliers(&self) -> bool {
        true
    }

    fn holds_two_kinds_of_layers(&self) -> bool {
        true
    }

    fn needs_shared_expert(&self) -> bool {
        false
    }

    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value> {
        let ConfigInput { spec, arch, rope, .. } = *input;
        let module = CODE.0.trim_end_matches(".py");
        let gqa = arch.gqa();
        let amplitude = arch.rope.amplitude.powi(2);
        let mut map = object(json!({
            "auto_map": {
                "AutoConfig": format!("{module}.Gqa2MlaConfig"),
                "AutoModel": format!("{module}.Gqa2MlaModel"),
                "AutoModelForCausalLM": format!("{module}.{}", self.architecture()),
            },
            "latent_norm": false,
            "query_bias": spec.query_bias,
            "mlp_bias": arch.mlp_bias,
            // Of an MLA source the amplitude is in the rotated rows.
            "attention_scale": match (gqa, arch.mla()) {
                (Some(a), _) => Some(a.score_scale * amplitude),
                (None, mla) => mla.map(|a| a.score_scale),
            },
            "rotary_frequencies": rope.frequencies,
            "score_softcap": arch.score_softcap,
            "logit_softcap": arch.logit_softcap,
            "embedding_multiplier": arch.multipliers.embedding,
            // Folded into what is added to the stream.
            "residual_multiplier": 1.0,
            "logit_multiplier": arch.multipliers.logits,
        }));
        let names = arch.names.layer(0);
        for norm in ["input_norm", "post_norm", "attention_out_norm", "mlp_out_norm"] {
            map.insert(norm.to_owned(), json!(names.has(norm)));
        }
        if let Some(long) = &rope.long {
            map.insert("rotary_frequencies_long".into(), json!(long.inv_freq));
            map.insert("original_max_position_embeddings".into(), json!(long.original));
        }
        if spec.head_norms {
            let scope = if arch.qk_norm == Some(QkNormScope::All) { "all" } else { "head" };
            map.insert("qk_norm".into(), json!(scope));
            map.insert("qk_norm_width".into(), json!(gqa.map(|a| a.head_dim)));
        }
        if let Some(kept) = Hybrid::config(arch, &spec.kept).filter(|_| spec.kept.contains(&true)) {
            map.insert("gqa".into(), kept);
        }
        map.extend(windows(input));
        map.extend(experts(arch));
        map
    }
}

/// Sliding windows; windows at least as long as the context change nothing.
fn windows(input: &ConfigInput<'_>) -> Map<String, Value> {
    let windows = &input.arch.windows;
    let Some(window) = windows.iter().flatten().next().filter(|w| **w < input.max_position) else {
        return Map::new();
    };
    let layers: Vec<bool> = windows.iter().map(Option::is_some).collect();
    object(json!({ "window_size": window, "window_layers": layers }))
}

/// Experts, where the source has some.
fn experts(arch: &Architecture) -> Map<String, Value> {
    let Some(moe) = &arch.moe else { return Map::new() };
    let dense: Vec<usize> = (0..arch.layers).filter(|i| !arch.is_sparse(*i)).collect();
    object(json!({
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": moe.renormalise,
        "shared_expert_intermediate_size": moe.shared_width,
        "shared_expert_gate": moe.shared_gated,
        "dense_layers": dense,
    }))
}

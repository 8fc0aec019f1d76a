//! What the stock classes of transformers with DeepSeek's latent attention share (docs/targets.md, sections 1 and 15).

use serde_json::{Map, Value, json};

use crate::arch::{Activation, Architecture, MlpKind};
use crate::target::class::{Class, ConfigInput};
use crate::target::config::object;

/// What no class holds, neither stock nor ours.
pub fn unsupported(arch: &Architecture) -> Vec<String> {
    let partial = arch.gqa().is_some_and(|a| a.rotary_dim != a.head_dim);
    let tests = [
        (partial && arch.qk_norm.is_some(), "norms of heads that are rotated in part"),
        (arch.mlp == MlpKind::Plain, "an MLP without a gate"),
        (
            arch.moe.as_ref().is_some_and(|m| m.groups.is_some() || m.choice_bias),
            "experts chosen by groups or with a bias",
        ),
    ];
    present(&tests)
}

/// What no stock class holds, experts not counted.
pub fn obstacles(arch: &Architecture, linear_norms: bool) -> Vec<String> {
    let names = arch.names.layer(0);
    let mut out = unsupported(arch);
    let tests = [
        (arch.qk_norm.is_some() && !linear_norms, "norms of queries and keys"),
        (arch.score_softcap.is_some(), "capped attention scores"),
        (arch.logit_softcap.is_some(), "capped logits"),
        (names.has("attention_out_norm") || names.has("mlp_out_norm"), "norms after attention and MLP"),
        (!names.has("input_norm") || !names.has("post_norm"), "layers without norms before attention and MLP"),
        (arch.mlp_bias, "biases in the MLP"),
    ];
    out.extend(present(&tests));
    if arch.activation != Activation::Silu {
        out.push(format!("the activation `{}`", arch.activation.name()));
    }
    out
}

/// What a class that does not route by softmax cannot hold of experts. `why`: what it does instead.
pub fn softmax_experts(arch: &Architecture, why: &str) -> Option<String> {
    let moe = arch.moe.as_ref()?;
    Some(format!("softmax routing over {} experts: the class {why}", moe.experts))
}

fn present(tests: &[(bool, &str)]) -> Vec<String> {
    tests.iter().filter(|(there, _)| *there).map(|(_, what)| (*what).to_owned()).collect()
}

/// Keys of a stock class, with `more` of one class.
pub fn config(class: &impl Class, input: &ConfigInput<'_>, more: Value) -> Map<String, Value> {
    let mut map = object(json!({
        "rope_theta": input.rope.theta,
        "rope_scaling": input.rope.scaling,
        "rope_interleave": class.interleaves_pairs(),
        "pretraining_tp": 1,
    }));
    map.extend(object(more));
    map
}

/// Experts, or the absence of them said the way every loader can do arithmetic on (docs/targets.md, section 6).
pub fn experts(arch: &Architecture) -> Value {
    let Some(moe) = &arch.moe else {
        return json!({
            "first_k_dense_replace": arch.layers,
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
        "first_k_dense_replace": moe.sparse.iter().position(|s| *s).unwrap_or(arch.layers),
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

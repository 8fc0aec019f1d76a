//! Which target class can hold a source, and why another cannot.

use super::TargetKind;
use crate::arch::{Activation, Architecture, MlpKind, Moe, Scoring};

/// What `kind` has no place for in `arch`, in plain words. `linear_norms`: norms of queries and keys are replaced by linear
/// maps before the target sees them.
pub fn obstacles(arch: &Architecture, kind: TargetKind, linear_norms: bool) -> Vec<String> {
    let mut out = Vec::new();
    let names = arch.names.layer(0);
    let partial = arch.gqa().is_some_and(|a| a.rotary_dim != a.head_dim);
    if partial && arch.qk_norm.is_some() {
        out.push("norms of heads that are rotated in part".to_owned());
    }
    if arch.mlp == MlpKind::Plain {
        out.push("an MLP without a gate".to_owned());
    }
    if arch.moe.as_ref().is_some_and(|m| m.groups.is_some() || m.choice_bias) {
        out.push("experts chosen by groups or with a bias".to_owned());
    }
    if kind == TargetKind::HfRemote {
        if arch.moe.as_ref().is_some_and(|m| m.scoring == Scoring::Sigmoid) {
            out.push("sigmoid routing".to_owned());
        }
        return out;
    }
    let tests = [
        (arch.qk_norm.is_some() && !linear_norms, "norms of queries and keys"),
        (arch.score_softcap.is_some(), "capped attention scores"),
        (arch.logit_softcap.is_some(), "capped logits"),
        (names.has("attention_out_norm") || names.has("mlp_out_norm"), "norms behind attention and MLP"),
        (!names.has("input_norm") || !names.has("post_norm"), "layers without norms before attention and MLP"),
        (arch.mlp_bias, "biases in the MLP"),
    ];
    out.extend(tests.iter().filter(|(found, _)| *found).map(|(_, what)| (*what).to_owned()));
    if arch.activation != Activation::Silu {
        out.push(format!("the activation `{}`", arch.activation.name()));
    }
    if let Some(moe) = &arch.moe {
        out.extend(routing(moe, kind));
    }
    if kind == TargetKind::DeepseekV2 && !arch.hidden.is_multiple_of(arch.heads) {
        out.push(format!("a hidden size ({}) that {} heads do not divide", arch.hidden, arch.heads));
    }
    out
}

/// What of a mixture of experts a stock class cannot hold.
fn routing(moe: &Moe, kind: TargetKind) -> Option<String> {
    if kind != TargetKind::DeepseekV2 {
        let class = if kind == TargetKind::DeepseekV3 { "routes by sigmoid" } else { "is dense" };
        return Some(format!("softmax routing over {} experts: the class {class}", moe.experts));
    }
    let first = moe.sparse.iter().position(|s| *s).unwrap_or(0);
    if moe.scoring != Scoring::Softmax {
        return Some("sigmoid routing".to_owned());
    }
    if moe.shared_gated {
        return Some("a gate on the shared expert".to_owned());
    }
    if !moe.sparse[first..].iter().all(|s| *s) {
        return Some("dense layers above layers of experts".to_owned());
    }
    if moe.shared_width.is_some_and(|w| !w.is_multiple_of(moe.width)) {
        return Some("a shared expert whose width is no multiple of an expert's".to_owned());
    }
    None
}

/// Pick the class: the first, in order of how many engines load it, that holds the source. With the reason.
pub fn choose(arch: &Architecture, linear_norms: bool) -> (TargetKind, String) {
    let against = obstacles(arch, TargetKind::DeepseekV3, linear_norms);
    if against.is_empty() {
        return (TargetKind::DeepseekV3, "holds everything the source has, and most engines load it".to_owned());
    }
    // transformers ignores `norm_topk_prob` in this class, so it is picked only where that is false.
    let renormalised = arch.moe.as_ref().is_some_and(|m| m.renormalise && m.per_token < m.experts);
    if obstacles(arch, TargetKind::DeepseekV2, linear_norms).is_empty() && !renormalised {
        return (TargetKind::DeepseekV2, "routes as the source does".to_owned());
    }
    let renormalised = if renormalised && against.len() == 1 {
        "; `--target deepseek_v2` routes so too in vLLM and SGLang, but transformers ignores its `norm_topk_prob`"
    } else {
        ""
    };
    (TargetKind::HfRemote, format!("no stock class holds {}{renormalised}", against.join(", ")))
}

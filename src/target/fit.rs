//! What of a source a target class has no place for.

use crate::arch::{Activation, Architecture};

/// What DeepSeek's stock classes have no place for in `arch`, in plain words.
pub fn obstacles(arch: &Architecture) -> Vec<String> {
    let mut out = Vec::new();
    let names = arch.names.layer(0);
    let gqa = arch.gqa();
    let tests = [
        (arch.qk_norm.is_some(), "norms of queries and keys"),
        (arch.score_softcap.is_some(), "capped attention scores"),
        (arch.logit_softcap.is_some(), "capped logits"),
        (names.has("attention_out_norm"), "norms behind attention"),
        (!names.has("input_norm"), "attention without a norm before it"),
        (arch.moe.is_some(), "experts"),
        (!names.has("q"), "fused projections"),
        (gqa.is_some_and(|a| a.rotary_dim != a.head_dim), "heads that are rotated in part"),
        (arch.multipliers.embedding != 1.0 || arch.multipliers.residual != 1.0, "multipliers"),
        (arch.rope.long.is_some(), "frequencies that change with the context"),
    ];
    out.extend(tests.iter().filter(|(found, _)| *found).map(|(_, what)| (*what).to_owned()));
    if arch.activation != Activation::Silu {
        out.push(format!("the activation `{}`", arch.activation.name()));
    }
    out
}

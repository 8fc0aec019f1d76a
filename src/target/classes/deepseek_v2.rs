//! `DeepseekV2ForCausalLM`: experts chosen by softmax (docs/targets.md, sections 6 and 10).

use serde_json::{Map, Value};

use super::stock;
use crate::arch::{Architecture, Moe, Scoring};
use crate::target::Target;
use crate::target::class::{Caveat, Class, ConfigInput};

/// Registry line of the class.
pub const TARGET: Target = Target::new(&DeepseekV2);

/// The class of DeepSeek-V2.
#[derive(Debug)]
struct DeepseekV2;

/// transformers ignores `norm_topk_prob` in this class, other engines do not.
const RENORMALISED: Caveat = Caveat {
    alternative: "`--target deepseek_v2` routes so too in vLLM and SGLang, but transformers ignores its `norm_topk_prob`",
    warning: "expert weights sum to one (`norm_topk_prob`): vLLM and SGLang honour that in deepseek_v2, transformers does not",
};

impl Class for DeepseekV2 {
    fn name(&self) -> &'static str {
        "deepseek_v2"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV2ForCausalLM"
    }

    fn obstacles(&self, arch: &Architecture, linear_norms: bool) -> Vec<String> {
        let mut out = stock::obstacles(arch, linear_norms);
        out.extend(arch.moe.as_ref().and_then(routing));
        if !arch.hidden.is_multiple_of(arch.heads) {
            out.push(format!("a hidden size ({}) that {} heads do not divide", arch.hidden, arch.heads));
        }
        out
    }

    fn caveat(&self, arch: &Architecture) -> Option<Caveat> {
        arch.moe.as_ref().filter(|m| m.renormalise && m.per_token < m.experts).map(|_| RENORMALISED)
    }

    fn merit(&self) -> &'static str {
        "routes as the source does"
    }

    fn is_portable(&self) -> bool {
        true
    }

    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value> {
        stock::config(self, input, stock::experts(input.arch))
    }
}

/// What of a mixture of experts it cannot hold.
fn routing(moe: &Moe) -> Option<String> {
    let first = moe.sparse.iter().position(|s| *s).unwrap_or(0);
    let what = if moe.scoring != Scoring::Softmax {
        "sigmoid routing"
    } else if moe.shared_gated {
        "a gate on the shared expert"
    } else if !moe.sparse[first..].iter().all(|s| *s) {
        "dense layers above layers of experts"
    } else if moe.shared_width.is_some_and(|w| !w.is_multiple_of(moe.width)) {
        "a shared expert whose width is no multiple of an expert's"
    } else {
        return None;
    };
    Some(what.to_owned())
}

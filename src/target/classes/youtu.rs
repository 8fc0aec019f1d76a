//! `YoutuForCausalLM`: dense, served by vLLM through transformers' code without a flag (docs/targets.md, section 11).

use serde_json::{Map, Value};

use super::stock;
use crate::arch::Architecture;
use crate::target::Target;
use crate::target::class::{Class, ConfigInput};

/// Registry line of the class.
pub const TARGET: Target = Target::new(&Youtu);

/// The class of Youtu.
#[derive(Debug)]
struct Youtu;

impl Class for Youtu {
    fn name(&self) -> &'static str {
        "youtu"
    }

    fn architecture(&self) -> &'static str {
        "YoutuForCausalLM"
    }

    fn obstacles(&self, arch: &Architecture, linear_norms: bool) -> Vec<String> {
        let mut out = stock::obstacles(arch, linear_norms);
        out.extend(stock::softmax_experts(arch, "is dense"));
        out
    }

    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value> {
        stock::config(self, input, Value::Null)
    }
}

//! `DeepseekV3ForCausalLM`, dense (docs/targets.md, section 9).

use serde_json::{Map, Value};

use super::stock;
use crate::arch::Architecture;
use crate::target::Target;
use crate::target::class::{Class, ConfigInput};

/// Registry line of the class.
pub const TARGET: Target = Target::new(&DeepseekV3);

/// The class of DeepSeek-V3, as a dense model.
#[derive(Debug)]
struct DeepseekV3;

impl Class for DeepseekV3 {
    fn name(&self) -> &'static str {
        "deepseek_v3"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV3ForCausalLM"
    }

    fn obstacles(&self, arch: &Architecture, linear_norms: bool) -> Vec<String> {
        let mut out = stock::obstacles(arch, linear_norms);
        out.extend(stock::softmax_experts(arch, "routes by sigmoid"));
        out
    }

    fn merit(&self) -> &'static str {
        "holds everything the source has, and most engines load it"
    }

    fn is_portable(&self) -> bool {
        true
    }

    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value> {
        stock::config(self, input, stock::experts(input.arch))
    }
}

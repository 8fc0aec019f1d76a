//! `MiniCPM3ForCausalLM`: dense, any frequencies in SGLang (docs/targets.md, section 12).

use serde_json::{Map, Value, json};

use super::stock;
use crate::arch::Architecture;
use crate::target::Target;
use crate::target::class::{Class, ConfigInput};

/// Registry line of the class.
pub const TARGET: Target = Target::new(&MiniCpm3);

/// The class of MiniCPM3.
#[derive(Debug)]
struct MiniCpm3;

impl Class for MiniCpm3 {
    fn name(&self) -> &'static str {
        "minicpm3"
    }

    fn architecture(&self) -> &'static str {
        "MiniCPM3ForCausalLM"
    }

    fn obstacles(&self, arch: &Architecture, linear_norms: bool) -> Vec<String> {
        let mut out = stock::obstacles(arch, linear_norms);
        out.extend(stock::softmax_experts(arch, "is dense"));
        out
    }

    fn interleaves_pairs(&self) -> bool {
        false
    }

    fn needs_query_latent(&self) -> bool {
        true
    }

    fn config(&self, input: &ConfigInput<'_>) -> Map<String, Value> {
        // Multipliers that change nothing.
        let multipliers = json!({
            "scale_emb": 1,
            "scale_depth": (input.arch.layers as f64).sqrt(),
            "dim_model_base": input.arch.hidden,
            "mlp_bias": false,
        });
        stock::config(self, input, multipliers)
    }
}

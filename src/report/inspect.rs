//! What a model is and what it could become, from its config alone.

use serde::Serialize;

use super::SCHEMA_VERSION;
use super::engines::{EngineVerdict, Facts, judge};
use crate::arch::{Architecture, Attention, GqaShape, MlpKind};
use crate::methods::MethodChoice;
use crate::mla::Geometry;
use crate::source::{Dtype, DtypeExt};
use crate::target::{RopeGrid, choose};

/// Bytes of one cached value: engines hold the cache in bf16 unless told otherwise.
const CACHE_VALUE_BYTES: u64 = 2;

/// What `inspect` says of one model.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct InspectedModel {
    pub schema_version: u32,
    /// The model as the user named it.
    pub model: String,
    pub family: String,
    pub model_type: String,
    /// `mha`, `gqa`, `mqa`, `mla`, or `hybrid` where some layers of an MLA model have grouped-query attention.
    pub attention: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    /// `None` for MLA.
    pub kv_heads: Option<usize>,
    /// `None` for MLA.
    pub head_dim: Option<usize>,
    /// `None` unless MLA.
    pub mla: Option<InspectedMla>,
    /// Layers of a hybrid that have grouped-query attention.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gqa_layers: Option<InspectedGqa>,
    pub intermediate: usize,
    /// Activation of the MLP, as configs name it.
    pub activation: &'static str,
    /// Whether the MLP has a gate.
    pub gated_mlp: bool,
    /// `None` where every layer is dense.
    pub experts: Option<InspectedExperts>,
    /// Layers after the last that predict further tokens; no other figure counts them, and they are not run.
    pub mtp_layers: usize,
    pub vocab: usize,
    pub max_position: usize,
    pub rope_type: String,
    pub rope_theta: f64,
    pub qkv_bias: bool,
    pub out_bias: bool,
    pub tied_head: bool,
    pub sliding_window: Option<usize>,
    /// Parameters stored; a tied head counts once.
    pub parameters: u64,
    /// Those that a token meets: experts it does not go to are not counted.
    pub active_parameters: u64,
    /// Bytes of the weights: as stored, or for the config's dtype where the weights are not there.
    pub weight_bytes: u64,
    /// Name of the weights' dtype.
    pub weight_dtype: String,
    /// Whether weight files were seen; otherwise everything here follows from the config.
    pub weights_present: bool,
    /// Of a hybrid, in its MLA layers.
    pub kv_values_per_token_per_layer: usize,
    /// With a bf16 cache.
    pub kv_bytes_per_token_per_layer: u64,
    /// With a bf16 cache, all layers.
    pub kv_bytes_per_token: u64,
    /// With a bf16 cache, all layers, `max_position` tokens.
    pub kv_bytes_at_max_position: u64,
    /// Cache budgets and the engines that would load each; for an MLA model its own shape.
    pub targets: Vec<TargetOption>,
}

/// Widths of an MLA model.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct InspectedMla {
    /// The widths.
    #[serde(flatten)]
    pub geometry: Geometry,
    /// Epsilon of the latent norms.
    pub latent_eps: f64,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, Serialize)]
#[allow(missing_docs)]
pub struct InspectedExperts {
    pub routed: usize,
    pub per_token: usize,
    /// Width of a routed expert.
    pub width: usize,
    /// Width of what sees every token, 0 where there is none.
    pub shared_width: usize,
    /// Layers that have experts.
    pub layers: usize,
    /// `softmax` or `sigmoid`.
    pub scoring: &'static str,
    /// Groups of experts, where the choice is limited to some.
    pub groups: Option<usize>,
    /// Groups a token may go to.
    pub groups_per_token: Option<usize>,
    /// Whether a bias is added to the scores for the choice.
    pub choice_bias: bool,
}

impl InspectedExperts {
    fn of(arch: &Architecture) -> Option<Self> {
        let moe = arch.moe.as_ref()?;
        Some(Self {
            routed: moe.experts,
            per_token: moe.per_token,
            width: moe.width,
            shared_width: moe.shared_width.unwrap_or(0),
            layers: moe.sparse.iter().filter(|s| **s).count(),
            scoring: moe.scoring.name(),
            groups: moe.groups.map(|g| g.count),
            groups_per_token: moe.groups.map(|g| g.kept),
            choice_bias: moe.choice_bias,
        })
    }

    /// Parameters of the experts that a token does not go to.
    fn idle(&self, hidden: usize) -> u64 {
        let experts = (self.layers * (self.routed - self.per_token)) as u64;
        experts.saturating_mul(3 * self.width as u64 * hidden as u64)
    }
}

/// Grouped-query attention of some layers of a hybrid.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct InspectedGqa {
    pub layers: Vec<usize>,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub kv_values_per_token_per_layer: usize,
    /// With a bf16 cache.
    pub kv_bytes_per_token_per_layer: u64,
}

impl InspectedGqa {
    fn of(arch: &Architecture) -> Option<Self> {
        let hybrid = arch.hybrid.as_ref()?;
        let values = 2 * hybrid.shape.kv_heads * hybrid.shape.head_dim;
        Some(Self {
            layers: (0..arch.layers).filter(|i| arch.keeps_gqa(*i)).collect(),
            kv_heads: hybrid.shape.kv_heads,
            head_dim: hybrid.shape.head_dim,
            kv_values_per_token_per_layer: values,
            kv_bytes_per_token_per_layer: values as u64 * CACHE_VALUE_BYTES,
        })
    }
}

/// One possible output.
#[derive(Debug, Clone, Serialize)]
pub struct TargetOption {
    /// What asks for it: `exact`, `1/2` of the source's cache, `256 + 64`, ...
    pub budget: String,
    /// `stock`, `free`, or `source` for a model that is MLA already.
    pub rope_grid: &'static str,
    /// Widths. The split is that of thumb: `convert` searches it by predicted error.
    #[serde(flatten)]
    pub geometry: Geometry,
    /// `r + d_R`.
    pub cache_values_per_token_per_layer: usize,
    /// Of the source's cache.
    pub cache_percent: f64,
    /// All layers, bf16.
    pub cache_bytes_per_token: u64,
    /// What each engine does with it.
    pub engines: Vec<EngineVerdict>,
}

impl InspectedModel {
    /// Describe a model. `stored` is the number of weight bytes on disk and their dtype, where the weights are there.
    pub fn new(model: &str, arch: &Architecture, stored: Option<(u64, Dtype)>) -> Self {
        let parameters: u64 =
            arch.expected_tensors().iter().map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>()).sum();
        let assumed = arch.config_dtype.unwrap_or(Dtype::BF16);
        let (weight_bytes, dtype) = stored.unwrap_or((parameters * assumed.byte_size() as u64, assumed));
        let per_layer = arch.cache_values();
        let per_token = arch.cache_values_per_token() as u64 * CACHE_VALUE_BYTES;
        let gqa = arch.gqa();
        let experts = InspectedExperts::of(arch);
        Self {
            schema_version: SCHEMA_VERSION,
            model: model.to_owned(),
            family: arch.family.clone(),
            model_type: arch.model_type.clone(),
            attention: match gqa {
                None if arch.hybrid.is_some() => "hybrid",
                None => "mla",
                Some(a) if a.kv_heads == arch.heads => "mha",
                Some(a) if a.kv_heads == 1 => "mqa",
                Some(_) => "gqa",
            },
            layers: arch.layers,
            hidden: arch.hidden,
            heads: arch.heads,
            kv_heads: gqa.map(|a| a.kv_heads),
            head_dim: gqa.map(|a| a.head_dim),
            mla: arch.mla().and_then(|m| {
                let geometry = Facts::of_model(arch)?.geometry;
                Some(InspectedMla { geometry, latent_eps: m.latent_eps })
            }),
            gqa_layers: InspectedGqa::of(arch),
            intermediate: arch.intermediate,
            activation: arch.activation.name(),
            gated_mlp: arch.mlp == MlpKind::Gated,
            experts,
            mtp_layers: arch.mtp_layers,
            vocab: arch.vocab,
            max_position: arch.max_position,
            rope_type: arch.rope.kind.clone(),
            rope_theta: arch.rope.theta,
            qkv_bias: gqa.map_or_else(|| arch.mla().is_some_and(|m| m.bias), |a| a.qkv_bias),
            out_bias: gqa.map_or_else(|| arch.mla().is_some_and(|m| m.bias), |a| a.out_bias),
            tied_head: arch.tied_head,
            sliding_window: gqa.and_then(|a| a.sliding_window),
            parameters,
            active_parameters: parameters.saturating_sub(experts.map_or(0, |e| e.idle(arch.hidden))),
            weight_bytes,
            weight_dtype: dtype.to_string(),
            weights_present: stored.is_some(),
            kv_values_per_token_per_layer: per_layer,
            kv_bytes_per_token_per_layer: per_layer as u64 * CACHE_VALUE_BYTES,
            kv_bytes_per_token: per_token,
            kv_bytes_at_max_position: per_token.saturating_mul(arch.max_position as u64),
            targets: targets(arch),
        }
    }
}

fn targets(arch: &Architecture) -> Vec<TargetOption> {
    let source = arch.cache_values();
    let option = |budget: String, grid: &'static str, candidate: Facts| TargetOption {
        budget,
        rope_grid: grid,
        geometry: candidate.geometry,
        cache_values_per_token_per_layer: candidate.cache_width(),
        cache_percent: 100.0 * candidate.cache_width() as f64 / source as f64,
        cache_bytes_per_token: (candidate.cache_width() * arch.layers) as u64 * CACHE_VALUE_BYTES,
        engines: judge(&candidate),
    };
    let gqa = match &arch.attention {
        Attention::Gqa(gqa) => gqa,
        Attention::Mla(_) => {
            return Facts::of_model(arch).map(|c| option("as it is".to_owned(), "source", c)).into_iter().collect();
        }
    };
    let mut out = Vec::new();
    let (target, exact_target) = (choose(arch, true).0, choose(arch, false).0);
    for (budget, rank, rope) in budgets(gqa) {
        let geometry = Geometry {
            kv_lora_rank: rank,
            q_lora_rank: None,
            qk_nope_head_dim: gqa.head_dim,
            qk_rope_head_dim: rope,
            v_head_dim: gqa.head_dim,
        };
        if stock_grid_possible(arch, gqa) {
            out.push(option(budget.clone(), "stock", Facts::planned(geometry, RopeGrid::Stock, target)));
        }
        out.push(option(budget, "free", Facts::planned(geometry, RopeGrid::Free, target)));
    }
    let turned = gqa.kv_heads * gqa.rotary_dim;
    let exact = Geometry {
        kv_lora_rank: 2 * gqa.kv_heads * gqa.head_dim - turned,
        // Biases on q need the query latent with its constant row.
        q_lora_rank: gqa.qkv_bias.then_some(arch.hidden + 1),
        qk_nope_head_dim: gqa.head_dim - gqa.rotary_dim,
        qk_rope_head_dim: turned,
        v_head_dim: gqa.head_dim,
    };
    // With one KV head every frequency occurs once, in the stock order.
    let grid = if gqa.kv_heads == 1 && stock_grid_possible(arch, gqa) { RopeGrid::Stock } else { RopeGrid::Free };
    let mut candidate = Facts::planned(exact, grid, exact_target);
    candidate.bias = gqa.qkv_bias || gqa.out_bias;
    let lossless = MethodChoice::all().into_iter().find(|method| !method.compresses());
    let name = lossless.map(|method| method.name().to_owned()).unwrap_or_default();
    out.push(option(name, if grid == RopeGrid::Free { "free" } else { "stock" }, candidate));
    out
}

/// Engines outside transformers' code take neither biases nor scaled frequencies, and no trick hides them.
fn stock_grid_possible(arch: &Architecture, gqa: &GqaShape) -> bool {
    arch.rope.kind == "default" && !gqa.qkv_bias && !gqa.out_bias && gqa.rotary_dim == gqa.head_dim
}

/// `(name, latent width, rotated width)` of budgets worth showing: those of the stock kernels and round shares, smaller
/// than the source's cache, largest first.
fn budgets(gqa: &GqaShape) -> Vec<(String, usize, usize)> {
    let source = 2 * gqa.kv_heads * gqa.head_dim;
    let mut out: Vec<(String, usize, usize)> = [(512, 64), (256, 64)]
        .into_iter()
        .filter(|(r, d)| r + d < source)
        .map(|(r, d)| (format!("{r} + {d}"), r, d))
        .collect();
    for (name, parts, of) in [("2/3", 2, 3), ("1/2", 1, 2), ("1/3", 1, 3), ("1/4", 1, 4)] {
        let values = source * parts / of / 2 * 2;
        // About a third of the cache for rotated keys is a good split at every budget that was measured.
        let grain = (gqa.head_dim / 8 * 2).clamp(2, 16);
        let rope = (values / 3 / grain * grain).min(gqa.head_dim).max(2);
        if values > rope {
            out.push((name.to_owned(), values - rope, rope));
        }
    }
    out.sort_by_key(|(_, r, d)| std::cmp::Reverse(r + d));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm() -> serde_json::Value {
        serde_json::json!({
            "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
            "rope_theta": 100000.0
        })
    }

    #[test]
    fn figures_follow_from_the_config() {
        let arch = Architecture::from_config(&smollm()).expect("a llama config");
        let m = InspectedModel::new("m", &arch, None);
        assert_eq!(m.parameters, 134_515_008);
        assert_eq!(m.weight_bytes, 269_030_016);
        assert_eq!(m.kv_values_per_token_per_layer, 384);
        assert_eq!(m.kv_bytes_per_token, 384 * 30 * 2);
        assert_eq!(m.attention, "gqa");
    }

    #[test]
    fn every_budget_is_smaller_than_the_source_and_exact_is_as_large() {
        let arch = Architecture::from_config(&smollm()).expect("a llama config");
        let m = InspectedModel::new("m", &arch, None);
        for t in &m.targets {
            let g = t.geometry;
            assert_eq!(g.kv_lora_rank + g.qk_rope_head_dim, t.cache_values_per_token_per_layer);
            assert_eq!(t.cache_values_per_token_per_layer < 384, t.budget != "exact", "{}", t.budget);
        }
        let half = m.targets.iter().find(|t| t.budget == "1/2").expect("half");
        assert_eq!((half.geometry.kv_lora_rank, half.geometry.qk_rope_head_dim), (128, 64));
    }

    #[test]
    fn a_source_with_biases_has_no_stock_grid() {
        let mut config = smollm();
        config["attention_bias"] = true.into();
        let arch = Architecture::from_config(&config).expect("a llama config");
        let m = InspectedModel::new("m", &arch, None);
        assert!(m.targets.iter().all(|t| t.rope_grid == "free"));
    }
}

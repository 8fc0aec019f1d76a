//! Method `mha2mla`: partial RoPE for each KV head, then a singular value decomposition.

mod factorise;

use serde_json::{Value, json};

use super::options::{MethodOption, checked, parsed};
use super::partial_rope::PartialRope;
use super::weight_methods::{self, Decomposed, HEADING, PARTIAL_ROPE, Pairs, WeightMethod};
use super::{
    Candidates, Case, Choice, ConvertSettings, Cost, Entry, LayerInput, LayerOutput, Made, Method, Streams, Survey,
    TextNeed, Work,
};
use crate::arch::AttentionSource;
use crate::error::{ConvertError, MethodError};
use crate::stream::Visit;

pub use factorise::{Converted, SvdKind, convert};

const SVD: MethodOption = MethodOption {
    name: "svd",
    methods: &["mha2mla"],
    value_name: "KIND",
    values: &["joint", "split"],
    help: "decompose keys and values together, or each by themselves [default: joint]",
    heading: HEADING,
    check: |value| checked(kind(value)),
    ..MethodOption::PLAIN
};

/// Registry line of the method.
pub const ENTRY: Entry = Entry {
    name: "mha2mla",
    options: &[&PARTIAL_ROPE, &SVD],
    make: |given| {
        let svd = parsed(given, SVD.name, kind)?.unwrap_or(SvdKind::Joint);
        Ok(Mha2mla { partial_rope: parsed(given, PARTIAL_ROPE.name, weight_methods::rule)?, svd }.into())
    },
};

fn kind(value: &str) -> Result<SvdKind, String> {
    SvdKind::ALL.into_iter().find(|kind| kind.name() == value).ok_or_else(|| "unknown kind".to_owned())
}

/// MHA2MLA's partial RoPE and decomposition of weights (arXiv 2502.14837), as an MLA layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mha2mla {
    /// Which pairs keep RoPE; `None`: those of high frequency.
    pub partial_rope: Option<PartialRope>,
    /// What is decomposed together.
    pub svd: SvdKind,
}

impl Default for Mha2mla {
    fn default() -> Self {
        Self { partial_rope: None, svd: SvdKind::Joint }
    }
}

impl WeightMethod for Mha2mla {
    fn rule(&self) -> PartialRope {
        self.partial_rope.unwrap_or(PartialRope::High)
    }

    fn shares_key(&self) -> bool {
        false
    }

    fn rope_part(&self) -> usize {
        4
    }

    fn largest_rank(&self, case: &Case<'_>, rope: usize) -> usize {
        let (all, hidden) = (case.shape.kv_heads * case.shape.head_dim, case.arch.hidden);
        match self.svd {
            SvdKind::Joint => (2 * all - rope).min(hidden),
            // Half each: the narrower of the two decides.
            SvdKind::Split => 2 * (all - rope).min(all).min(hidden) + 1,
        }
    }

    fn ranks(&self, survey: &Survey<'_>, _attention: &AttentionSource) -> Result<(usize, usize), MethodError> {
        Ok((survey.geometry.kv_lora_rank, 0))
    }

    fn decompose(
        &self,
        made: &Made<'_>,
        pairs: &Pairs,
        index: usize,
        attention: &AttentionSource,
    ) -> Result<Decomposed, MethodError> {
        let slots = pairs.slots.get(index).map(Vec::as_slice).unwrap_or_default();
        let (rank, nope) = (made.geometry.kv_lora_rank, made.geometry.qk_nope_head_dim);
        let out = convert(attention, slots, rank, nope, self.svd)?;
        Ok(Decomposed { layer: out.layer, rank_loss: out.rank_loss })
    }
}

impl Method for Mha2mla {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn settings(&self) -> Value {
        json!({ "weights": { "partial_rope": self.partial_rope, "svd": self.svd } })
    }

    fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let rule = self.partial_rope.map(|p| (PARTIAL_ROPE.name, Some(p.name().to_owned())));
        let svd = (self.svd != SvdKind::Joint).then(|| (SVD.name, Some(self.svd.name().to_owned())));
        rule.into_iter().chain(svd).collect()
    }

    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError> {
        weight_methods::validate(self.name(), settings)?;
        if settings.q_lora_rank.is_some() {
            return Err(ConvertError::refused("--method mha2mla takes no --q-lora-rank", "leave the option out"));
        }
        Ok(())
    }

    fn factorises_weights_alone(&self) -> bool {
        true
    }

    fn off_stock_grid(&self, case: &Case<'_>) -> Option<String> {
        let heads = case.shape.kv_heads;
        (heads > 1).then(|| {
            format!("`--method mha2mla` keeps a frequency for each of {heads} KV heads, which no stock grid does")
        })
    }

    fn check(&self, case: &Case<'_>, decisions: &mut Vec<String>) -> Result<Candidates, ConvertError> {
        let shape = &case.shape;
        let split = weight_methods::widths(self, case, decisions)?;
        let nope = match self.rule() {
            // Heads may keep different numbers of pairs.
            PartialRope::TwoNorm => shape.head_dim,
            _ => shape.head_dim - split.rope / shape.kv_heads,
        };
        Ok(Candidates {
            splits: vec![split],
            grid: weight_methods::grid(self, case, split.rope),
            bias: shape.qkv_bias || shape.out_bias,
            query_bias: shape.qkv_bias,
            q_rank: None,
            kv_rank_open: false,
            q_rank_open: false,
            nope,
            plain_weights: false,
        })
    }

    fn text(&self, case: &Case<'_>, candidates: &Candidates) -> Result<Option<TextNeed>, ConvertError> {
        Ok(Some(weight_methods::text(case, candidates.splits[0])))
    }

    fn streams(&self) -> Streams {
        weight_methods::STREAMS
    }

    fn survey(&self, survey: &Survey<'_>, predict: bool) -> Result<Choice, ConvertError> {
        weight_methods::survey(self, survey, predict, |_| weight_methods::explain_norms(self, &survey.case))
    }

    fn trial(&self, made: &Made<'_>, visit: &Visit<'_, '_>) -> Result<f64, ConvertError> {
        weight_methods::trial(self, made, visit)
    }

    fn layer(&self, made: &Made<'_>, input: &LayerInput<'_, '_>) -> Result<LayerOutput, ConvertError> {
        weight_methods::layer(self, made, input)
    }

    fn cost(&self, work: &Work<'_>) -> Cost {
        weight_methods::decomposition_cost(work)
    }
}

//! Method `x-ecomla`: singular value decompositions of the weights.

mod factorise;

use serde_json::{Value, json};

use super::options::{MethodOption, checked, energy, last, parsed, positive};
use super::partial_rope::PartialRope;
use super::weight_methods::{self, Decomposed, HEADING, PARTIAL_ROPE, Pairs, WeightMethod};
use super::{
    Candidates, Case, Choice, ConvertSettings, Cost, Entry, LayerInput, LayerOutput, Made, Method, Streams, Survey,
    TextNeed, Work,
};
use crate::arch::AttentionSource;
use crate::error::{ConvertError, MethodError};
use crate::stream::Visit;

pub use factorise::{Converted, Ranks, convert, convert_published, kv_rank, q_rank, stacked};

/// Share of energy that query ranks keep where nothing is asked for, the published class's own default.
const Q_ENERGY: f64 = 0.99;
/// What ranks by energy are rounded up to multiples of where nothing is asked for.
const RANK_DIVISOR: usize = 8;

const Q_ENERGY_OPTION: MethodOption = MethodOption {
    name: "q-energy",
    methods: &["x-ecomla"],
    value_name: "SHARE",
    help: "rank of each layer's queries by share of their energy, above 0 and at most 1 [default: 0.99]",
    heading: HEADING,
    check: |value| checked(energy(value)),
    ..MethodOption::PLAIN
};

const KV_ENERGY_OPTION: MethodOption = MethodOption {
    name: "kv-energy",
    methods: &["x-ecomla"],
    value_name: "SHARE",
    help: "rank of each layer's keys and values by share of their energy, above 0 and at most 1",
    heading: HEADING,
    check: |value| checked(energy(value)),
    ..MethodOption::PLAIN
};

const RANK_DIVISOR_OPTION: MethodOption = MethodOption {
    name: "rank-divisor",
    methods: &["x-ecomla"],
    value_name: "N",
    help: "round ranks by energy up to multiples of this [default: 8]",
    heading: HEADING,
    check: |value| checked(positive(value)),
    ..MethodOption::PLAIN
};

const PUBLISHED_LAYOUT: MethodOption = MethodOption {
    name: "published-layout",
    methods: &["x-ecomla"],
    help: "rows and frequencies as the published code has them, for comparison",
    heading: HEADING,
    ..MethodOption::PLAIN
};

/// Registry line of the method.
pub const ENTRY: Entry = Entry {
    name: "x-ecomla",
    options: &[&Q_ENERGY_OPTION, &KV_ENERGY_OPTION, &RANK_DIVISOR_OPTION, &PARTIAL_ROPE, &PUBLISHED_LAYOUT],
    make: |given| {
        Ok(XEcomla {
            q_energy: parsed(given, Q_ENERGY_OPTION.name, energy)?,
            kv_energy: parsed(given, KV_ENERGY_OPTION.name, energy)?,
            rank_divisor: parsed(given, RANK_DIVISOR_OPTION.name, positive)?,
            partial_rope: parsed(given, PARTIAL_ROPE.name, weight_methods::rule)?,
            published_layout: last(given, PUBLISHED_LAYOUT.name).is_some(),
        }
        .into())
    },
};

/// X-EcoMLA's decomposition of weights (arXiv 2503.11132), positions made right.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct XEcomla {
    /// Share of the query weights' energy that each layer's query rank keeps, in `(0, 1]`; `None`: 0.99.
    pub q_energy: Option<f64>,
    /// Share of the joint key and value weights' energy that each layer's rank keeps, in `(0, 1]`; `None`: ranks are fixed.
    pub kv_energy: Option<f64>,
    /// Ranks by energy are rounded up to multiples of this; `None`: 8.
    pub rank_divisor: Option<usize>,
    /// Which pairs keep RoPE; `None`: uniform.
    pub partial_rope: Option<PartialRope>,
    /// Rows and frequencies as the published code has them.
    pub published_layout: bool,
}

impl XEcomla {
    fn divisor(&self) -> usize {
        self.rank_divisor.unwrap_or(RANK_DIVISOR)
    }

    /// Say what the survey settled.
    fn explain(&self, case: &Case<'_>, pairs: &Pairs) -> Vec<String> {
        let mut out = Vec::new();
        if self.published_layout {
            out.push(
                "rows and frequencies as the published code has them: positions mean something else than in the source, \
                 for comparison only"
                    .to_owned(),
            );
            if case.shape.qkv_bias || case.shape.out_bias {
                out.push("the source's attention biases are dropped, as the published code drops them".to_owned());
            }
        } else {
            out.extend(weight_methods::explain_norms(self, case));
        }
        let list = |name: &str, ranks: Vec<usize>| {
            let (least, most) = (ranks.iter().min().copied(), ranks.iter().max().copied());
            let mean = ranks.iter().sum::<usize>() as f64 / ranks.len().max(1) as f64;
            format!(
                "{name} ranks by layer from {} to {}, {mean:.1} in the mean: all layers are padded with zeros to the largest",
                least.unwrap_or(0),
                most.unwrap_or(0)
            )
        };
        if self.kv_energy.is_some() {
            out.push(list("key and value", pairs.ranks.iter().map(|r| r.0).collect()));
        }
        if case.settings.q_lora_rank.is_none() {
            if self.q_energy.is_none() {
                out.push(format!("queries keep {}% of their energy, as published", 100.0 * Q_ENERGY));
            }
            out.push(list("query", pairs.ranks.iter().map(|r| r.1).collect()));
        }
        out
    }
}

impl WeightMethod for XEcomla {
    fn rule(&self) -> PartialRope {
        self.partial_rope.unwrap_or(PartialRope::Uniform)
    }

    fn published_layout(&self) -> bool {
        self.published_layout
    }

    fn shares_key(&self) -> bool {
        true
    }

    fn rope_part(&self) -> usize {
        2
    }

    fn by_energy(&self) -> bool {
        self.kv_energy.is_some()
    }

    fn largest_rank(&self, case: &Case<'_>, _rope: usize) -> usize {
        (2 * case.shape.kv_heads * case.shape.head_dim).min(case.arch.hidden)
    }

    fn ranks(&self, survey: &Survey<'_>, attention: &AttentionSource) -> Result<(usize, usize), MethodError> {
        let kv = match self.kv_energy {
            Some(energy) => kv_rank(attention, energy, self.divisor())?,
            None => survey.geometry.kv_lora_rank,
        };
        let q = match survey.case.settings.q_lora_rank {
            Some(q) => q,
            None => q_rank(attention, self.q_energy.unwrap_or(Q_ENERGY), self.divisor())?,
        };
        Ok((kv, q))
    }

    fn decompose(
        &self,
        made: &Made<'_>,
        pairs: &Pairs,
        index: usize,
        attention: &AttentionSource,
    ) -> Result<Decomposed, MethodError> {
        let (kv, q) = pairs.ranks.get(index).copied().unwrap_or_default();
        let q_width = pairs.ranks.iter().map(|r| r.1).max().unwrap_or(q);
        let ranks = Ranks { kv, kv_width: made.geometry.kv_lora_rank, q, q_width };
        let nope = made.geometry.qk_nope_head_dim;
        let out = if self.published_layout {
            convert_published(attention, &pairs.frequencies, &ranks, nope)?
        } else {
            let slots = pairs.slots.get(index).map(Vec::as_slice).unwrap_or_default();
            convert(attention, slots, &ranks, nope)?
        };
        Ok(Decomposed { layer: out.layer, rank_loss: out.rank_loss })
    }
}

impl Method for XEcomla {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn settings(&self) -> Value {
        json!({ "weights": {
            "q_energy": self.q_energy, "kv_energy": self.kv_energy, "rank_divisor": self.divisor(),
            "partial_rope": self.partial_rope, "published_layout": self.published_layout
        } })
    }

    fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let mut out = Vec::new();
        let mut add = |option: &MethodOption, value: Option<String>| {
            out.extend(value.map(|value| (option.name, Some(value))));
        };
        add(&Q_ENERGY_OPTION, self.q_energy.map(|x| x.to_string()));
        add(&KV_ENERGY_OPTION, self.kv_energy.map(|x| x.to_string()));
        add(&RANK_DIVISOR_OPTION, Some(self.divisor()).filter(|n| *n != RANK_DIVISOR).map(|n| n.to_string()));
        add(&PARTIAL_ROPE, self.partial_rope.map(|p| p.name().to_owned()));
        if self.published_layout {
            out.push((PUBLISHED_LAYOUT.name, None));
        }
        out
    }

    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError> {
        weight_methods::validate(self.name(), settings)?;
        if self.published_layout && self.partial_rope.is_some() {
            return Err(ConvertError::refused(
                "--published-layout chooses no pairs",
                "leave --partial-rope out, or --published-layout",
            ));
        }
        let kv_fixed = settings.kv_lora_rank.is_some() || settings.kv_budget.is_some();
        let q_fixed = settings.q_lora_rank.is_some();
        for (energy, option, fixed, width) in [
            (self.kv_energy, "--kv-energy", kv_fixed, "--kv-lora-rank or --kv-budget"),
            (self.q_energy, "--q-energy", q_fixed, "--q-lora-rank"),
        ] {
            let Some(energy) = energy else { continue };
            if fixed {
                return Err(ConvertError::refused(
                    format!("{option} finds the ranks, {width} fixes them"),
                    "leave one of the two out",
                ));
            }
            if !(energy > 0.0 && energy <= 1.0) {
                return Err(ConvertError::refused(
                    format!("{option} {energy} is no share of energy: it has to be above 0 and at most 1"),
                    "0.95 keeps 95% of the squared singular values",
                ));
            }
        }
        if self.rank_divisor == Some(0) {
            return Err(ConvertError::refused("--rank-divisor 0 divides nothing", "8 is the default"));
        }
        if self.rank_divisor.is_some() && self.kv_energy.is_none() && q_fixed {
            return Err(ConvertError::refused(
                "--rank-divisor rounds ranks by energy, and both ranks are fixed",
                "leave the option out",
            ));
        }
        Ok(())
    }

    fn factorises_weights_alone(&self) -> bool {
        true
    }

    fn off_stock_grid(&self, _case: &Case<'_>) -> Option<String> {
        (self.rule() != PartialRope::Uniform).then(|| "only `--partial-rope uniform` lies on the stock grid".to_owned())
    }

    fn check(&self, case: &Case<'_>, decisions: &mut Vec<String>) -> Result<Candidates, ConvertError> {
        let (shape, arch) = (&case.shape, case.arch);
        let queries = (arch.heads * shape.head_dim).min(arch.hidden);
        if let Some(rank) = case.settings.q_lora_rank.filter(|r| *r > queries) {
            return Err(ConvertError::refused(
                format!("q_lora_rank {rank} is larger than the rank of the query projection ({queries})"),
                "queries are not cached: a wide latent costs no cache",
            ));
        }
        if self.published_layout && shape.rotary_dim != shape.head_dim {
            return Err(ConvertError::refused(
                format!(
                    "the model rotates {} of each head's {} values, the published layout is defined for whole heads",
                    shape.rotary_dim, shape.head_dim
                ),
                "leave `--published-layout` out",
            ));
        }
        let split = weight_methods::widths(self, case, decisions)?;
        Ok(Candidates {
            splits: vec![split],
            grid: weight_methods::grid(self, case, split.rope),
            bias: (shape.qkv_bias || shape.out_bias) && !self.published_layout,
            query_bias: shape.qkv_bias && !self.published_layout,
            q_rank: Some(case.settings.q_lora_rank.unwrap_or(queries)),
            kv_rank_open: self.kv_energy.is_some(),
            q_rank_open: case.settings.q_lora_rank.is_none(),
            nope: shape.head_dim - split.rope,
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
        weight_methods::survey(self, survey, predict, |pairs| self.explain(&survey.case, pairs))
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

//! Method `attention-aware`, the default: weighs keys by the queries and values by the output projection that meet them,
//! keeps RoPE where attention needs it, and refits what was cut on what the converted attention really does.
//!
//! [`draft`] is the closed form; `scores`, `values` and `output` hold the refits, in that order; [`refine`] adds gradient
//! steps; `survey` chooses slots and split; `text` says how much calibration text is used.

mod curvature;
mod draft;
mod layer;
mod output;
pub mod refine;
mod score_moments;
mod scores;
mod steps;
mod survey;
mod text;
mod values;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::options::{MethodOption, checked, parsed, positive};
use super::widths::{RotatedWidths, Splits, splits};
use super::{
    Candidates, Case, Choice, ConvertSettings, Cost, Entry, LayerInput, LayerOutput, Made, Method, MethodChoice,
    SourceStream, Split, Streams, Survey, TextNeed, Work,
};
use crate::error::ConvertError;
use crate::stream::{Keep, Visit};
use crate::target::{Profile, RopeGrid};
use layer::{Inputs, convert_layer};
use refine::RefineSettings;

pub use draft::{Draft, DraftSettings, KEY_WEIGHT, SlotAnalysis, analyse_slots, draft};
pub use score_moments::{At, ScoreGradient, ScoreTarget};
pub use steps::{Step, Steps};

const HEADING: &str = "Method and cache size";

const WITHOUT: MethodOption = MethodOption {
    name: "without",
    methods: &["attention-aware"],
    value_name: "STEP",
    values: &Step::NAMES,
    repeatable: true,
    help: "switch one step off, to see its worth; repeatable",
    heading: HEADING,
    check: |value| checked(Step::named(value)),
};

const REFINE: MethodOption = MethodOption {
    name: "refine",
    methods: &["attention-aware"],
    value_name: "STEPS",
    help: "gradient steps per layer after the closed form [default: 0]",
    heading: HEADING,
    check: |value| checked(count(value)),
    ..MethodOption::PLAIN
};

const FIT_TOKENS: MethodOption = MethodOption {
    name: "fit-tokens",
    methods: &["attention-aware"],
    value_name: "TOKENS",
    help: "use at most this many tokens of the calibration text [default: 28 per value of the hidden state, 16384 at \
           least; all with --refine]",
    heading: HEADING,
    check: |value| checked(positive(value)),
    ..MethodOption::PLAIN
};

/// Registry line of the method.
pub const ENTRY: Entry = Entry {
    name: "attention-aware",
    options: &[&WITHOUT, &REFINE, &FIT_TOKENS],
    make: |given| {
        let mut steps = Steps::default();
        for (_, value) in given.iter().filter(|(name, _)| *name == WITHOUT.name) {
            let step = parsed(&[(WITHOUT.name, value)], WITHOUT.name, Step::named)?;
            steps = step.map_or(steps, |step| steps.without(step));
        }
        Ok(AttentionAware {
            steps,
            refine: parsed(given, REFINE.name, count)?.unwrap_or(0),
            fit_tokens: parsed(given, FIT_TOKENS.name, positive)?,
        }
        .into())
    },
};

fn count(value: &str) -> Result<usize, String> {
    value.parse::<usize>().map_err(|e| e.to_string())
}

/// Query- and output-weighted factorisation with refits: the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttentionAware {
    /// Steps that are taken.
    pub steps: Steps,
    /// Gradient steps per layer after the closed form.
    pub refine: usize,
    /// Tokens of the calibration text that are used. `None`: 28 per value of the hidden state, 16384 at least, and all where
    /// there are gradient steps.
    pub fit_tokens: Option<usize>,
}

/// What the survey settles.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Slots {
    /// Slots per source frequency, `[d / 2]`.
    slots: Vec<usize>,
}

impl AttentionAware {
    /// What the source's pass keeps for the fits.
    fn keep(&self) -> Keep {
        Keep { phases: true, queries_keys: Some(scores::choose) }
    }
}

impl Method for AttentionAware {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn settings(&self) -> Value {
        json!({ "steps": self.steps, "refine": self.refine, "fit_tokens": self.fit_tokens })
    }

    fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let mut out: Vec<_> = self.steps.left_out().map(|step| (WITHOUT.name, Some(step.to_owned()))).collect();
        if self.refine > 0 {
            out.push((REFINE.name, Some(self.refine.to_string())));
        }
        out.extend(self.fit_tokens.map(|n| (FIT_TOKENS.name, Some(n.to_string()))));
        out
    }

    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError> {
        if settings.q_lora_rank.is_some() {
            return Err(ConvertError::refused(
                "`--q-lora-rank` is an option of `transmla` and `care`",
                "queries are not cached: leaving them whole costs no cache",
            ));
        }
        Ok(())
    }

    fn mixes_window_lengths(&self) -> bool {
        true
    }

    fn ablations(&self) -> Vec<(&'static str, MethodChoice)> {
        let without = |(step, name)| (name, Self { steps: self.steps.without(step), ..*self }.into());
        Step::ALL.map(without).to_vec()
    }

    fn check(&self, case: &Case<'_>, decisions: &mut Vec<String>) -> Result<Candidates, ConvertError> {
        let (settings, shape) = (case.settings, &case.shape);
        let portable = (settings.profile == Some(Profile::Portable)).then_some(RopeGrid::Stock);
        let grid = settings.rope_grid.or(portable).unwrap_or(RopeGrid::Free);
        if settings.rope_grid.is_none() && settings.profile.is_none() && !case.target.has_any_frequencies() {
            decisions.push(
                "rotated slots take free frequencies (LongRoPE factors) and o_proj a bias: transformers and vLLM's transformers backend run that; `--rope-grid stock` writes what every engine's own class runs, at some loss".into(),
            );
        }
        let widths = if grid == RopeGrid::Free { RotatedWidths::Even } else { RotatedWidths::Divisors };
        let splits = match splits(case, widths, decisions)? {
            Splits::Fixed(split) => vec![split],
            Splits::Open { budget, ropes } => {
                ladder(budget, ropes, grid).into_iter().map(|rope| Split { rope, rank: budget - rope }).collect()
            }
        };
        if self.refine > 0 && case.arch.score_softcap.is_some() {
            return Err(ConvertError::refused(
                "`--refine` follows gradients of plain attention, and this model caps its scores",
                "leave the option out: the closed form and the refits know the cap",
            ));
        }
        Ok(Candidates {
            splits,
            grid,
            bias: shape.qkv_bias || shape.out_bias || grid == RopeGrid::Free,
            query_bias: shape.qkv_bias,
            q_rank: None,
            kv_rank_open: false,
            q_rank_open: false,
            nope: shape.head_dim,
            plain_weights: false,
        })
    }

    fn text(&self, case: &Case<'_>, candidates: &Candidates) -> Result<Option<TextNeed>, ConvertError> {
        text::need(self, case, candidates).map(Some)
    }

    fn order(&self, windows: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
        text::in_front(windows)
    }

    fn streams(&self) -> Streams {
        Streams { source: SourceStream::Pass(self.keep()), converted: self.steps.has(Step::ConvertedStream) }
    }

    fn survey(&self, survey: &Survey<'_>, predict: bool) -> Result<Choice, ConvertError> {
        survey::survey(self, survey, predict)
    }

    fn trial(&self, made: &Made<'_>, visit: &Visit<'_, '_>) -> Result<f64, ConvertError> {
        let Slots { slots } = made.result.read()?;
        let out = survey::convert_on_trial(self, made, visit, &slots, made.geometry.kv_lora_rank)?;
        Ok(out.report.calibration_error)
    }

    fn layer(&self, made: &Made<'_>, input: &LayerInput<'_, '_>) -> Result<LayerOutput, ConvertError> {
        let Slots { slots } = made.result.read()?;
        let (tokens, calibration) = (input.tokens()?, &made.case.settings.calibration);
        let defaults = RefineSettings::default();
        let out = convert_layer(&Inputs {
            index: input.index,
            source: input.attention,
            target: tokens.pass()?,
            x: tokens.x,
            windows: tokens.windows,
            slots: &slots,
            rank: made.geometry.kv_lora_rank,
            steps: self.steps,
            bias: made.bias,
            refine: RefineSettings {
                steps: self.refine,
                seed: calibration.seed,
                longest: defaults.longest.max(calibration.seq_len),
                ..defaults
            },
        })?;
        Ok(LayerOutput { layer: out.layer, figures: out.report, next: None, converted: Some(out.output) })
    }

    fn cost(&self, work: &Work<'_>) -> Cost {
        let wide = |n: usize| n as u64;
        let (t, d, q, kv) = (work.tokens, work.hidden(), work.queries(), work.keys());
        let (heads, geometry) = (wide(work.case.arch.heads), &work.geometry);
        let (rank, rope) = (wide(geometry.kv_lora_rank), wide(geometry.qk_rope_head_dim));
        let nope = wide(geometry.qk_nope_head_dim);
        let (attention, mlp) = (work.attention_weights(), work.mlp_weights());
        let weights = 4 * attention + 4 * mlp + 34 * d * d + 24 * work.query_latent() * d;
        // Queries and keys of the refits on scores wait for them; what they make of both is gone before the others.
        let seen = t.min(wide(scores::tokens(text::longest_window(&work.case))));
        let of_source = t * (12 * d + 4 * q) + 4 * seen * (q + kv);
        let refits = t * (12 * d + 8 * q + 12 * rank + 4 * rope);
        let on_scores = t * 12 * d + seen * (8 * d + 28 * heads * (nope + rope));
        let working = weights + of_source + refits.max(on_scores);
        let (rank, pooling) = (rank as f64, heads as f64 * 2.0 * t as f64);
        let flops = 2.0 * work.forward_flops()
            + work.moment_flops()
            + pooling * rank * (rank + work.mean_window)
            + 4.0 * t as f64 * q as f64 * (q + d) as f64
            + 3.0 * work.solve_flops();
        Cost {
            flops,
            streamed_tokens: 2 * t,
            working_bytes: working.max(work.forward_bytes),
            overlapped_bytes: (working + work.mlp_bytes).max(work.forward_bytes),
        }
    }
}

/// Rotated widths to compare.
fn ladder(budget: usize, mut ropes: Vec<usize>, grid: RopeGrid) -> Vec<usize> {
    if grid == RopeGrid::Free {
        // A coarse ladder around a sixth to a half of the budget: the optimum is flat (docs/methods.md).
        let mut ladder: Vec<usize> = [1.0 / 6.0, 0.21, 0.25, 0.29, 1.0 / 3.0, 0.38]
            .iter()
            .map(|f| ((budget as f64 * f / 8.0).round() as usize * 8).max(2))
            .filter(|r| ropes.contains(r))
            .collect();
        if !ladder.is_empty() {
            ladder.dedup();
            ropes = ladder;
        }
    }
    ropes.retain(|&r| r * 2 <= budget || budget < 8);
    if ropes.is_empty() {
        ropes.push(2);
    }
    ropes
}

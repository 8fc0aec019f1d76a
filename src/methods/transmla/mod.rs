//! Methods `transmla` and `care`: RoRoPE, then a joint low rank of keys without rotation and values.

mod factorise;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::options::{MethodOption, checked, not_taken, parsed};
use super::widths::{RotatedWidths, Splits, splits};
use super::{
    Candidates, Case, Choice, ConvertSettings, Cost, Entry, LayerInput, LayerOutput, LayerReport, MEASURED_WINDOWS,
    Made, Method, SourceStream, Split, Streams, Survey, SurveyResult, TextNeed, Work, least, trial_layers,
};
use crate::arch::AttentionSource;
use crate::calibrate::Moments;
use crate::error::{ConvertError, MethodError};
use crate::mla::output_error;
use crate::stream::{Keep, Visit, first_windows};
use crate::target::RopeGrid;

pub use factorise::{Converted, FreqFold, Impossible, Limits, Metric, Settings, candidate_folds, check, convert};

/// `--freqfold`.
pub const FREQFOLD: MethodOption = MethodOption {
    name: "freqfold",
    methods: &["transmla", "care"],
    value_name: "N|auto",
    help: "neighbouring frequencies that share one rotation [default: auto]",
    heading: "Method and cache size",
    check: |value| checked(value.parse::<FreqFold>()),
    ..MethodOption::PLAIN
};

/// `--balance-kv-ratio`.
pub const BALANCE_KV_RATIO: MethodOption = MethodOption {
    name: "balance-kv-ratio",
    methods: &["transmla", "care"],
    value_name: "X|none",
    help: "scale keys to this multiple of the values' norm before the joint low rank, or `none` [default: 1]",
    heading: "Method and cache size",
    check: |value| checked(ratio(value)),
    ..MethodOption::PLAIN
};

/// Registry line of the method.
pub const ENTRY: Entry = Entry {
    name: "transmla",
    options: &[&FREQFOLD, &BALANCE_KV_RATIO],
    make: |given| Ok(Rorope::from_options(given)?.into()),
};

/// Target ratio of key norms to value norms where none is asked for.
const RATIO: Option<f64> = Some(1.0);

/// `none`, or a positive number.
fn ratio(value: &str) -> Result<Option<f64>, String> {
    match (value, value.parse::<f64>()) {
        ("none", _) => Ok(None),
        (_, Ok(x)) if x.is_finite() && x > 0.0 => Ok(Some(x)),
        _ => Err("expected a positive number or `none`".to_owned()),
    }
}

/// TransMLA or CARE: both rotate keys by RoRoPE and differ in the metric of the joint low rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rorope {
    /// Which of the two.
    pub metric: Metric,
    /// FreqFold.
    pub freqfold: FreqFold,
    /// Target ratio of mean key norm to mean value norm; `None`: no balancing.
    pub balance_kv_ratio: Option<f64>,
}

impl Default for Rorope {
    /// TransMLA as published.
    fn default() -> Self {
        Self { metric: Metric::Plain, freqfold: FreqFold::Auto, balance_kv_ratio: RATIO }
    }
}

/// What the survey settles.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Fold {
    fold: usize,
}

impl Rorope {
    /// CARE at its defaults.
    pub fn care() -> Self {
        Self { metric: Metric::Care, ..Self::default() }
    }

    /// With options as they were typed.
    ///
    /// # Errors
    /// A value that is none.
    pub fn from_options(given: &[(&str, &str)]) -> Result<Self, ConvertError> {
        let defaults = Self::default();
        Ok(Self {
            freqfold: parsed(given, FREQFOLD.name, str::parse)?.unwrap_or(defaults.freqfold),
            balance_kv_ratio: parsed(given, BALANCE_KV_RATIO.name, ratio)?.unwrap_or(defaults.balance_kv_ratio),
            ..defaults
        })
    }

    /// FreqFolds to try at a rotated width.
    fn folds(&self, head_dim: usize, rope: usize) -> Vec<usize> {
        match self.freqfold {
            FreqFold::Fixed(fold) => vec![fold],
            FreqFold::Auto => candidate_folds(head_dim, rope),
        }
    }

    fn convert(
        &self,
        made: &Made<'_>,
        fold: usize,
        attention: &AttentionSource,
        moments: &Moments,
    ) -> Result<Converted, MethodError> {
        let settings = Settings {
            rope_dim: made.geometry.qk_rope_head_dim,
            rank: made.geometry.kv_lora_rank,
            q_rank: made.case.settings.q_lora_rank,
            fold,
            balance: self.balance_kv_ratio,
        };
        convert(attention, moments, &settings, self.metric)
    }

    /// Errors of one layer at several FreqFolds.
    fn errors(&self, made: &Made<'_>, visit: &Visit<'_, '_>, folds: &[usize]) -> Result<Vec<f64>, ConvertError> {
        let (attention, pass) = (&visit.layer.attention, visit.pass);
        let mut moments = Moments::new(attention.hidden());
        moments.add(pass.x.view());
        let error = |fold: &usize| {
            let layer = self.convert(made, *fold, attention, &moments).map_err(ConvertError::layer(visit.index))?.layer;
            let (x, windows) = (pass.x.view(), &visit.stream.windows);
            Ok(output_error(&layer, attention.score_softcap, x, windows, pass.output.view()))
        };
        folds.iter().map(error).collect()
    }
}

impl Method for Rorope {
    fn name(&self) -> &'static str {
        match self.metric {
            Metric::Plain => ENTRY.name,
            Metric::Care => super::care::ENTRY.name,
        }
    }

    fn settings(&self) -> Value {
        json!({ "freqfold": self.freqfold, "balance_kv_ratio": self.balance_kv_ratio })
    }

    fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let mut out = Vec::new();
        if let FreqFold::Fixed(fold) = self.freqfold {
            out.push((FREQFOLD.name, Some(fold.to_string())));
        }
        if self.balance_kv_ratio != RATIO {
            let ratio = self.balance_kv_ratio.map_or_else(|| "none".to_owned(), |x| x.to_string());
            out.push((BALANCE_KV_RATIO.name, Some(ratio)));
        }
        out
    }

    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError> {
        if settings.rope_grid == Some(RopeGrid::Free) {
            return Err(not_taken(self.name(), "--rope-grid free", "--method attention-aware"));
        }
        Ok(())
    }

    fn check(&self, case: &Case<'_>, decisions: &mut Vec<String>) -> Result<Candidates, ConvertError> {
        let (shape, settings) = (&case.shape, case.settings);
        let d = shape.head_dim;
        let split = match splits(case, RotatedWidths::Divisors, decisions)? {
            Splits::Fixed(split) => split,
            Splits::Open { budget, ropes } => {
                // As published: 64 rotated dimensions, or what fits.
                let want = 64.min(d).min((budget / 2).max(2));
                let rope = ropes.iter().copied().filter(|&r| r <= want).max().unwrap_or(ropes[0]);
                Split { rope, rank: budget - rope }
            }
        };
        if shape.rotary_dim != d {
            return Err(ConvertError::refused(
                format!(
                    "the model rotates {} of each head's {d} values, `--method {}` is defined for whole heads",
                    shape.rotary_dim,
                    self.name()
                ),
                "use `--method attention-aware` or `exact`",
            ));
        }
        let queries = (case.arch.heads * d).min(case.arch.hidden);
        let limits = Limits { kv_heads: shape.kv_heads, head_dim: d, queries };
        let fold = match self.freqfold {
            FreqFold::Fixed(fold) => fold,
            FreqFold::Auto => (d / split.rope.max(1)).max(1),
        };
        check(&limits, split.rope, split.rank, settings.q_lora_rank, fold)
            .map_err(|e| ConvertError::Refused { message: e.message, hint: e.hint })?;
        Ok(Candidates {
            splits: vec![split],
            grid: RopeGrid::Stock,
            bias: shape.qkv_bias || shape.out_bias,
            query_bias: shape.qkv_bias,
            q_rank: settings.q_lora_rank,
            kv_rank_open: false,
            q_rank_open: false,
            nope: d,
            plain_weights: false,
        })
    }

    fn text(&self, case: &Case<'_>, candidates: &Candidates) -> Result<Option<TextNeed>, ConvertError> {
        let calibration = &case.settings.calibration;
        let Split { rope, rank } = candidates.splits[0];
        Ok(Some(TextNeed {
            longest: calibration.seq_len.min(case.arch.max_position),
            samples: calibration.samples,
            longer: None,
            least: 4 * (rope + rank),
            measures: false,
        }))
    }

    /// As published, keys and values are compressed on what reaches a layer when those before it have lost rotations but
    /// are not compressed yet. One stream serves both steps.
    fn streams(&self) -> Streams {
        Streams { source: SourceStream::Inputs, converted: false }
    }

    fn survey(&self, survey: &Survey<'_>, predict: bool) -> Result<Choice, ConvertError> {
        let (rope, head_dim) = (survey.geometry.qk_rope_head_dim, survey.case.shape.head_dim);
        let folds = self.folds(head_dim, rope);
        let chosen = |fold: usize, predicted_error: Option<f64>, decisions: Vec<String>| {
            let result = SurveyResult::new(&Fold { fold })?;
            Ok(Choice { split: survey.candidates.splits[0], q_rank: None, result, predicted_error, decisions })
        };
        if folds.is_empty() {
            return Err(ConvertError::refused(
                format!("qk_rope_head_dim {rope} leaves no FreqFold for head size {head_dim}"),
                "choose a qk_rope_head_dim that divides the head size",
            ));
        }
        if folds.len() == 1 && !predict {
            return chosen(folds[0], None, Vec::new());
        }
        let result = SurveyResult::default();
        let made = Made { case: survey.case, geometry: survey.geometry, bias: survey.candidates.bias, result: &result };
        let trial = trial_layers(survey.case.arch.layers);
        let mut errors = vec![0.0; folds.len()];
        survey.walk.layers(Keep::default(), |visit| {
            if trial.contains(&visit.index) {
                let of_layer = self.errors(&made, &visit, &folds)?;
                errors.iter_mut().zip(of_layer).for_each(|(error, e)| *error += e / trial.len() as f64);
            }
            Ok(())
        })?;
        let best = least(&errors);
        let mut decisions = Vec::new();
        if folds.len() > 1 {
            let list: Vec<String> = folds.iter().zip(&errors).map(|(f, e)| format!("{f}: {e:.3}")).collect();
            decisions.push(format!(
                "freqfold {}: the least error of the attention output on {} trial layers ({})",
                folds[best],
                trial.len(),
                list.join(", ")
            ));
        }
        chosen(folds[best], Some(errors[best]), decisions)
    }

    fn trial(&self, made: &Made<'_>, visit: &Visit<'_, '_>) -> Result<f64, ConvertError> {
        let Fold { fold } = made.result.read()?;
        self.errors(made, visit, &[fold]).map(|e| e[0])
    }

    fn layer(&self, made: &Made<'_>, input: &LayerInput<'_, '_>) -> Result<LayerOutput, ConvertError> {
        let Fold { fold } = made.result.read()?;
        let tokens = input.tokens()?;
        let mut moments = Moments::new(input.attention.hidden());
        moments.add(tokens.x);
        let out = self.convert(made, fold, input.attention, &moments).map_err(ConvertError::layer(input.index))?;
        let (x, windows) = first_windows(tokens.x, tokens.windows, MEASURED_WINDOWS);
        let want = tokens.layer.layer.attention_output(x, windows)?;
        let cap = input.attention.score_softcap;
        let figures = LayerReport {
            layer: input.index,
            calibration_error: output_error(&out.layer, cap, x, windows, want.view()),
            rope_loss: out.rope_loss,
            rank_loss: out.rank_loss,
            ..LayerReport::default()
        };
        let last = input.index + 1 == made.case.arch.layers;
        let next =
            if last { None } else { Some(tokens.layer.output_with_keys(&out.rotated, tokens.x, tokens.windows)?) };
        Ok(LayerOutput { layer: out.layer, figures, next, converted: None })
    }

    fn cost(&self, work: &Work<'_>) -> Cost {
        super::weight_methods::cost(work, work.forward_flops() + work.moment_flops() + work.solve_flops())
    }
}

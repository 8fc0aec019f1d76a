//! What a conversion method is: the one trait, and the plain values it takes and gives.
//!
//! A conversion asks a method in this order: [`Method::validate`] (settings alone), [`Method::check`] (settings on this
//! model), [`Method::text`] (which calibration text), [`Method::survey`] (what is still open), then [`Method::layer`] for
//! every layer. What a survey decides goes into the plan as a [`SurveyResult`] and comes back from there, in the same run or
//! in one that resumes it.

use std::fmt::Debug;

use ndarray::{Array2, ArrayView2};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::options::MethodOption;
use super::settings::ConvertSettings;
use crate::arch::{Architecture, AttentionSource, GqaShape};
use crate::error::ConvertError;
use crate::mla::{Geometry, MlaLayer, Split};
use crate::source::ModelSource;
use crate::stream::{Keep, SourceLayer, SourcePass, Visit, Walk};
use crate::target::{RopeGrid, Target};

/// One way of factorising attention, with its own settings.
///
/// Implementations are values: two of the same room with the same settings write the same bytes.
pub trait Method: Debug + Send + Sync {
    /// Name on the command line and in `conversion.json`.
    fn name(&self) -> &'static str;

    /// Its own settings as `conversion.json` has them, an object; keys that several methods share are merged.
    fn settings(&self) -> Value;

    /// Its own options that are not at their defaults, as they would be typed: name and value, none for a flag.
    fn arguments(&self) -> Vec<(&'static str, Option<String>)>;

    /// Refuse settings that contradict each other, whatever the model.
    ///
    /// # Errors
    /// [`ConvertError::Refused`].
    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError>;

    /// Whether something of the source is lost. What loses nothing keeps head norms, takes no budget and needs no text.
    fn compresses(&self) -> bool {
        true
    }

    /// Whether only the source's weights are factorised, and text merely measures the result.
    fn factorises_weights_alone(&self) -> bool {
        false
    }

    /// Whether it calibrates on windows of several lengths.
    fn mixes_window_lengths(&self) -> bool {
        false
    }

    /// Steps that can be left out one at a time to show their worth, each with the method without it.
    fn ablations(&self) -> Vec<(&'static str, super::MethodChoice)> {
        Vec::new()
    }

    /// Why the kept pairs of this method do not lie on the stock frequency grid; `None`: they may.
    fn off_stock_grid(&self, _case: &Case<'_>) -> Option<String> {
        None
    }

    /// Check the method on a model, and say which widths it would have. Decisions taken for the user are added to `decisions`.
    ///
    /// # Errors
    /// [`ConvertError::Refused`] where it cannot do what is asked.
    fn check(&self, case: &Case<'_>, decisions: &mut Vec<String>) -> Result<Candidates, ConvertError>;

    /// The calibration text that is needed; `None`: none.
    ///
    /// # Errors
    /// Too little text allowed.
    fn text(&self, case: &Case<'_>, candidates: &Candidates) -> Result<Option<TextNeed>, ConvertError>;

    /// Windows in the order the method wants them.
    fn order(&self, windows: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
        windows
    }

    /// What goes through the source's layers beside the conversion.
    fn streams(&self) -> Streams;

    /// Settle what `check` left open. With `predict`, also measure the error of some layers.
    ///
    /// # Errors
    /// Layers that cannot be read or run; candidates of which none is possible.
    fn survey(&self, survey: &Survey<'_>, predict: bool) -> Result<Choice, ConvertError>;

    /// Relative error of one layer's attention output when it is converted alone, on the windows of a survey.
    ///
    /// # Errors
    /// A layer that cannot be converted.
    fn trial(&self, made: &Made<'_>, visit: &Visit<'_, '_>) -> Result<f64, ConvertError>;

    /// Convert one layer.
    ///
    /// # Errors
    /// A layer that cannot be converted.
    fn layer(&self, made: &Made<'_>, input: &LayerInput<'_, '_>) -> Result<LayerOutput, ConvertError>;

    /// What converting one layer takes.
    fn cost(&self, work: &Work<'_>) -> Cost;
}

/// Everything about a conversion that is known before a survey.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The source checkpoint.
    pub source: &'a ModelSource,
    /// Its architecture.
    pub arch: &'a Architecture,
    /// Its attention.
    pub shape: GqaShape,
    /// What was asked.
    pub settings: &'a ConvertSettings,
    /// Class that is written for.
    pub target: Target,
}

/// What a method would do on a model.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Splits to compare; one where nothing is open. The first counts until a survey has chosen.
    pub splits: Vec<Split>,
    /// Frequencies the slots may take.
    pub grid: RopeGrid,
    /// Whether projections of the output have biases.
    pub bias: bool,
    /// Whether the queries' bias is carried.
    pub query_bias: bool,
    /// Rank of the queries' own latent; `None`: queries are projected directly. The largest where ranks are open.
    pub q_rank: Option<usize>,
    /// Whether the rank of the key/value latent waits for the survey.
    pub kv_rank_open: bool,
    /// Whether the rank of the query latent does.
    pub q_rank_open: bool,
    /// `d_N`, values per head without rotation.
    pub nope: usize,
    /// Whether the output's weights are the source's own times powers of two.
    pub plain_weights: bool,
}

impl Candidates {
    /// Whether a rank waits for the survey.
    pub fn ranks_open(&self) -> bool {
        self.kv_rank_open || self.q_rank_open
    }
}

/// Calibration text that a method needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextNeed {
    /// Tokens of the longest windows, at least those of all others.
    pub longest: usize,
    /// Windows of [`CalibrationSettings::seq_len`](crate::calibrate::CalibrationSettings::seq_len) that all tokens used would
    /// fill, at most.
    pub samples: usize,
    /// Tokens of one window beside them, on which splits are compared.
    pub longer: Option<usize>,
    /// Tokens without which nothing can be fitted.
    pub least: usize,
    /// Whether text merely measures: that less than asked is used is then no news.
    pub measures: bool,
}

/// Which hidden states a method calibrates on.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    /// Those of the source.
    pub source: SourceStream,
    /// Whether the converted model's run beside them.
    pub converted: bool,
}

/// What a method needs of the source's stream.
#[derive(Debug, Clone, Copy)]
pub enum SourceStream {
    /// Nothing: no token is read.
    None,
    /// The normed inputs of attention. The method says what goes on to the next layer ([`LayerOutput::next`]).
    Inputs,
    /// The pass of the source's attention; its output goes on.
    Pass(Keep),
}

/// What a survey works with.
#[derive(Clone, Copy)]
pub struct Survey<'a> {
    /// The conversion.
    pub case: Case<'a>,
    /// What is open.
    pub candidates: &'a Candidates,
    /// Widths with the first split.
    pub geometry: Geometry,
    /// Windows, and the model to run on them.
    pub walk: Walk<'a>,
}

/// What a survey settled.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The split.
    pub split: Split,
    /// Rank of the queries' own latent, if ranks were open.
    pub q_rank: Option<usize>,
    /// What the method itself has to remember.
    pub result: SurveyResult,
    /// Mean relative error of the trial layers, where it was measured.
    pub predicted_error: Option<f64>,
    /// Decisions taken for the user.
    pub decisions: Vec<String>,
}

/// What a method has to remember of its survey, as a value that a journal can hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SurveyResult(Value);

impl SurveyResult {
    /// A result to remember.
    ///
    /// # Errors
    /// A value that JSON cannot hold, such as an infinite number.
    pub fn new(value: &impl Serialize) -> Result<Self, ConvertError> {
        serde_json::to_value(value).map(Self).map_err(|e| Self::unreadable(&e))
    }

    /// The result again.
    ///
    /// # Errors
    /// A journal that another method or version wrote.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ConvertError> {
        T::deserialize(&self.0).map_err(|e| Self::unreadable(&e))
    }

    fn unreadable(error: &serde_json::Error) -> ConvertError {
        ConvertError::refused(
            format!("the result of the survey cannot be read back: {error}"),
            "begin anew with --restart",
        )
    }
}

/// A conversion whose decisions are taken, as far as a layer needs to know.
#[derive(Clone, Copy)]
pub struct Made<'a> {
    /// The conversion.
    pub case: Case<'a>,
    /// Widths before padding.
    pub geometry: Geometry,
    /// Whether projections of the output have biases.
    pub bias: bool,
    /// What the method remembers of its survey.
    pub result: &'a SurveyResult,
}

/// A layer to convert.
#[derive(Clone, Copy)]
pub struct LayerInput<'a, 'b> {
    /// Layer index.
    pub index: usize,
    /// Its attention in f64; norms of queries and keys that the output has no place for are linear maps already.
    pub attention: &'a AttentionSource,
    /// Calibration tokens at its input; none for [`SourceStream::None`].
    pub tokens: Option<LayerTokens<'a, 'b>>,
}

impl<'a, 'b> LayerInput<'a, 'b> {
    /// The tokens.
    ///
    /// # Errors
    /// There are none: the method did not ask for a stream.
    pub fn tokens(&self) -> Result<LayerTokens<'a, 'b>, ConvertError> {
        self.tokens.ok_or_else(|| ConvertError::refused("the method calibrates on no stream", "please report this"))
    }
}

/// Calibration tokens at the input of a layer.
#[derive(Clone, Copy)]
pub struct LayerTokens<'a, 'b> {
    /// The layer's forward pass.
    pub layer: &'a SourceLayer<'b>,
    /// The source's attention on its own stream, for [`SourceStream::Pass`].
    pub pass: Option<&'a SourcePass>,
    /// Normed inputs that the converted layer sees, `[T, D]`.
    pub x: ArrayView2<'a, f32>,
    /// Tokens per window.
    pub windows: &'a [usize],
}

impl<'a> LayerTokens<'a, '_> {
    /// The source's pass.
    ///
    /// # Errors
    /// There is none: the method did not ask for it.
    pub fn pass(&self) -> Result<&'a SourcePass, ConvertError> {
        self.pass.ok_or_else(|| ConvertError::refused("the method did not ask for a pass", "please report this"))
    }
}

/// A converted layer.
#[derive(Debug)]
pub struct LayerOutput {
    /// The layer.
    pub layer: MlaLayer,
    /// Its figures.
    pub figures: LayerReport,
    /// Attention output that the source's stream goes on with, `[T, D]`, for [`SourceStream::Inputs`].
    pub next: Option<Array2<f32>>,
    /// Attention output of the converted layer, `[T, D]`, for [`Streams::converted`].
    pub converted: Option<Array2<f32>>,
}

/// Figures of one converted layer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// Layer index.
    pub layer: usize,
    /// Relative squared error of the layer's attention output on calibration text; on windows held out where gradient steps
    /// were taken.
    #[serde(flatten, with = "error_under_both_names")]
    pub calibration_error: f64,
    /// Share of key energy whose rotation is lost.
    pub rope_loss: f64,
    /// Share of the joint key/value energy outside the latent.
    pub rank_loss: f64,
    /// Rank of keys and values, where ranks differ by layer or may be padded with zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_rank: Option<usize>,
    /// Rank of the queries, where they go through a latent of a method's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_rank: Option<usize>,
    /// Whether the layer keeps the source's attention.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
    /// Anything out of the ordinary: regularisation, rejected refinement.
    pub notes: Vec<String>,
}

/// [`LayerReport::calibration_error`] as documents have it: also under the name it had first, until `schema_version` 2.
mod error_under_both_names {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Names {
        calibration_error: f64,
        predicted_error: f64,
    }

    pub fn serialize<S: Serializer>(error: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        Names { calibration_error: *error, predicted_error: *error }.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Names::deserialize(deserializer).map(|names| names.calibration_error)
    }
}

/// Sizes of the work on one layer, as [`Method::cost`] counts with them.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// The conversion.
    pub case: Case<'a>,
    /// Widths before padding.
    pub geometry: Geometry,
    /// Calibration tokens.
    pub tokens: u64,
    /// Length of the window that a token is in, on average.
    pub mean_window: f64,
    /// Bytes of the source's forward pass through the layer, weights and activations.
    pub forward_bytes: u64,
    /// Bytes of what an MLP holds of the tokens.
    pub mlp_bytes: u64,
}

impl Work<'_> {
    /// Hidden size `D`.
    pub fn hidden(&self) -> u64 {
        self.case.arch.hidden as u64
    }

    /// Width of all queries, `H d`.
    pub fn queries(&self) -> u64 {
        (self.case.arch.heads * self.case.shape.head_dim) as u64
    }

    /// Width of all keys, `g d`.
    pub fn keys(&self) -> u64 {
        (self.case.shape.kv_heads * self.case.shape.head_dim) as u64
    }

    /// Weights of the source's attention.
    pub fn attention_weights(&self) -> u64 {
        2 * (self.queries() + self.keys()) * self.hidden()
    }

    /// Weights of its MLP.
    pub fn mlp_weights(&self) -> u64 {
        3 * self.case.arch.intermediate as u64 * self.hidden()
    }

    /// Width of the output's query latent, 0 without one.
    pub fn query_latent(&self) -> u64 {
        self.geometry.q_lora_rank.unwrap_or(0) as u64
    }

    /// Floating-point operations of the source's forward pass through the layer.
    pub fn forward_flops(&self) -> f64 {
        let (t, d, i) = (self.tokens as f64, self.hidden() as f64, self.case.arch.intermediate as f64);
        let (q, kv) = (self.queries() as f64, self.keys() as f64);
        2.0 * t * (d * (2.0 * q + 2.0 * kv) + 3.0 * d * i + self.mean_window * q)
    }

    /// Floating-point operations of second moments of the inputs.
    pub fn moment_flops(&self) -> f64 {
        2.0 * self.tokens as f64 * (self.hidden() as f64).powi(2)
    }

    /// Floating-point operations of an eigenvalue problem of joint keys and values.
    pub fn solve_flops(&self) -> f64 {
        let z = 2.0 * self.keys() as f64;
        30.0 * z.powi(3) + 6.0 * z * (self.hidden() as f64).powi(2)
    }
}

/// What converting one layer takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Tokens of all streams of hidden states.
    pub streamed_tokens: u64,
    /// Bytes at work on the layer.
    pub working_bytes: u64,
    /// Bytes where the source's forward pass runs beside the conversion.
    pub overlapped_bytes: u64,
}

/// A method from options as they were typed: name and value, empty for a flag.
pub type Make = fn(&[(&str, &str)]) -> Result<super::MethodChoice, ConvertError>;

/// A method by its name: what the registry knows of it.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Name on the command line.
    pub name: &'static str,
    /// Its own options.
    pub options: &'static [&'static MethodOption],
    /// The method with options set, in order. They are among `options` and parse.
    pub make: Make,
}

impl Entry {
    /// Whether the option of that name is one of the method's own.
    pub fn takes(&self, option: &str) -> bool {
        self.options.iter().any(|own| own.name == option)
    }
}

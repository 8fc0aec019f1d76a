//! What `distill` is asked to do, and what it did.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::error::ConvertError;
use crate::publish;
use crate::write::{Leftover, WriteError};

/// Version of `distill.json`.
pub const DISTILL_SCHEMA: u32 = 1;
/// The report in a distilled folder.
pub const DISTILL_FILE: &str = "distill.json";

/// Which tensors are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Train {
    /// Those of attention: projections to queries, latents and keys, from latents, and to the output, with their biases.
    #[serde(rename = "attention")]
    Attention,
    /// Also the gains of all norms, but for those of latents that have been made to do nothing.
    #[serde(rename = "attention+norms")]
    Norms,
    /// Also the MLPs. The embedding and the output head stay.
    #[serde(rename = "all")]
    All,
}

impl Train {
    /// Every choice.
    pub const ALL: [Train; 3] = [Train::Attention, Train::Norms, Train::All];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Train::Attention => "attention",
            Train::Norms => "attention+norms",
            Train::All => "all",
        }
    }

    pub(super) fn norms(self) -> bool {
        self != Train::Attention
    }

    pub(super) fn mlps(self) -> bool {
        self == Train::All
    }
}

impl fmt::Display for Train {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What `distill` is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DistillSettings {
    /// Tokens to train on; what the text has not is read again.
    pub tokens: usize,
    /// Which tensors are trained.
    pub train: Train,
    /// `.txt` or `.jsonl` (field `text`) files; empty: the bundled calibration text.
    pub files: Vec<PathBuf>,
    /// Tokens of the longest windows; three eighths of the tokens are in windows of a quarter of it, an eighth in windows of
    /// a 64th, where those numbers are whole.
    pub seq_len: usize,
    /// Tokens of a step, at least, in whole windows.
    pub batch_tokens: usize,
    /// Size of a full step, as a share of the root mean square of each kind of row.
    pub step_size: f64,
    /// Decides which windows are held out and in what order the others come.
    pub seed: u64,
    /// Longest weight file in bytes.
    pub max_shard_bytes: u64,
    /// Replace an existing output folder.
    #[serde(skip)]
    pub overwrite: bool,
    /// What to do with an unfinished run to the same output. Training is not resumed: [`Leftover::Resume`] is
    /// [`Leftover::Refuse`] here.
    #[serde(skip)]
    pub leftover: Leftover,
}

impl Default for DistillSettings {
    fn default() -> Self {
        Self {
            tokens: 100_000,
            train: Train::Attention,
            files: Vec::new(),
            seq_len: 1024,
            batch_tokens: 2048,
            step_size: 2e-4,
            seed: 42,
            max_shard_bytes: 5_000_000_000,
            overwrite: false,
            leftover: Leftover::Refuse,
        }
    }
}

/// Mean of `KL(source || student)` over the held-out tokens of one text, in nats per token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextFigures {
    /// Name of its file.
    pub name: String,
    /// Tokens that could be trained on.
    pub train_tokens: usize,
    /// Tokens that were held out.
    pub held_out_tokens: usize,
    /// Which windows those are: numbers of windows of [`DistillReport::seq_len`] tokens, from the beginning of the text.
    pub held_out_windows: Vec<usize>,
    /// Of the model that came in.
    pub kl_before: f64,
    /// Of the one that was written.
    pub kl_after: f64,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Steps taken, this one included.
    pub step: usize,
    /// Tokens trained on so far.
    pub tokens: usize,
    /// Mean loss of its tokens before it, in nats.
    pub loss: f64,
    /// Share of each size by which it moved weights.
    pub rate: f64,
}

/// An evaluation on the held-out windows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutPoint {
    /// Steps taken.
    pub step: usize,
    /// Tokens trained on so far.
    pub tokens: usize,
    /// Whether the average of the latest weights was evaluated, or the weights themselves.
    pub averaged: bool,
    /// Mean loss over all held-out tokens, in nats.
    pub kl: f64,
}

/// What `distill` did: `distill.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DistillReport {
    /// Version of this document.
    pub schema_version: u32,
    /// Tool version.
    pub tool_version: String,
    /// Where the output is.
    pub output: PathBuf,
    /// The source, as the user named it.
    pub source: String,
    /// The student, as the user named it.
    pub student: String,
    /// sha256 of each of the student's weight files' headers, by file name.
    pub student_fingerprint: BTreeMap<String, String>,
    /// Settings.
    pub settings: DistillSettings,
    /// Tokens of the longest windows: as asked for, or as many as the models have positions.
    pub seq_len: usize,
    /// Tokens that were trained on.
    pub tokens: usize,
    /// Numbers that were trained.
    pub trained_values: usize,
    /// Mean loss over all held-out tokens before, in nats.
    pub kl_before: f64,
    /// And after.
    pub kl_after: f64,
    /// Steps after which the written weights were taken; 0: nothing got better, and they are those that came in.
    pub best_step: usize,
    /// Whether they are an average over the latest steps.
    pub averaged: bool,
    /// Figures by text.
    pub texts: Vec<TextFigures>,
    /// Steps.
    pub curve: Vec<CurvePoint>,
    /// Evaluations on the held-out windows.
    pub held_out: Vec<HeldOutPoint>,
    /// Decisions taken for the user, one sentence each.
    pub decisions: Vec<String>,
    /// Wall-clock time of training in seconds. Not in the folder, whose bytes the same command gives again.
    pub seconds: f64,
}

impl publish::Report for DistillReport {
    const FILE: &'static str = DISTILL_FILE;

    fn document(&self) -> Result<Value, ConvertError> {
        let mut value =
            serde_json::to_value(self).map_err(|e| ConvertError::from(WriteError::from(std::io::Error::from(e))))?;
        if let Some(map) = value.as_object_mut() {
            map.remove("output");
            map.remove("seconds");
        }
        Ok(value)
    }
}

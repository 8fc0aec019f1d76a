//! Everything that decides what `convert` writes, and its checks that need no model.

use std::str::FromStr;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::options::not_taken;
use super::{MethodChoice, MlaLayers};
use crate::calibrate::CalibrationSettings;
use crate::error::ConvertError;
use crate::runtime::DeviceChoice;
use crate::target::{OutputDtype, Padding, Profile, RopeGrid, TargetChoice};
use crate::write::Leftover;

/// Cache size asked for, per token and layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// `kv_lora_rank + qk_rope_head_dim`.
    Values(usize),
    /// Percentage of the source's `2 g d`, in `(0, 100]`.
    Percent(f64),
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad =
            || format!("`{s}` is neither a number of values per token per layer (`192`) nor a percentage (`50%`)");
        if let Some(p) = s.strip_suffix('%') {
            let p: f64 = p.trim().parse().map_err(|_| bad())?;
            return match p {
                p if p > 0.0 && p <= 100.0 => Ok(Budget::Percent(p)),
                p if p > 100.0 => Err(format!("`{s}` is more than the source's cache")),
                _ => Err(bad()),
            };
        }
        s.parse().ok().filter(|n| *n > 0).map(Budget::Values).ok_or_else(bad)
    }
}

/// Everything that decides what `convert` writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConvertSettings {
    /// Method, with its own settings.
    #[serde(flatten, serialize_with = "with_all_methods")]
    pub method: MethodChoice,
    /// Latent width `r`, if given.
    pub kv_lora_rank: Option<usize>,
    /// Rotated width `d_R`, if given.
    pub qk_rope_head_dim: Option<usize>,
    /// Query latent width, if given.
    pub q_lora_rank: Option<usize>,
    /// Cache budget, if given instead of the two widths.
    pub kv_budget: Option<Budget>,
    /// Layers that become MLA; `None`: all.
    pub mla_layers: Option<MlaLayers>,
    /// Target class.
    pub target: TargetChoice,
    /// Which engines the class is written for; `None`: as the other settings have it.
    pub profile: Option<Profile>,
    /// Zero-padding of widths; `None`: to kernels for the portable profile.
    pub pad: Option<Padding>,
    /// RoPE frequencies of the rotated slots; `None`: the target's best.
    pub rope_grid: Option<RopeGrid>,
    /// Output dtype; `None`: the source's.
    pub dtype: Option<OutputDtype>,
    /// Calibration text.
    pub calibration: CalibrationSettings,
    /// Where calibration runs the model. The last bits of the output depend on it.
    pub device: DeviceChoice,
    /// Longest weight file in bytes.
    pub max_shard_bytes: u64,
    /// Longest context the output claims; lets a sliding-window source be converted within its window.
    pub max_context: Option<usize>,
    /// Replace an existing output folder. Changes nothing of the output.
    #[serde(skip)]
    pub overwrite: bool,
    /// Go on where the tool would refuse for the user's good (no smaller cache, ...).
    pub force: bool,
    /// Memory to stay within, in bytes; beyond it hidden states wait on the disk. Changes nothing of the output.
    #[serde(skip)]
    pub max_memory: Option<u64>,
    /// What to do with an unfinished run for the same output. Changes nothing of the output.
    #[serde(skip)]
    pub leftover: Leftover,
}

impl Default for ConvertSettings {
    fn default() -> Self {
        Self {
            method: MethodChoice::default(),
            kv_lora_rank: None,
            qk_rope_head_dim: None,
            q_lora_rank: None,
            kv_budget: None,
            mla_layers: None,
            target: TargetChoice::Auto,
            profile: None,
            pad: None,
            rope_grid: None,
            dtype: None,
            calibration: CalibrationSettings::default(),
            device: DeviceChoice::Cpu,
            max_shard_bytes: 5_000_000_000,
            max_context: None,
            overwrite: false,
            force: false,
            max_memory: None,
            leftover: Leftover::Refuse,
        }
    }
}

impl ConvertSettings {
    /// Whether any width of the cache was asked for.
    pub fn asks_widths(&self) -> bool {
        self.kv_budget.is_some() || self.kv_lora_rank.is_some() || self.qk_rope_head_dim.is_some()
    }

    /// Refuse settings that contradict each other, whatever the model: the command line does so before it opens one,
    /// and planning does so for everyone.
    ///
    /// # Errors
    /// [`ConvertError::Refused`].
    pub fn validate(&self) -> Result<(), ConvertError> {
        if self.kv_budget.is_some() && self.kv_lora_rank.is_some() && self.qk_rope_head_dim.is_some() {
            return Err(ConvertError::refused(
                "--kv-budget, --kv-lora-rank and --qk-rope-head-dim are given together",
                "the budget is the sum of the two widths: give at most two of the three",
            ));
        }
        if let (Some(Budget::Values(total)), Some(part)) = (self.kv_budget, self.kv_lora_rank.or(self.qk_rope_head_dim))
            && part >= total
        {
            return Err(ConvertError::Refused {
                message: format!(
                    "a width of {part} leaves nothing of --kv-budget {total} for the other part of the cache"
                ),
                hint: None,
            });
        }
        let method = self.method.name();
        let compressing = "a method that compresses";
        if self.asks_widths() && !self.method.compresses() {
            return Err(not_taken(method, "--kv-budget, --kv-lora-rank and --qk-rope-head-dim", compressing));
        }
        if self.mla_layers.is_some() && !self.method.compresses() {
            return Err(not_taken(method, "--mla-layers", compressing));
        }
        self.method.validate(self)?;
        if self.calibration.max_seq_len.is_some() && !self.method.mixes_window_lengths() {
            return Err(not_taken(method, "--calib-max-seq-len", &format!("--method {}", mixing().join(" or "))));
        }
        Ok(())
    }
}

/// As `conversion.json` has it: the name, and the settings of every method, at their defaults but for those of this one.
fn with_all_methods<S: Serializer>(method: &MethodChoice, serializer: S) -> Result<S::Ok, S::Error> {
    let mut out = Map::from_iter([("method".to_owned(), Value::from(method.name()))]);
    for other in MethodChoice::all() {
        merge(&mut out, other.settings());
    }
    merge(&mut out, method.settings());
    out.serialize(serializer)
}

/// Names of the methods whose calibration windows have several lengths.
fn mixing() -> Vec<&'static str> {
    MethodChoice::all().iter().filter(|method| method.mixes_window_lengths()).map(|method| method.name()).collect()
}

/// Adds the keys of `from` to `to`, objects key by key.
fn merge(to: &mut Map<String, Value>, from: Value) {
    let Value::Object(from) = from else { return };
    for (key, value) in from {
        match (to.get_mut(&key), value) {
            (Some(Value::Object(inner)), value @ Value::Object(_)) => merge(inner, value),
            (_, value) => drop(to.insert(key, value)),
        }
    }
}

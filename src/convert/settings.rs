//! What the user may choose, validated.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use super::{MlaLayers, WeightSettings};
use crate::runtime::DeviceChoice;
use crate::write::Leftover;

/// How attention is factorised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Nothing lost, nothing compressed: the source's attention in an MLA container.
    Exact,
    /// TransMLA as published (arXiv 2502.07864), written for the stock class.
    Transmla,
    /// Covariance-aware factorisation (CARE, arXiv 2603.17946) in the MLA path.
    Care,
    /// X-EcoMLA's decomposition of weights (arXiv 2503.11132), positions made right.
    XEcomla,
    /// MHA2MLA's partial RoPE and decomposition of weights (arXiv 2502.14837), as an MLA layer.
    Mha2mla,
    /// Query- and output-weighted factorisation with refits: the default.
    AttentionAware,
}

impl Method {
    /// Every method, in the order the documentation lists them.
    pub const ALL: [Method; 6] =
        [Method::AttentionAware, Method::Care, Method::Transmla, Method::XEcomla, Method::Mha2mla, Method::Exact];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Exact => "exact",
            Method::Transmla => "transmla",
            Method::Care => "care",
            Method::XEcomla => "x-ecomla",
            Method::Mha2mla => "mha2mla",
            Method::AttentionAware => "attention-aware",
        }
    }

    /// Whether it factorises weights alone; calibration text then only measures (and ranks pairs, where asked to).
    pub fn from_weights(self) -> bool {
        matches!(self, Method::XEcomla | Method::Mha2mla)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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

/// TransMLA's FreqFold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreqFold {
    /// Double from the collapse factor while the predicted loss falls.
    Auto,
    /// That many neighbouring frequencies share one rotation.
    Fixed(usize),
}

impl FromStr for FreqFold {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "auto" {
            return Ok(FreqFold::Auto);
        }
        s.parse()
            .ok()
            .filter(|n| *n > 0)
            .map(FreqFold::Fixed)
            .ok_or_else(|| format!("`{s}` is neither `auto` nor a positive integer"))
    }
}

/// The class the output is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    /// The first of the others that holds the source.
    Auto,
    /// `DeepseekV3ForCausalLM`, dense.
    DeepseekV3,
    /// `DeepseekV2ForCausalLM`: experts chosen by softmax.
    DeepseekV2,
    /// `YoutuForCausalLM`: dense, served by vLLM through transformers' code without being asked.
    Youtu,
    /// `MiniCPM3ForCausalLM`: dense, any frequencies in SGLang.
    Minicpm3,
    /// The generic class of this tool, as code beside the weights.
    HfRemote,
}

impl TargetKind {
    /// Every choice, in the order the documentation lists them.
    pub const ALL: [TargetKind; 6] = [
        TargetKind::Auto,
        TargetKind::DeepseekV3,
        TargetKind::DeepseekV2,
        TargetKind::Youtu,
        TargetKind::Minicpm3,
        TargetKind::HfRemote,
    ];

    /// Name on the command line: the `model_type` of a stock class.
    pub fn name(self) -> &'static str {
        match self {
            TargetKind::Auto => "auto",
            TargetKind::DeepseekV3 => "deepseek_v3",
            TargetKind::DeepseekV2 => "deepseek_v2",
            TargetKind::Youtu => "youtu",
            TargetKind::Minicpm3 => "minicpm3",
            TargetKind::HfRemote => "hf-remote",
        }
    }
}

/// Which engines a stock class is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Every engine's own class: stock frequencies, no biases, widths padded to kernels.
    Portable,
    /// The source as it is: biases, any frequencies; transformers' code runs that.
    Faithful,
}

/// Zero-padding of widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// To the widths that serving kernels are compiled for.
    Kernels,
    /// None.
    None,
}

/// Which RoPE frequencies the rotated slots may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeGrid {
    /// One frequency per slot, any, carried as LongRoPE factors: transformers, vLLM's transformers backend.
    Free,
    /// `theta^(-2p/d_R)`: every engine.
    Stock,
}

/// Dtype of written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputDtype {
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// float32.
    F32,
    /// e4m3 in blocks of 128 x 128 with a scale each, the rest bfloat16.
    Fp8,
}

impl OutputDtype {
    /// Every dtype.
    pub const ALL: [OutputDtype; 4] = [OutputDtype::Bf16, OutputDtype::F16, OutputDtype::F32, OutputDtype::Fp8];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            OutputDtype::Bf16 => "bf16",
            OutputDtype::F16 => "f16",
            OutputDtype::F32 => "f32",
            OutputDtype::Fp8 => "fp8",
        }
    }
}

/// Calibration text and how much of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationSettings {
    /// `.txt` or `.jsonl` (field `text`) files, in order; empty: the bundled corpus.
    pub files: Vec<PathBuf>,
    /// Windows of `seq_len` that all the tokens would fill.
    pub samples: usize,
    /// Tokens per window; `attention-aware` adds longer and shorter ones ([`CalibrationSettings::mix`]).
    pub seq_len: usize,
    /// Tokens of the longest windows, at most; none: `attention-aware` takes [`CalibrationSettings::LONGEST`], all others
    /// `seq_len`.
    pub max_seq_len: Option<usize>,
    /// Seed of the choice of windows.
    pub seed: u64,
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self { files: Vec::new(), samples: 128, seq_len: 256, max_seq_len: None, seed: 42 }
    }
}

impl CalibrationSettings {
    /// Longest windows of `attention-aware` where nothing is said.
    pub const LONGEST: usize = 1024;
    /// How many times as long as the one before each longer window is.
    const LADDER: usize = 4;
    /// How many times as short as `seq_len` short windows are.
    const SHORT: usize = 16;
    /// Tokens of a short window, at least.
    const LEAST: usize = 8;

    /// Tokens per window and how many tokens are in windows of that length, longest first. Where `max_seq_len` asks for longer
    /// windows than `seq_len`, those are 4, 16, ... times as long, and have half the tokens in equal shares; an eighth is in
    /// windows of a sixteenth of `seq_len`, of which there are so many that many a first token is seen: all others look
    /// at it. What remains is in windows of `seq_len`.
    pub fn mix(&self) -> Vec<(usize, usize)> {
        let total = self.samples.saturating_mul(self.seq_len);
        let longest = self.max_seq_len.unwrap_or(self.seq_len);
        let longer = std::iter::successors(self.seq_len.checked_mul(Self::LADDER), |n| n.checked_mul(Self::LADDER));
        let longer: Vec<usize> = longer.take_while(|n| *n > 0 && *n <= longest).collect();
        let mut out: Vec<_> = longer.iter().rev().map(|n| (*n, total / 2 / longer.len())).collect();
        let short = self.seq_len / Self::SHORT;
        let short = (longest > self.seq_len && short >= Self::LEAST && short * Self::SHORT == self.seq_len)
            .then_some((short, total / 8));
        let others = out.iter().chain(&short).map(|part| part.1).sum::<usize>();
        out.push((self.seq_len, total - others));
        out.extend(short);
        out
    }
}

/// Steps of `attention-aware`; each can be switched off so that its worth can be shown (`--without STEP`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Steps {
    /// Best constant phase for pairs that lose RoPE.
    pub phase: bool,
    /// Query-weighted slots (off: plain key energy).
    pub query_weight: bool,
    /// Centred covariance in the joint low rank.
    pub centring: bool,
    /// Query/output metric (off: plain L2).
    pub metric: bool,
    /// Query refit on the source's scores.
    pub query_refit: bool,
    /// Key refit on the source's scores.
    pub key_refit: bool,
    /// Per-head value refit on attention-pooled inputs.
    pub value_refit: bool,
    /// Output projection refit on the source's attention output.
    pub output_refit: bool,
    /// Statistics from the converted stream upstream.
    pub converted_stream: bool,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            phase: true,
            query_weight: true,
            centring: true,
            metric: true,
            query_refit: true,
            key_refit: true,
            value_refit: true,
            output_refit: true,
            converted_stream: true,
        }
    }
}

impl Steps {
    /// Names accepted by `--without`.
    pub const NAMES: [&'static str; 9] = [
        "phase",
        "query-weight",
        "centring",
        "metric",
        "query-refit",
        "key-refit",
        "value-refit",
        "output-refit",
        "converted-stream",
    ];

    /// Switch one step off by name; `false` if there is no such step.
    pub fn disable(&mut self, name: &str) -> bool {
        match name {
            "phase" => self.phase = false,
            "query-weight" => self.query_weight = false,
            "centring" => self.centring = false,
            "metric" => self.metric = false,
            "query-refit" => self.query_refit = false,
            "key-refit" => self.key_refit = false,
            "value-refit" => self.value_refit = false,
            "output-refit" => self.output_refit = false,
            "converted-stream" => self.converted_stream = false,
            _ => return false,
        }
        true
    }
}

/// Everything that decides what `convert` writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConvertSettings {
    /// Method.
    pub method: Method,
    /// Latent width `r`, if given.
    pub kv_lora_rank: Option<usize>,
    /// Rotated width `d_R`, if given.
    pub qk_rope_head_dim: Option<usize>,
    /// Query latent width, if given.
    pub q_lora_rank: Option<usize>,
    /// Cache budget, if given instead of the two widths.
    pub kv_budget: Option<Budget>,
    /// TransMLA: FreqFold.
    pub freqfold: FreqFold,
    /// TransMLA: `--balance-kv-ratio`; `None` switches balancing off.
    pub balance_kv_ratio: Option<f64>,
    /// Settings of `x-ecomla` and `mha2mla`.
    pub weights: WeightSettings,
    /// Layers that become MLA; `None`: all.
    pub mla_layers: Option<MlaLayers>,
    /// Steps of `attention-aware`.
    pub steps: Steps,
    /// Gradient steps per layer after the closed form (`attention-aware`).
    pub refine: usize,
    /// Tokens of the calibration text that are used (`attention-aware`). `None`: 28 per value of the hidden state, 16384 at
    /// least, and all where there are gradient steps.
    pub fit_tokens: Option<usize>,
    /// Target class.
    pub target: TargetKind,
    /// Which engines the class is written for; `None`: as the other settings have it.
    pub profile: Option<Profile>,
    /// Zero-padding of widths; `None`: to kernels for the portable profile.
    pub pad: Option<Padding>,
    /// RoPE frequencies of the rotated slots; `None`: the target's best.
    pub rope_grid: Option<RopeGrid>,
    /// Output dtype; `None`: the source's.
    pub dtype: Option<OutputDtype>,
    /// Calibration.
    pub calibration: CalibrationSettings,
    /// Where calibration runs the model. The last bits of a sum differ between devices, so the output's bytes do.
    pub device: DeviceChoice,
    /// Longest shard in bytes.
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
            method: Method::AttentionAware,
            kv_lora_rank: None,
            qk_rope_head_dim: None,
            q_lora_rank: None,
            kv_budget: None,
            freqfold: FreqFold::Auto,
            balance_kv_ratio: Some(1.0),
            weights: WeightSettings::default(),
            mla_layers: None,
            steps: Steps::default(),
            refine: 0,
            fit_tokens: None,
            target: TargetKind::Auto,
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

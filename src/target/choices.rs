//! What a user may choose of the output: class, profile, padding, frequencies, dtype.

use serde::{Deserialize, Serialize};

/// The class the output is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Whether it carries a score scale of its own; stock classes scale by the width of a head.
    pub fn has_own_score_scale(self) -> bool {
        self == TargetKind::HfRemote
    }

    /// Whether it carries any list of frequencies as it is; stock classes express one as LongRoPE factors.
    pub fn has_any_frequencies(self) -> bool {
        self == TargetKind::HfRemote
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

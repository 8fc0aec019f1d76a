//! What a user may choose of the output beside its class: profile, padding, frequencies, dtype.

use serde::{Deserialize, Serialize};

/// Which engines a stock class is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Every engine's own class: stock frequencies, no biases, widths padded to kernels.
    Portable,
    /// The source as it is: biases, any frequencies; transformers' code runs that.
    Faithful,
}

/// Zero-padding of widths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

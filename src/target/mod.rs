//! From a target-neutral layer to the tensors and config of a class.

mod config;
mod emission;
mod fit;
pub mod fp8;
pub mod pad;
mod rope;
mod spec;
mod tensor;
mod tokenizer;

pub use emission::{Emission, Emit, Origin};
pub use fit::{choose, obstacles};
pub use rope::{RopeConfig, rope_config};
pub use spec::{LATENT_EPS, TargetSpec};
pub use tensor::{OutTensor, encode};
pub use tokenizer::{TokenizerFiles, tokenizer_files};

/// File of the generic class that `--target hf-remote` writes beside the weights, and its text.
pub const REMOTE_FILE: (&str, &str) = ("modeling_gqa2mla.py", include_str!("remote/modeling_gqa2mla.py"));

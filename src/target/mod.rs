//! From a target-neutral layer to the tensors and config of a class.

mod choices;
mod config;
mod emission;
mod fit;
pub mod fp8;
mod origin;
pub mod pad;
mod rope;
mod spec;
mod tensor;

pub use choices::{OutputDtype, Padding, Profile, RopeGrid, TargetKind};
pub use emission::Emission;
pub use fit::{choose, obstacles};
pub use origin::{Cut, Emit, Origin};
pub use rope::{RopeConfig, rope_config};
pub use spec::{LATENT_EPS, TargetSpec};
pub use tensor::{OutTensor, encode};

/// File of the generic class that `--target hf-remote` writes beside the weights, and its text.
pub const REMOTE_FILE: (&str, &str) = ("modeling_gqa2mla.py", include_str!("remote/modeling_gqa2mla.py"));

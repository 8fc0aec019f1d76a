//! From a target-neutral layer to the tensors and config of a stock class.

mod deepseek_v3;
mod fit;
mod rope;
mod tensor;

pub use deepseek_v3::{LATENT_EPS, TargetSpec};
pub use fit::obstacles;
pub use rope::{RopeConfig, rope_config};
pub use tensor::{OutTensor, encode};

//! From a folder or hub id to a validated directory of memory-mapped tensors.
//!
//! Knows files and formats; knows nothing of attention.

mod dtype;
mod tensor;

pub use dtype::Dtype;
pub use tensor::TensorView;
mod stub;
pub use stub::*;

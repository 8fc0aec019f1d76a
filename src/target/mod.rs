//! From a target-neutral layer to the tensors and config of a class.
//!
//! A class is a file in [`classes`] with one implementation of [`Class`]; [`classes::CLASSES`] lists them. Everything else here
//! asks the class for its properties and knows none by name.

mod attention;
mod choices;
mod class;
pub mod classes;
mod config;
mod emission;
mod fitting;
pub mod fp8;
mod neutral;
mod origin;
pub mod pad;
mod portable;
mod registry;
mod rope;
mod select;
mod spec;
mod storage;
mod tensor;
#[cfg(test)]
mod tests;
mod tokenizer;

pub use attention::{AttentionTensor, Holds};
pub use choices::{OutputDtype, Padding, Profile, RopeGrid};
pub use class::{Caveat, Class, ClassFile, ConfigInput};
pub use config::torch_name;
pub use emission::Emission;
pub use fitting::{Fitted, fit};
pub use neutral::{LATENT_EPS, LatentNorm};
pub use origin::{Cut, Emit, Origin};
pub use portable::check_portable;
pub use registry::{Target, TargetChoice};
pub use rope::{RopeConfig, rope_config};
pub use select::{Wanted, choose, select};
pub use spec::TargetSpec;
pub use storage::Storage;
pub use tensor::{OutTensor, encode};
pub use tokenizer::{TokenizerFiles, tokenizer_files};

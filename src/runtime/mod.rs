//! The reference forward pass: GQA and MLA decoders, written once over a small op trait.
//!
//! [`Backend`] is about a dozen operations on row-major matrices `[rows, columns]` of f32, and on weights of linear layers,
//! which a device may hold narrower; [`Cpu`] implements them, on weights in place in their files ([`Model::in_place`]). A
//! [`Layer`] is one decoder layer on a backend, fed and read as host arrays, so that a conversion needs the memory of
//! one layer. A [`Model`] streams tokens through all layers from a checkpoint; a [`Resident`] holds all layers, and a
//! [`Session`] decodes on it with a KV cache. Nothing here knows how a conversion works.
//!
//! Activations of several windows of text lie under each other: `[T, D]` with `T` the sum of the window lengths. Each
//! window starts at position 0 and attends to itself only.

#[cfg(any(feature = "gpu", feature = "cuda"))]
mod accelerator;
mod attention;
mod backend;
mod bench;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod error;
mod feed_forward;
mod generate;
#[cfg(feature = "gpu")]
pub mod gpu;
mod layer;
mod model;
mod rotation;
mod router;
mod sampling;
mod session;
mod sliced;
mod statistics;
mod tensors;
mod weight;
mod xkv;

pub use attention::{RankTensors, Ranks, RawKv};
pub use backend::{AttentionShape, Backend, HeadColumns, HeadPart, LinearWeights, MlpWeights, Span};
pub use bench::{Case, Trial, median};
pub use cpu::Cpu;
pub(crate) use cpu::{LONG_MLP, erf, exponentials, silu_mul_backward, silu_times, softmax};
pub use device::{Device, DeviceChoice, DeviceDescription, DeviceTensor, DeviceWeight, Precision, devices};
pub use error::RuntimeError;
pub use generate::{Decode, Generation, Stop, generate};
pub(crate) use layer::CHUNK;
pub use layer::{Layer, MlpTrace};
pub use model::{Head, Model};
pub use rotation::Rotation;
pub use sampling::Sampler;
pub use session::{Resident, Session, SessionSize};
pub use statistics::{ProbabilityTile, Qkv};
pub(crate) use statistics::{Scoring, TileRoom, probability_tiles, query_tiles};
pub use tensors::{
    AttentionTensors, ExpertTensors, FeedForwardTensors, GqaTensors, LayerExtras, LayerTensors, Linear, MlaTensors,
    MlpTensors, QueryTensors,
};
pub use weight::HostWeight;
pub(crate) use xkv::GroupCache;
pub use xkv::{XkvBytes, XkvError, XkvSession, XkvSettings};

//! Turn a pretrained GQA/MHA checkpoint into a Multi-head Latent Attention (MLA) checkpoint, and prove the result.
//!
//! A conversion is a straight line, one layer at a time; each module is a stage, in the order data meets it:
//! [`source`] (files to tensors) → [`arch`] (family to one normal form) → [`calibrate`] (tokens to second moments) →
//! [`factor`] (pure maths on matrices) → [`methods`] (which maths, in what order, per layer) → [`target`] (names,
//! config and dtype of a stock class) → [`mod@write`] (shards, atomic publish). [`runtime`] is the reference forward pass
//! that moves calibration tokens along and runs both models for [`verify`]; [`convert`] drives the line; [`analyze`] looks
//! at caches across layers; [`report`] holds what comes out.
//!
//! The library never prints. Progress goes to an [`observe::Observer`]; results are values.

pub mod analyze;
pub mod arch;
pub mod calibrate;
pub mod convert;
pub mod error;
pub mod factor;
#[doc(hidden)]
pub mod fuzzing;
pub mod latent;
pub mod methods;
pub mod mla;
pub mod observe;
pub mod plan;
pub mod publish;
mod random;
pub mod report;
pub mod runtime;
pub mod source;
pub mod stream;
pub mod target;
pub mod verify;
pub mod write;

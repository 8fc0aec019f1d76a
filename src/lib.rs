//! Turn a pretrained GQA/MHA checkpoint into a Multi-head Latent Attention (MLA) checkpoint, and prove the result.
//!
//! ```
//! use gqa2mla::arch::Architecture;
//! use gqa2mla::convert::{Budget, CalibrationSettings, ConvertSettings, convert};
//! use gqa2mla::observe::Silent;
//! use gqa2mla::source::{ModelSource, OpenOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = ModelSource::open("fixtures/pico-trained", &OpenOptions::default(), &Silent)?;
//! let arch = Architecture::from_config(&source.config)?;
//! let calibration = CalibrationSettings { samples: 8, seq_len: 64, ..Default::default() };
//! let settings = ConvertSettings { kv_budget: Some(Budget::Percent(50.0)), calibration, ..Default::default() };
//! let folder = tempfile::tempdir()?;
//! let report = convert(&source, &arch, &settings, &folder.path().join("mla"), &|_| Vec::new(), &Silent)?;
//! assert_eq!(report.cache_values_per_token_per_layer, 64); // of 128 in the source
//! # Ok(())
//! # }
//! ```
//!
//! A conversion is a straight line, one layer at a time; each module is a stage, in the order data meets it:
//! [`source`] (files to tensors) → [`arch`] (family to one normal form) → [`calibrate`] (tokens to second moments) →
//! [`factor`] (pure maths on matrices) → [`methods`] (which maths, in what order, per layer) → [`target`] (names,
//! config and dtype of a stock class) → [`mod@write`] (shards, atomic publish). [`runtime`] is the reference forward pass
//! that moves calibration tokens along and runs both models for [`verify`]; [`convert`] drives the line; [`distill`] trains
//! what was written on its source's predictions; [`analyze`] looks at caches across layers; [`report`] holds what comes out.
//!
//! The library never prints. Progress goes to an [`observe::Observer`]; results are values.

pub mod analyze;
pub mod arch;
pub mod calibrate;
pub mod convert;
pub mod distill;
pub mod error;
pub mod export;
pub mod factor;
#[doc(hidden)]
pub mod fuzzing;
mod gradient;
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

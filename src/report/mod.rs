//! What comes out, in the forms people and scripts read: JSON documents, terminal text, plots, the model card.
//!
//! Nothing here measures or prints: values come in, text goes out.

pub mod distillation;
pub mod engines;
pub mod export;
pub mod heatmap;
pub mod rotation;
pub mod svg;
pub mod table;
pub mod text;
pub mod units;

mod analysis;
mod card;
mod check;
mod devices;
mod inspect;
mod kv_table;
mod methods;
mod sliced;
mod speed;
mod verification;
mod xkv;

pub use analysis::AnalysisReport;
pub use card::card;
pub use check::Check;
pub use devices::DeviceList;
pub use inspect::{InspectedExperts, InspectedGqa, InspectedMla, InspectedModel, TargetOption};
pub use kv_table::KvRow;
pub use methods::{MethodComparison, MethodFigures, MethodRow};
pub use sliced::{SlicedCase, SlicedVerification};
pub use speed::{BenchReport, BenchRow, CompressedPrompt, GenerationReport, Rate};
pub use verification::{Evaluation, Verification};
pub use xkv::XkvReport;

/// Version of every JSON document this tool writes. It grows when a key changes meaning or goes away; new keys do not
/// change it.
pub const SCHEMA_VERSION: u32 = 1;

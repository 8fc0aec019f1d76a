//! What comes out, in the forms people and scripts read: JSON documents, terminal text, plots, the model card.
//!
//! Nothing here measures or prints: values come in, text goes out.

pub mod engines;
pub mod svg;
pub mod table;
pub mod text;
pub mod units;

mod card;
mod check;
mod devices;
mod inspect;
mod methods;
mod speed;
mod verification;

pub use card::card;
pub use check::Check;
pub use devices::DeviceList;
pub use inspect::{InspectedGqa, InspectedMla, InspectedModel, TargetOption};
pub use methods::{MethodComparison, MethodFigures, MethodRow};
pub use speed::{BenchReport, BenchRow, GenerationReport, Rate};
pub use verification::{Evaluation, Verification};

/// Version of every JSON document this tool writes. It grows when a key changes meaning or goes away; new keys do not
/// change it.
pub const SCHEMA_VERSION: u32 = 1;

//! The conversion loop: carry out a plan, layer by layer, and publish. See `docs/architecture.md`.

#[cfg(test)]
mod faults;
pub(crate) mod journal;
mod layers;
mod report;
mod run;

pub use crate::calibrate::CalibrationSettings;
pub use crate::error::ConvertError;
pub use crate::methods::{Budget, ConvertSettings, LayerCount, LayerReport, MethodChoice, MlaLayers};
pub use crate::mla::Geometry;
pub use crate::plan::{Plan, SCHEMA_VERSION, plan};
pub use crate::target::{OutputDtype, Padding, Profile, RopeGrid, Target, TargetChoice};
pub use report::ConversionReport;
pub use run::{Extras, convert, peak_rss_bytes};

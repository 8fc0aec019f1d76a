//! The conversion loop: plan, calibrate, factorise, emit, publish. See `docs/architecture.md`.

mod aware;
pub(crate) mod checkpoint;
mod error;
#[cfg(test)]
mod faults;
mod fit;
mod frozen;
mod head_norms;
mod hybrid;
mod layers;
mod memory;
mod plan;
mod prepare;
mod run;
mod scores;
mod settings;
mod state;
mod streams;
mod survey;
mod weight_settings;
mod weights;
mod widths;

pub use error::ConvertError;
pub use plan::{ConversionReport, LayerReport, Plan, PlannedGeometry};
pub use prepare::Job;
pub use run::{Extras, SCHEMA_VERSION, convert, peak_rss_bytes, plan};
pub use settings::{
    Budget, CalibrationSettings, ConvertSettings, FreqFold, Method, OutputDtype, Padding, Profile, RopeGrid, Steps,
    TargetKind,
};
pub use weight_settings::{LayerCount, MlaLayers, WeightSettings};

//! The conversion loop: plan, calibrate, factorise, emit, publish. See `docs/architecture.md`.

mod plan;
mod settings;

pub use plan::{ConversionReport, LayerReport, Plan, PlannedGeometry};
pub use settings::{
    Budget, CalibrationSettings, ConvertSettings, FreqFold, Method, OutputDtype, RopeGrid, Steps, TargetKind,
};
mod stub;
pub use stub::*;

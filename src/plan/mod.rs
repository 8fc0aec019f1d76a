//! From settings to a plan: check what can be checked, survey the model for what is open, and write every decision down in one
//! immutable value.
//!
//! ```text
//! Checked::new (settings, config, tensors)  ->  read_calibration (text)  ->  survey (a few windows)  ->  Blueprint
//! ```

mod blueprint;
mod check;
mod document;
mod hybrid;
mod memory;
mod survey;
mod text;

use crate::arch::Architecture;
use crate::error::ConvertError;
use crate::methods::ConvertSettings;
use crate::observe::Observer;
use crate::runtime::Device;
use crate::source::ModelSource;

pub use blueprint::{Blueprint, PlannedFile, emission};
pub use check::Checked;
pub use document::Plan;
pub use memory::{Need, give_back};
pub(crate) use survey::survey;
pub(crate) use text::read_calibration;

/// Version of `conversion.json` and of the plan.
pub const SCHEMA_VERSION: u32 = 1;

/// What `convert` would do. With `predict`, the model is surveyed for its predicted error too, which takes some seconds.
///
/// # Errors
/// Everything `convert` would refuse.
pub fn plan(
    source: &ModelSource,
    arch: &Architecture,
    settings: &ConvertSettings,
    predict: bool,
    observer: &dyn Observer,
) -> Result<Plan, ConvertError> {
    let mut checked = Checked::new(source, arch, settings)?;
    let (text, decision) = read_calibration(&checked, observer)?;
    checked.decisions.extend(decision);
    let blueprint = if survey::is_open(&checked) || settings.method.compresses() && predict {
        survey(&checked, &text, predict, &Device::open(settings.device)?, observer)?
    } else {
        survey::unsurveyed(&checked)?
    };
    document::describe(&checked, &blueprint, &text.windows)
}

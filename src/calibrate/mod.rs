//! From text to the statistics that methods ask for. Second moments only: no activations outlive their layer.

mod activations;
mod attend;
mod corpus;
mod moments;
mod profile;
mod settings;

pub(crate) use activations::project;
pub use activations::relative_error;
pub use attend::attend;
pub(crate) use attend::{by_window, by_window_and_head};
pub(crate) use corpus::{CalibrationText, calibration_text, shuffle, windows_of};
pub use corpus::{CorpusError, bundled_calibration, bundled_heldout, calibration_windows, read_texts};
pub use moments::{Moments, PooledMoments};
pub(crate) use moments::{add_gram, add_products};
pub use profile::DistanceProfile;
pub use settings::CalibrationSettings;

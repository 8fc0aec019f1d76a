//! From text to the statistics that methods ask for. Second moments only: no activations outlive their layer.

mod corpus;
mod moments;
mod profile;

pub use corpus::{CorpusError, bundled_calibration, bundled_heldout, calibration_windows, read_texts};
pub use moments::{Moments, PooledMoments};
pub use profile::DistanceProfile;

//! From text to the statistics that methods ask for. Second moments only: no activations outlive their layer.

mod attend;
mod corpus;
mod latent;
mod moments;
mod profile;
mod scores;

pub use attend::attend;
pub(crate) use corpus::shuffle;
pub(crate) use corpus::{CalibrationText, calibration_text};
pub use corpus::{CorpusError, bundled_calibration, bundled_heldout, calibration_windows, read_texts};
pub(crate) use latent::project;
pub use latent::{LatentAttention, output_projection, relative_error};
pub use moments::{Moments, PooledMoments};
pub(crate) use moments::{add_gram, add_products};
pub use profile::DistanceProfile;
pub use scores::{At, ScoreGradient, ScoreTarget};

//! Calibration tokens on their way through the source's layers: what surveys and the conversion loop both run on.

mod head_norms;
mod parked;
mod source;
mod walk;

pub use head_norms::Explained;
pub use parked::{Parked, StateFile, load};
pub use source::{Keep, Rows, SourceLayer, SourceModel, SourcePass, Stream, first_windows, input_gain, pick_rows};
pub use walk::{Visit, Walk};

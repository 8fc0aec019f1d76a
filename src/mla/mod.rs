//! Multi-head latent attention as plain values: one layer, its widths, and its forward pass on the host.

mod forward;
mod geometry;
mod layer;

pub use forward::{LatentAttention, output_error, output_projection};
pub use geometry::{Geometry, Split};
pub use layer::{MlaLayer, Query};

//! `export`: an MLA checkpoint written for another class, dtype or padding, the function unchanged.
//!
//! A layer is read into the neutral [`MlaLayer`](crate::mla::MlaLayer): a latent norm that does nothing is folded away, biases of
//! the latent become biases of queries and output, what only pads is cut off. Then it is written as a conversion would write it.
//! A norm that does something, as in models that were trained with one, has no place in the neutral layer: such a model keeps
//! its class, and only its dtype can change.

mod cast;
mod cut;
mod latent;
mod layer;
mod report;
mod run;

pub use report::{EXPORT_FILE, EXPORT_SCHEMA, ExportReport, ExportSettings, Route};
pub use run::{ExportExtras, export};

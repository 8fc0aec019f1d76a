//! What gradients of a decoder layer are made of: products, norms, rotations, activations and causal attention, forwards and
//! backwards.
//!
//! Everything is written once over [`Real`]: training runs in f32; the same code runs in f64 where gradients are checked
//! against finite differences, which f32 rounding would drown. Work is cut by shape alone and every sum is taken in one task,
//! so results do not depend on the number of threads.

mod activation;
mod attention;
mod norm;
mod product;
mod rotation;
#[cfg(test)]
mod tests;

pub(crate) use activation::{activated, activated_backward};
pub(crate) use attention::{Heads, Projected};
pub(crate) use norm::{rms_norm, rms_norm_backward};
pub(crate) use product::{Real, column_sums, product, product_into};
pub(crate) use rotation::turn_windows;

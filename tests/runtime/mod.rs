//! The reference forward pass and its caches.

mod experts;
mod golden;
mod layer;
mod xkv;

//! How much memory things take. A binary of its own: its allocator counts the heap of the whole process, so nothing else may
//! run in it.

// Figures for the record, shown with --nocapture.
#![allow(clippy::print_stdout)]

mod common {
    pub mod counting;
    pub mod models;
    pub mod products;
    pub mod xkv;
}

mod memory {
    mod conversion;
    mod experts;
    mod peak;
    mod xkv;
}

//! All tests that can share a process, a folder for each room of `src/`. `README.md` beside this file says what else there is,
//! how long it takes and how to run a part of it.

#![recursion_limit = "256"]

mod common {
    pub mod checkpoint;
    pub mod command;
    pub mod copies;
    pub mod golden;
    pub mod judge;
    pub mod logits;
    pub mod models;
    pub mod products;
    pub mod random;
    pub mod xkv;
}

mod analyze;
mod arch;
mod cli;
mod convert;
mod distill;
mod export;
#[cfg(unix)]
mod hostile;
mod latent;
mod methods;
mod repository;
mod runtime;
mod source;
mod target;
mod write;

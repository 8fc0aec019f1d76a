//! The one way in which a command writes a model folder.
//!
//! `convert`, `distill`, `rotate`, `shard` and `export` differ in the tensors they write and in nothing else. Each says what those are and
//! where every one comes from (a list of [`Emit`]), computes the values that no source tensor holds ([`Compute`]), and makes
//! a report ([`Report`]). What is common is here:
//!
//! 1. [`stage`] takes the lock of the output and opens a staging folder beside it;
//! 2. [`Publisher::write`] streams tensors into the planned weight files, rounded once and refused where they are not finite;
//! 3. [`Publisher::side_files`] checks that the source is what it was, and adds `config.json`, tokenizer, licence and code;
//! 4. [`Publisher::report`] adds the report and what the caller makes of it, such as a model card;
//! 5. [`Publisher::finish`] adds the manifest, waits for the disk, and puts the folder in its place in one rename.
//!
//! Up to the last step the output is as it was. A command that can be resumed keeps a journal in the staging folder
//! ([`Publisher::mark`], [`Publisher::resume`]); the others begin anew.
//!
//! [`Emit`]: crate::target::Emit

mod folder;
mod publisher;
mod rounding;
mod tensors;
#[cfg(test)]
mod tests;
mod tokenizer;

pub use folder::{Config, Extras, Report, fingerprint};
pub use publisher::{Compute, Nothing, Place, Publisher, stage};
pub use tokenizer::tokenizer_files;

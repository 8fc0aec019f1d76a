//! What can stop a compression of caches.

use crate::factor::FactorError;

/// Errors of xKV's compression.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum XkvError {
    /// Layers that do not cache the same thing.
    #[error(
        "some layers cache a latent, others keys and values: groups of them share nothing\n\nhint: give the source, or a conversion without `--mla-layers`"
    )]
    Hybrid,
    /// A group size that the model has no layers for.
    #[error(
        "groups of {group} layers: the model has {layers}\n\nhint: the third number of `--xkv` is from 1 to {layers}"
    )]
    Group {
        /// Layers per group asked for.
        group: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A rank that the matrices cannot have.
    #[error(
        "{what} {rank}: a prompt of {tokens} tokens and {group} layers of width {width} allow 1 to {}\n\nhint: {}",
        tokens.min(&(group * width)),
        match *tokens < group * width {
            true => "the prompt is too short for this rank: lower the rank, or give a longer prompt",
            false => "lower the rank, or take larger groups of layers",
        }
    )]
    Rank {
        /// `rank_k` or `rank_v`.
        what: &'static str,
        /// Rank asked for.
        rank: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// Layers per group.
        group: usize,
        /// Width of one layer's matrix.
        width: usize,
    },
    /// A decomposition failed.
    #[error("caches of layers {first} to {last}: {error}")]
    Factor {
        /// First layer of the group.
        first: usize,
        /// Last layer of the group.
        last: usize,
        /// What happened.
        error: FactorError,
    },
}

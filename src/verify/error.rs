//! What can stop a comparison.

use crate::arch::Architecture;

/// Errors of verification. A threshold that is not met is not an error but a [`super::Verdict`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A model could not be run.
    #[error("{model} model: {error}")]
    Run {
        /// `source`, `converted` or `evaluated`.
        model: &'static str,
        /// What happened.
        error: Box<crate::runtime::RuntimeError>,
    },
    /// The models do not share a vocabulary.
    #[error(
        "the source model has a vocabulary of {source_vocab}, the converted one of {converted_vocab}\n\nhint: was the second made from the first?"
    )]
    Vocabulary {
        /// Vocabulary of the source.
        source_vocab: usize,
        /// Vocabulary of the converted model.
        converted_vocab: usize,
    },
    /// No window has a token to predict.
    #[error(
        "there is nothing to predict: {windows} windows, none longer than one token\n\nhint: give a longer text or shorter windows"
    )]
    TooShort {
        /// Windows given.
        windows: usize,
    },
    /// A prompt that leaves nothing to measure, or none.
    #[error(
        "a prompt of {prompt} tokens in windows of {window}: it has to have some and leave two\n\nhint: give 1 to {} with `--xkv-prompt`, or longer windows with `--seq-len`",
        window.saturating_sub(2)
    )]
    Prompt {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the shortest window.
        window: usize,
    },
    /// A layer's latent has no principal directions.
    #[error("layer {layer}: {error}")]
    Turning {
        /// Layer index.
        layer: usize,
        /// Why.
        error: crate::factor::FactorError,
    },
    /// Principal directions without calibration.
    #[error("principal directions need the latents' moments on calibration text\n\nhint: give some with `--calib`")]
    NoMoments,
}

/// Whether logits of the two can be compared at all.
pub(super) fn same_vocabulary(source: &Architecture, converted: &Architecture) -> Result<(), VerifyError> {
    let (source_vocab, converted_vocab) = (source.vocab, converted.vocab);
    if source_vocab != converted_vocab {
        return Err(VerifyError::Vocabulary { source_vocab, converted_vocab });
    }
    Ok(())
}

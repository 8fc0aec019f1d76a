//! Why a command on checkpoints did not happen, from a refused setting to a full disk.

use crate::arch::ArchError;
use crate::calibrate::CorpusError;
use crate::factor::FactorError;
use crate::runtime::RuntimeError;
use crate::source::SourceError;
use crate::write::WriteError;

/// Errors of planning or running a conversion.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ConvertError {
    #[error(transparent)]
    Arch(#[from] ArchError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A layer could not be converted.
    #[error("layer {layer}: {source}")]
    Layer {
        /// Layer index.
        layer: usize,
        /// Why.
        source: MethodError,
    },
    /// The request cannot be met, or would not do the user good.
    #[error("{message}{}", hint.as_ref().map(|h| format!("\n\nhint: {h}")).unwrap_or_default())]
    Refused {
        /// What was asked, and why not.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "tensor `{name}`: {count} value{} not finite, the first ({value}) at {index:?}\n\nhint: the checkpoint is damaged or its training diverged; a conversion would spread the fault over the whole layer",
        if *count == 1 { " is" } else { "s are" }
    )]
    NotFinite {
        /// Tensor.
        name: String,
        /// How many values.
        count: u64,
        /// Where the first one is.
        index: Vec<usize>,
        /// The first one.
        value: String,
    },
    /// An output tensor came out NaN or infinite: a fault of this tool or of the calibration statistics, never written.
    #[error(
        "output tensor `{name}`: not finite after conversion; nothing was published\n\nhint: please report this with the model and the command"
    )]
    Produced {
        /// Tensor.
        name: String,
    },
}

/// Errors of a conversion method.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MethodError {
    /// A factorisation failed.
    #[error(transparent)]
    Factor(#[from] FactorError),
    /// A setting the method cannot meet on this model.
    #[error("{message}{}", hint.as_ref().map(|h| format!("\n\nhint: {h}")).unwrap_or_default())]
    Setting {
        /// What was asked and what is possible.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

impl ConvertError {
    /// Whether the machine is the reason, and not the model or the settings: the same run may end well once there is
    /// room, or the disk is back.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Source(SourceError::Io(_))
                | Self::Arch(ArchError::Source(SourceError::Io(_)))
                | Self::Runtime(RuntimeError::Source(SourceError::Io(_)))
                | Self::Write(_)
        )
    }

    pub(crate) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused { message: message.into(), hint: Some(hint.into()) }
    }

    pub(crate) fn layer<E: Into<MethodError>>(layer: usize) -> impl Fn(E) -> Self {
        move |source| Self::Layer { layer, source: source.into() }
    }
}

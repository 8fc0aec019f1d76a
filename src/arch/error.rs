//! What can be wrong with a config, or between a config and its weights.

/// Errors of reading a model's architecture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchError {
    /// `model_type` is of no known family.
    #[error(
        "unknown model type `{model_type}`\n\nhint: known types are {}; `--family-file` describes others",
        known.join(", ")
    )]
    UnknownFamily {
        /// `model_type` found.
        model_type: String,
        /// Model types that can be read.
        known: Vec<String>,
    },
    /// A config key is missing.
    #[error("config.json: `{key}` is missing\n\nhint: the family `{family}` needs it; is the folder complete?")]
    MissingKey {
        /// Config key.
        key: String,
        /// Family that asks for it.
        family: String,
    },
    /// A config key has a value that cannot be right.
    #[error("config.json: `{key}` is {found}, expected {expected}")]
    BadValue {
        /// Config key.
        key: String,
        /// Value found, as JSON.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The config asks for something this tool does not do.
    #[error("config.json: {what} is not supported{}", hint.as_ref().map(|h| format!("\n\nhint: {h}")).unwrap_or_default())]
    Unsupported {
        /// The feature, with its config key and value.
        what: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Config and weights disagree, or tensors are missing or unknown. One line each, at most 20.
    #[error("config.json and the weights disagree:\n  {}\n\nhint: the checkpoint is incomplete, or its config.json belongs to another model", lines.join("\n  "))]
    Mismatch {
        /// One sentence per disagreement.
        lines: Vec<String>,
    },
    /// An embedded or user-given family description is wrong.
    #[error("family description `{name}`: {message}")]
    BadFamily {
        /// Family or file name.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor could not be read.
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
}

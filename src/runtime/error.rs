//! What can go wrong in a forward pass.

/// Errors of the reference runtime.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// A tensor could not be read.
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
    /// A weight has another shape than the architecture implies.
    #[error("layer weight `{role}`: expected {expected:?}, found {found:?}")]
    Shape {
        /// Role of the weight, such as `kv_b`.
        role: &'static str,
        /// Shape the architecture implies.
        expected: Vec<usize>,
        /// Shape given.
        found: Vec<usize>,
    },
    /// Weights of one variant of a layer were given for an architecture of the other.
    #[error("layer weights are `{found}`, the architecture is `{expected}`")]
    Variant {
        /// Variant of the architecture.
        expected: &'static str,
        /// Variant of the weights.
        found: &'static str,
    },
    /// The windows do not add up to the rows of the activations.
    #[error("windows hold {windows} tokens, the activations have {rows} rows")]
    Windows {
        /// Sum of the window lengths.
        windows: usize,
        /// Rows given.
        rows: usize,
    },
    /// Activations of another width than the layer's.
    #[error("activations are {found} wide, the layer expects {expected}")]
    Width {
        /// Width the layer expects.
        expected: usize,
        /// Width given.
        found: usize,
    },
    /// A token id outside the embedding.
    #[error("token id {token} is outside the vocabulary of {vocab}\n\nhint: does the tokenizer belong to this model?")]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// More positions than the model was made for.
    #[error(
        "{length} tokens are more than the {max} positions of the model\n\nhint: cut the text into shorter windows"
    )]
    ContextTooLong {
        /// Positions asked for.
        length: usize,
        /// `max_position_embeddings`, or the session's capacity.
        max: usize,
    },
    /// Tokens for another number of sequences than the session has.
    #[error("tokens for {found} sequences, the session has {expected}")]
    Sequences {
        /// Sequences of the session.
        expected: usize,
        /// Sequences given.
        found: usize,
    },
    /// No token to work on.
    #[error("there is no token to run the model on")]
    NoTokens,
    /// NaN or infinity turned up.
    #[error("NaN or infinity in the output of {place}\n\nhint: the weights of that part are damaged, or overflow f32")]
    NotFinite {
        /// Where it appeared first: `layer 3`, `the embedding`, `the output head`.
        place: String,
    },
    /// A prompt's cache could not be compressed.
    #[error(transparent)]
    Xkv(#[from] super::XkvError),
    /// There is no such device.
    #[error(
        "there is no device `{wanted}`; this machine has:\n  {}\n\nhint: `--device gpu` takes any GPU, NVIDIA's included, `--device cpu` works everywhere",
        found.join("\n  ")
    )]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What there is, and why the rest cannot be used.
        found: Vec<String>,
    },
    /// A device has too little memory.
    #[error(
        "device `{device}` is out of memory: {message}\n\nhint: use `--device cpu`, or shorter and fewer windows, contexts and batches; `eval`, `verify` and `convert` hold one layer at a time, `generate` and `bench` the whole model"
    )]
    DeviceMemory {
        /// Device name.
        device: String,
        /// What the driver said.
        message: String,
    },
    /// A device failed.
    #[error("device `{device}` failed: {message}\n\nhint: `--device cpu` works everywhere")]
    Device {
        /// Device name.
        device: String,
        /// What the driver said.
        message: String,
    },
}

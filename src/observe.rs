//! Progress as values: the library reports, the binary draws.

/// One thing that happened. All byte and token counts are totals of the current phase, not increments.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A phase begins (`"calibrate"`, `"convert"`, `"verify"`, ...), with the number of steps it has, if known.
    Phase {
        /// Name of the phase, lower case, one word.
        name: &'static str,
        /// How many steps (layers, windows, files) it will take.
        steps: Option<u64>,
    },
    /// One step of the current phase is done.
    Step {
        /// Steps finished so far.
        done: u64,
        /// Tokens that went through the model in this phase so far, where the phase moves tokens.
        tokens: u64,
    },
    /// Where training stands, in nats per token.
    Loss {
        /// Of the latest step.
        train: f64,
        /// The best on windows that are not trained on.
        held_out: f64,
    },
    /// A tensor is in the output.
    Written {
        /// Its name.
        tensor: String,
    },
    /// What was done so far is on the disk: a run that is stopped now can be resumed.
    Checkpoint {
        /// The staging folder that holds it.
        folder: std::path::PathBuf,
        /// Layers finished.
        done: u64,
    },
    /// Bytes moved by a download.
    Download {
        /// File name within the repository.
        file: String,
        /// Bytes received so far.
        done: u64,
        /// Total size, if the server told.
        total: Option<u64>,
    },
    /// Something the user should know that is not an error.
    Warning(String),
    /// A decision taken on the user's behalf, and why.
    Note(String),
}

/// Receives [`Event`]s. Implementations must be cheap: they are called from the conversion loop.
pub trait Observer: Sync {
    /// Called once per event, from one thread at a time.
    fn event(&self, event: Event);
}

/// Discards every event.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}

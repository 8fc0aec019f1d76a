//! What can go wrong while a model is written.

use std::io;
use std::path::PathBuf;

use crate::source::Dtype;

/// Why a model could not be written. Unless a message says otherwise the output path is untouched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Reading or writing failed; the message carries the path.
    #[error(transparent)]
    Io(io::Error),

    /// The disk, or the quota on it, is full.
    #[error("{source}\n\nhint: the disk or the quota on it is full; free some space or choose another output")]
    Full {
        /// What the system said, with the path.
        source: io::Error,
    },

    /// Less space than the model will take.
    #[error(
        "`{}` has {available} bytes free, the model needs {needed}\n\nhint: free some space or choose another output",
        folder.display()
    )]
    NoSpace {
        /// Folder that would hold the output.
        folder: PathBuf,
        /// Bytes free for this user.
        available: u64,
        /// Bytes needed.
        needed: u64,
    },

    /// The output path has no last component (`/`, `..`).
    #[error("`{}` cannot be an output folder\n\nhint: give the path of a folder to create", path.display())]
    BadOutput {
        /// The path.
        path: PathBuf,
    },

    /// The folder that would hold the output is missing.
    #[error("the folder `{}` that would hold the output does not exist\n\nhint: create it first", parent.display())]
    NoParent {
        /// The missing folder.
        parent: PathBuf,
    },

    /// The output path is a file, a link or a device.
    #[error("output `{}` exists and is {kind}\n\nhint: choose another path", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },

    /// The output folder holds something already.
    #[error("output folder `{}` is not empty\n\nhint: choose another path, or pass --overwrite to replace it",
            path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },

    /// Overwriting was asked for, and the folder does not look like a model.
    #[error(
        "output folder `{}` holds neither `config.json` nor `manifest.json`, so it is not replaced\n\nhint: if it can \
         go, remove it yourself", path.display()
    )]
    NotAModel {
        /// The path.
        path: PathBuf,
    },

    /// Output and source are the same folder, or one holds the other.
    #[error("output `{}` and source `{}` overlap\n\nhint: choose an output outside the source folder",
            output.display(), input.display())]
    Overlap {
        /// Output folder.
        output: PathBuf,
        /// Source folder.
        input: PathBuf,
    },

    /// Another run writes to the same output.
    #[error(
        "`{}` is being written by process {pid} on host `{host}` since {started}\n\nhint: wait for it, or if it is \
         gone remove `{}`", output.display(), lock.display()
    )]
    Locked {
        /// Output folder.
        output: PathBuf,
        /// Lock file.
        lock: PathBuf,
        /// Process that holds it.
        pid: u32,
        /// Its host.
        host: String,
        /// When it began, seconds since 1970 UTC.
        started: u64,
    },

    /// A lock file that cannot be understood.
    #[error("lock file `{}` cannot be read: {reason}\n\nhint: if no other run is active, remove it", lock.display())]
    BadLock {
        /// Lock file.
        lock: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A tensor that cannot be planned.
    #[error("tensor {name:?} cannot be written: {reason}")]
    BadTensor {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A plan without tensors.
    #[error("no tensor to write")]
    EmptyPlan,

    /// A file name that is not plain, or is written by the writer itself, or was written before.
    #[error("file {name:?} cannot be added to the output: {reason}")]
    BadFile {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// Tensors came in another order than planned.
    #[error("expected tensor {}, found `{found}`", expected.as_ref().map_or("none".to_owned(), |e| format!("`{e}`")))]
    OutOfOrder {
        /// Next tensor of the plan; `None` when all are written.
        expected: Option<String>,
        /// Tensor offered.
        found: String,
    },

    /// A tensor with another size than planned.
    #[error("tensor `{name}` of shape {shape:?} and dtype {dtype}: expected {expected} bytes, found {found}")]
    WrongSize {
        /// Its name.
        name: String,
        /// Planned shape.
        shape: Vec<usize>,
        /// Planned dtype.
        dtype: Dtype,
        /// Planned bytes.
        expected: u64,
        /// Bytes offered.
        found: u64,
    },

    /// Publishing was asked for before every tensor was written.
    #[error("{missing} planned tensors were not written, the first is `{first}`")]
    Incomplete {
        /// How many.
        missing: usize,
        /// The first of them.
        first: String,
    },

    /// An earlier write failed, so the staging folder cannot be trusted any more.
    #[error("an earlier write failed; nothing can be published")]
    Poisoned,

    /// The model is in place, and its folder could not be synced: it may be lost in a power failure.
    #[error("`{}` is complete, but syncing the folder that holds it failed: {source}", path.display())]
    NotSynced {
        /// The published folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// No usable manifest.
    #[error("`{}`: {reason}", path.display())]
    BadManifest {
        /// Path of the manifest.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl From<io::Error> for WriteError {
    fn from(source: io::Error) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match source.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => WriteError::Full { source },
            _ => WriteError::Io(source),
        }
    }
}

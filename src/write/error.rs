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

    /// A journal whose plan has other files than this program would write.
    #[error(
        "the journal of the unfinished run plans other weight files than this program\n\nhint: begin anew with --restart"
    )]
    ForeignPlan,

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
        "`{}` is being written by process {pid} on host `{host}` since {}\n\nhint: wait for it, or if it is \
         gone remove `{}`", output.display(), date(*started), lock.display()
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

    /// An earlier run for the same output did not finish, and what it did can be used.
    #[error(
        "an unfinished conversion to `{}` lies in `{}` ({finished} steps of it are done)\n\nhint: the same command with \
         --resume goes on with it, with --restart it is removed and all begins anew", output.display(), folder.display()
    )]
    Unfinished {
        /// Output folder.
        output: PathBuf,
        /// Its staging folder.
        folder: PathBuf,
        /// Steps in its journal.
        finished: usize,
    },

    /// The unfinished run is not the one that was asked for.
    #[error(
        "the unfinished conversion in `{}` cannot be resumed: {field} {change}\n\nhint: repeat the \
         command it was begun with, or begin anew with --restart", folder.display()
    )]
    DifferentRun {
        /// Staging folder of the unfinished run.
        folder: PathBuf,
        /// What differs.
        field: String,
        /// What it was, and what it is now.
        change: String,
    },

    /// Hidden states that were put on the disk are not there as they were.
    #[error("`{}` is not what was written to it\n\nhint: the disk or another program changed it; start again", path.display())]
    LostState {
        /// The file.
        path: PathBuf,
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

    /// A tensor with another dtype or shape than planned.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    NotAsPlanned {
        /// Its name.
        name: String,
        /// Planned dtype and shape.
        expected: String,
        /// Those of the tensor offered.
        found: String,
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

/// A time as `2026-01-31 23:59:59 UTC`.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days from civil, backwards: eras of 400 years begin on a first of March, so that leap days come last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
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

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}

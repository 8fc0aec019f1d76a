//! The folder next to the output in which a model grows until it is complete.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde_json::Value;

use super::journal::{Journal, JournalRecord};
use super::leftover::{Found, find};
use super::lock::{Lock, staging_folder};
use super::{WriteError, ops};

/// What to do with the unfinished run that an earlier process left for the same output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Leftover {
    /// Say that it is there, and stop.
    #[default]
    Refuse,
    /// Go on with it; begin anew where there is none.
    Resume,
    /// Remove it and begin anew.
    Restart,
}

/// How to stage an output.
#[derive(Debug, Clone, Default)]
pub struct StagingOptions {
    /// Replace an existing model folder. A folder that holds neither `config.json` nor `manifest.json` is never
    /// replaced.
    pub overwrite: bool,
    /// Folder of the source model, which the output must not overlap.
    pub source: Option<PathBuf>,
    /// Bytes that will be written; checked against the free space. 0 skips the check.
    pub needed_bytes: u64,
    /// What to do with an unfinished run.
    pub leftover: Leftover,
}

/// Name of the model's folder within a staging folder.
pub(super) const MODEL: &str = "model";

/// A locked folder next to the output: a journal, whatever a run has to remember, and `model`, which becomes the output.
///
/// Dropping it removes the folder and releases the lock, unless [`Staging::keep`] said that the work in it is worth going
/// on with.
#[derive(Debug)]
pub struct Staging {
    pub(super) output: PathBuf,
    /// The whole folder.
    root: PathBuf,
    /// `root/model`.
    dir: PathBuf,
    pub(super) overwrite: bool,
    journal: Option<Journal>,
    record: Option<JournalRecord>,
    kept: bool,
    // Last: the folder is removed before the lock is released.
    _lock: Lock,
}

impl Staging {
    /// Checks that `output` can be written, takes its lock and makes a staging folder beside it, or takes over the one
    /// that an unfinished run left.
    ///
    /// The lock is the file `.<name>.lock`, the folder `.<name>.partial-<host>_<start>-<pid>-<n>`. What a run that was killed on
    /// this host left behind is removed when it holds nothing that could be resumed.
    ///
    /// # Errors
    /// See [`WriteError`]; nothing is left behind. [`WriteError::Unfinished`] when there is something to resume and the
    /// options do not say what to do with it.
    pub fn create(output: &Path, options: &StagingOptions) -> Result<Self, WriteError> {
        let name = output.file_name().ok_or_else(|| WriteError::BadOutput { path: output.to_owned() })?;
        let parent = match output.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        if !parent.is_dir() {
            return Err(WriteError::NoParent { parent: parent.to_owned() });
        }
        let parent = fs::canonicalize(parent)?;
        let output = parent.join(name);
        if let Some(source) = &options.source {
            check_overlap(&output, source)?;
        }
        check_replaceable(&output, options.overwrite)?;

        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        let hidden = parent.join(hidden);
        let mut lock_path = hidden.clone().into_os_string();
        lock_path.push(".lock");
        let lock = Lock::take(lock_path.into(), &output)?;
        // Again, now that nobody else can be changing it.
        check_replaceable(&output, options.overwrite)?;
        let resumed = match (find(&parent, &hidden, &output)?, options.leftover) {
            (None, _) => None,
            (Some(found), Leftover::Resume) => Some(found),
            (Some(Found { root, record }), Leftover::Refuse) => {
                let finished = record.finished();
                return Err(WriteError::Unfinished { output, folder: root, finished });
            }
            (Some(found), Leftover::Restart) => {
                ops::remove_dir_all(&found.root)?;
                None
            }
        };
        let written = resumed.as_ref().map_or(0, |found| folder_bytes(&found.root.join(MODEL)));
        check_space(&parent, options.needed_bytes.saturating_sub(written))?;
        let (root, record) = match resumed {
            Some(Found { root, record }) => (root, Some(record)),
            None => {
                let root = staging_folder(&hidden);
                // Never follows or reuses what is there: a planted link is an error.
                ops::create_dir(&root)?;
                (root, None)
            }
        };
        let staging = Staging {
            output,
            dir: root.join(MODEL),
            // What was worth keeping once is not thrown away because this run does not get far.
            kept: record.is_some(),
            root,
            overwrite: options.overwrite,
            journal: None,
            record,
            _lock: lock,
        };
        if !staging.dir.is_dir() {
            ops::create_dir(&staging.dir)?;
        }
        Ok(staging)
    }

    /// Where the files of the model are written until they are published.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder that holds [`Staging::dir`]; files beside it are never published.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where they will be published: an absolute path.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// What the unfinished run had done, where this one goes on with it.
    pub fn record(&self) -> Option<&JournalRecord> {
        self.record.as_ref()
    }

    /// Begins the journal of a run that `identity` decides, or goes on with that of the unfinished run after its first
    /// `entries` entries.
    ///
    /// # Errors
    /// [`WriteError::DifferentRun`] when the unfinished run was another one; I/O errors.
    pub fn open_journal(&mut self, identity: BTreeMap<String, String>, entries: usize) -> Result<(), WriteError> {
        self.check_identity(&identity)?;
        self.journal = Some(match &mut self.record {
            Some(record) => {
                record.keep(entries);
                Journal::reopen(&self.root, record)?
            }
            None => Journal::create(&self.root, identity)?,
        });
        Ok(())
    }

    /// Refuses to go on with a run that another `identity` decided.
    ///
    /// # Errors
    /// [`WriteError::DifferentRun`] naming the first difference.
    pub fn check_identity(&self, identity: &BTreeMap<String, String>) -> Result<(), WriteError> {
        match self.record.as_ref().and_then(|r| r.difference(identity)) {
            None => Ok(()),
            Some((field, before, now)) => {
                let change = format!("was {before}, now it is {now}");
                Err(WriteError::DifferentRun { folder: self.root.clone(), field, change })
            }
        }
    }

    /// Adds an entry to the journal: it is on the disk when this returns. Nothing happens where no journal was begun.
    ///
    /// # Errors
    /// I/O errors.
    pub fn append(&mut self, entry: &Value) -> Result<(), WriteError> {
        match &mut self.journal {
            Some(journal) => journal.append(entry),
            None => Ok(()),
        }
    }

    /// Whether the folder stays when this value is dropped before it is published.
    pub fn keep(&mut self, keep: bool) {
        self.kept = keep;
    }

    /// Removes what was published, or is no longer needed. Best effort: the output is in place.
    pub(super) fn clear(&mut self) -> Result<(), WriteError> {
        self.kept = true;
        self.journal = None;
        Ok(ops::remove_dir_all(&self.root)?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody is left to tell; a next run on the same output starts with a folder of its own.
            let _ = ops::remove_dir_all(&self.root);
        }
    }
}

/// Bytes of the files in a folder.
fn folder_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.flatten().filter_map(|e| e.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}

/// Refuses an output that is the source, or holds it, or lies within it.
fn check_overlap(output: &Path, source: &Path) -> Result<(), WriteError> {
    let input = fs::canonicalize(source)?;
    // An output that exists may be reached by another name than the one typed.
    let output = fs::canonicalize(output).unwrap_or_else(|_| output.to_owned());
    if output.starts_with(&input) || input.starts_with(&output) {
        return Err(WriteError::Overlap { output, input });
    }
    Ok(())
}

/// Whether `output` is absent, an empty folder, or a model folder that may be replaced.
pub(super) fn check_replaceable(output: &Path, overwrite: bool) -> Result<Existing, WriteError> {
    let meta = match fs::symlink_metadata(output) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Existing::Nothing),
        Err(e) => return Err(e.into()),
    };
    let kind = if meta.is_symlink() {
        "a symbolic link"
    } else if meta.is_file() {
        "a file"
    } else if !meta.is_dir() {
        "a special file"
    } else if fs::read_dir(output)?.next().is_none() {
        return Ok(Existing::EmptyFolder);
    } else if !overwrite {
        return Err(WriteError::Exists { path: output.to_owned() });
    } else if !["config.json", "manifest.json"].iter().any(|f| output.join(f).is_file()) {
        return Err(WriteError::NotAModel { path: output.to_owned() });
    } else {
        return Ok(Existing::Model);
    };
    Err(WriteError::NotAFolder { path: output.to_owned(), kind })
}

/// What lies at the output path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existing {
    Nothing,
    EmptyFolder,
    Model,
}

#[cfg(unix)]
fn check_space(folder: &Path, needed: u64) -> Result<(), WriteError> {
    if needed == 0 {
        return Ok(());
    }
    let stat = rustix::fs::statvfs(folder).map_err(io::Error::from)?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    if available < needed {
        return Err(WriteError::NoSpace { folder: folder.to_owned(), available, needed });
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_space(_: &Path, _: u64) -> Result<(), WriteError> {
    Ok(())
}

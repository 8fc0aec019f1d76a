//! The folder next to the output in which a model grows until it is complete.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::WriteError;
use super::lock::{Lock, unique_sibling};

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
}

/// A locked, empty folder next to the output. Dropping it removes the folder and releases the lock.
#[derive(Debug)]
pub struct Staging {
    pub(super) output: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) overwrite: bool,
    /// Set when `dir` no longer is ours to remove: it became the output.
    pub(super) published: bool,
    // Last: the folder is removed before the lock is released.
    _lock: Lock,
}

impl Staging {
    /// Checks that `output` can be written, takes its lock and makes an empty staging folder beside it.
    ///
    /// The lock is the file `.<name>.lock`, the folder `.<name>.partial-<pid>-<n>`. What a run that was killed on
    /// this host left behind is removed.
    ///
    /// # Errors
    /// See [`WriteError`]; nothing is left behind.
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
        check_space(&parent, options.needed_bytes)?;

        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        let hidden = parent.join(hidden);
        let mut lock_path = hidden.clone().into_os_string();
        lock_path.push(".lock");
        let (lock, dead) = Lock::take(lock_path.into(), &output)?;
        if let Some(pid) = dead {
            remove_leftovers(&parent, &hidden, pid)?;
        }
        // Again, now that nobody else can be changing it.
        check_replaceable(&output, options.overwrite)?;
        let dir = unique_sibling(&hidden, "partial");
        // `create_dir` never follows or reuses what is there: a planted link is an error.
        fs::create_dir(&dir)?;
        Ok(Staging { output, dir, overwrite: options.overwrite, published: false, _lock: lock })
    }

    /// Where the files are written until they are published.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where they will be published: an absolute path.
    pub fn output(&self) -> &Path {
        &self.output
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Nobody is left to tell; a next run on the same output starts with a folder of its own.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
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

/// Removes staging folders that the dead process `pid` left for this output.
fn remove_leftovers(parent: &Path, hidden: &Path, pid: u32) -> Result<(), WriteError> {
    let mut prefix = hidden.file_name().unwrap_or_default().to_owned();
    prefix.push(format!(".partial-{pid}-"));
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let ours = entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
        if ours && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

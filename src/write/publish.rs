//! The one step in which a staged model becomes the output.

use std::path::{Path, PathBuf};

use super::lock::unique_sibling;
use super::manifest::Manifest;
use super::staging::{Existing, Staging, check_replaceable};
use super::{WriteError, ops};

/// A published model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The output folder, an absolute path.
    pub path: PathBuf,
    /// Every file with its size and hash, `manifest.json` itself excepted.
    pub manifest: Manifest,
    /// What could not be removed afterwards: the folder that was replaced, or the staging folder.
    pub left_behind: Option<PathBuf>,
}

/// Renames the staged model, whose files are complete and synced, to the output.
pub(super) fn publish(mut staging: Staging, manifest: Manifest) -> Result<Published, WriteError> {
    ops::sync_folder(staging.dir())?;
    let output = staging.output.clone();
    let replaced = match check_replaceable(&output, staging.overwrite)? {
        // Renaming a folder is refused when the target is a file, a link or a folder that holds anything, so this
        // cannot clobber what another program put there since the check.
        Existing::Nothing | Existing::EmptyFolder => {
            ops::rename(staging.dir(), &output)?;
            None
        }
        Existing::Model => Some(swap(staging.dir(), &output)?),
    };
    // From here on the staging folder holds nothing of worth but, perhaps, the model that was replaced.
    staging.keep(true);
    let parent = output.parent().unwrap_or(Path::new("/"));
    ops::sync_folder(parent).map_err(|source| WriteError::NotSynced { path: output.clone(), source })?;
    // Only now: until the new model is safe on disk the old one is kept.
    let mut left_behind = replaced.filter(|old| ops::remove_dir_all(old).is_err());
    if staging.clear().is_err() {
        left_behind.get_or_insert_with(|| staging.root().to_owned());
    }
    Ok(Published { path: output, manifest, left_behind })
}

/// Puts `new` in the place of `old`; returns where the old folder is now.
fn swap(new: &Path, old: &Path) -> Result<PathBuf, WriteError> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        // One step: at no moment is the output missing.
        ops::point("exchange")?;
        if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
            return Ok(new.to_owned());
        }
    }
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(old.file_name().unwrap_or_default());
    let aside = unique_sibling(&old.with_file_name(hidden), "old");
    ops::rename(old, &aside)?;
    if let Err(e) = ops::rename(new, old) {
        ops::rename(&aside, old)?;
        return Err(e.into());
    }
    Ok(aside)
}

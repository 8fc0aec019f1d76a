//! What earlier runs left for an output: which of it can be resumed, which goes.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::journal::{self, JournalRecord};
use super::lock::made_by_the_dead;
use super::manifest::MANIFEST;
use super::{WriteError, ops};
use crate::source::sha256_file;

/// An unfinished run.
#[derive(Debug)]
pub(super) struct Found {
    /// Its staging folder.
    pub(super) root: PathBuf,
    /// What it had done.
    pub(super) record: JournalRecord,
}

/// Key of the journal entry that a run makes before it publishes: the SHA-256 of its manifest.
pub(super) const COMPLETE: &str = "manifest_sha256";

/// The unfinished run for `output` that got furthest. To be called with the lock held.
///
/// Folders that hold nothing to resume are removed where their process is certainly gone: a journal names it, and so does
/// the name of a folder that has none yet.
pub(super) fn find(parent: &Path, hidden: &Path, output: &Path) -> Result<Option<Found>, WriteError> {
    let mut prefix = hidden.file_name().unwrap_or_default().to_owned();
    prefix.push(".partial-");
    let mut best: Option<Found> = None;
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(maker) = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes()) else { continue };
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let root = entry.path();
        let Some(record) = JournalRecord::read(&root)? else {
            if std::str::from_utf8(maker).is_ok_and(made_by_the_dead) {
                ops::remove_dir_all(&root)?;
            }
            continue;
        };
        if record.owner.is_alive() {
            // The lock did not keep us apart: it was removed by hand, or the file system does not know links.
            let owner = record.owner;
            return Err(WriteError::Locked {
                output: output.to_owned(),
                lock: journal::path(&root),
                pid: owner.pid,
                host: owner.host,
                started: owner.started,
            });
        }
        if record.finished() == 0 || is_published(&record, output) {
            if record.owner.is_dead() {
                ops::remove_dir_all(&root)?;
            }
        } else if best.as_ref().is_none_or(|b| record.finished() > b.record.finished()) {
            best = Some(Found { root, record });
        }
    }
    Ok(best)
}

/// Whether the run ended between publishing and clearing up.
fn is_published(record: &JournalRecord, output: &Path) -> bool {
    let Some(expected) = record.entries.iter().rev().find_map(|e| e.get(COMPLETE)?.as_str()) else { return false };
    sha256_file(&output.join(MANIFEST)).is_ok_and(|found| found.sha256 == expected)
}

//! What a run has finished so far, in a file that survives its death.
//!
//! One line per entry: the SHA-256 of its JSON in 64 hexadecimal digits, a space, the JSON, a newline. Each line is on the
//! disk before the next one is begun. A line that is torn or damaged ends the journal: what follows it does not count.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lock::Owner;
use super::{WriteError, ops};
use crate::source::sha256;

/// Name of the journal in a staging folder.
pub(super) const JOURNAL: &str = "journal";
/// Version of the journal's format.
const VERSION: u32 = 2;
/// Largest journal read: a line takes some kilobytes per layer and shard.
const MAX_JOURNAL_BYTES: u64 = 256 << 20;

/// First line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    journal: u32,
    owner: Owner,
    identity: BTreeMap<String, String>,
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: fs::File,
    poisoned: bool,
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalRecord {
    /// Everything that decides what the run writes, by the name a user knows it by.
    pub identity: BTreeMap<String, String>,
    /// Entries in the order they were made.
    pub entries: Vec<Value>,
    /// Where each entry ends in the file, in bytes.
    pub(super) ends: Vec<u64>,
    /// End of the first line.
    head_end: u64,
    /// Who wrote it last.
    pub(super) owner: Owner,
}

impl JournalRecord {
    /// Reads the lines of a journal up to the first that is torn or damaged. `None` without a whole first line, or with
    /// one of another version: then there is nothing to go by.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut record: Option<Self> = None;
        let mut end = 0;
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            let Some(json) = checked(line) else { break };
            end += line.len() as u64;
            match &mut record {
                None => {
                    let head: Head = serde_json::from_slice(json).ok()?;
                    if head.journal != VERSION {
                        return None;
                    }
                    let Head { owner, identity, .. } = head;
                    record =
                        Some(JournalRecord { identity, entries: Vec::new(), ends: Vec::new(), head_end: end, owner });
                }
                Some(record) => {
                    let Ok(entry) = serde_json::from_slice::<Value>(json) else { break };
                    // Who goes on with a run says so.
                    if let Some(owner) = entry.get("owner").and_then(|o| Owner::deserialize(o).ok()) {
                        record.owner = owner;
                    }
                    record.entries.push(entry);
                    record.ends.push(end);
                }
            }
        }
        record
    }

    /// Reads the journal in the staging folder `root`.
    pub(super) fn read(root: &Path) -> Result<Option<Self>, WriteError> {
        let path = root.join(JOURNAL);
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if !meta.is_file() || meta.len() > MAX_JOURNAL_BYTES {
            return Ok(None);
        }
        Ok(Self::parse(&fs::read(&path)?))
    }

    /// The first field in which this run and `identity` differ: its name, what it was and what it is.
    pub fn difference(&self, identity: &BTreeMap<String, String>) -> Option<(String, String, String)> {
        let none = || "nothing".to_owned();
        let mut names: Vec<&String> = self.identity.keys().chain(identity.keys()).collect();
        names.sort();
        let field = names.into_iter().find(|n| self.identity.get(*n) != identity.get(*n))?;
        let of = |map: &BTreeMap<String, String>| map.get(field).cloned().unwrap_or_else(none);
        Some((field.clone(), of(&self.identity), of(identity)))
    }

    /// Entries that say something was finished, as opposed to who worked.
    pub fn finished(&self) -> usize {
        self.entries.iter().filter(|e| e.get("owner").is_none()).count()
    }

    /// Forgets all entries but the first `count`.
    pub fn keep(&mut self, count: usize) {
        self.entries.truncate(count);
        self.ends.truncate(count);
    }
}

/// The JSON of a line whose hash is right.
fn checked(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\n")?;
    let (hash, json) = line.split_at_checked(64)?;
    let json = json.strip_prefix(b" ")?;
    (sha256(json).as_bytes() == hash).then_some(json)
}

impl Journal {
    /// Begins a journal in the staging folder `root`.
    pub(super) fn create(root: &Path, identity: BTreeMap<String, String>) -> Result<Self, WriteError> {
        let file = ops::create_file(&root.join(JOURNAL))?;
        let mut journal = Journal { file, poisoned: false };
        let head = Head { journal: VERSION, owner: Owner::this(), identity };
        journal.line(&serde_json::to_vec(&head).map_err(io::Error::from)?)?;
        ops::sync_folder(root)?;
        Ok(journal)
    }

    /// Goes on with the journal that `record` was read from, after its last entry.
    pub(super) fn reopen(root: &Path, record: &JournalRecord) -> Result<Self, WriteError> {
        use std::io::Seek;
        let mut file = fs::OpenOptions::new().write(true).open(root.join(JOURNAL))?;
        let end = record.ends.last().copied().unwrap_or(record.head_end);
        ops::truncate(&file, end)?;
        file.seek(io::SeekFrom::End(0))?;
        let mut journal = Journal { file, poisoned: false };
        journal.append(&serde_json::json!({ "owner": Owner::this() }))?;
        Ok(journal)
    }

    /// Adds an entry and waits until it is on the disk.
    pub(super) fn append(&mut self, entry: &Value) -> Result<(), WriteError> {
        self.line(&serde_json::to_vec(entry).map_err(io::Error::from)?)
    }

    fn line(&mut self, json: &[u8]) -> Result<(), WriteError> {
        if self.poisoned {
            return Err(WriteError::Poisoned);
        }
        let mut line = sha256(json).into_bytes();
        line.push(b' ');
        line.extend_from_slice(json);
        line.push(b'\n');
        // After half a line the next would be unreadable.
        self.poisoned = true;
        ops::write(&mut self.file, &line)?;
        ops::sync(&self.file)?;
        self.poisoned = false;
        Ok(())
    }
}

/// Path of the journal of a staging folder.
pub(super) fn path(root: &Path) -> PathBuf {
    root.join(JOURNAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn identity() -> BTreeMap<String, String> {
        [("method", "care"), ("seed", "1")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    }

    fn written(dir: &Path) -> Vec<u8> {
        let mut journal = Journal::create(dir, identity()).unwrap();
        for n in 0..3 {
            journal.append(&json!({ "layer": n, "text": "line\nbreak" })).unwrap();
        }
        fs::read(path(dir)).unwrap()
    }

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = written(dir.path());
        let whole = JournalRecord::parse(&bytes).unwrap();
        assert_eq!((whole.entries.len(), whole.finished(), &whole.identity), (3, 3, &identity()));
        assert_eq!(*whole.ends.last().unwrap(), bytes.len() as u64);
        for cut in 0..bytes.len() {
            match JournalRecord::parse(&bytes[..cut]) {
                None => assert!((cut as u64) < whole.head_end),
                Some(r) => assert_eq!(r.entries.len(), whole.ends.iter().filter(|e| **e <= cut as u64).count()),
            }
            let mut flipped = bytes.clone();
            flipped[cut] ^= 0x10;
            let left = JournalRecord::parse(&flipped).map_or(0, |r| {
                assert_eq!(r.entries[..], whole.entries[..r.entries.len()]);
                r.entries.len()
            });
            assert_eq!(left, whole.ends.iter().filter(|e| **e <= cut as u64).count(), "byte {cut}");
        }
    }

    #[test]
    fn a_journal_goes_on_where_its_last_whole_line_ends() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = written(dir.path());
        fs::write(path(dir.path()), &bytes[..bytes.len() - 5]).unwrap();
        let record = JournalRecord::read(dir.path()).unwrap().unwrap();
        assert_eq!(record.entries.len(), 2);
        Journal::reopen(dir.path(), &record).unwrap().append(&json!({ "layer": 2 })).unwrap();
        let record = JournalRecord::read(dir.path()).unwrap().unwrap();
        assert_eq!((record.entries.len(), record.finished()), (4, 3));
        assert_eq!(record.entries[3], json!({ "layer": 2 }));
    }

    #[test]
    fn the_field_that_differs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let record = JournalRecord::parse(&written(dir.path())).unwrap();
        assert_eq!(record.difference(&identity()), None);
        let mut other = identity();
        other.insert("seed".into(), "2".into());
        assert_eq!(record.difference(&other), Some(("seed".into(), "1".into(), "2".into())));
        other.remove("method");
        assert_eq!(record.difference(&other), Some(("method".into(), "care".into(), "nothing".into())));
    }
}

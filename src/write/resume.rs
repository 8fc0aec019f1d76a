//! Going on with half-written shards: what was promised of them is checked before it is built upon.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::plan::ShardPlan;
use super::{StagedWriter, Staging, WriteError, ops};
use crate::source::{FileDigest, Sha256Stream};

/// How far a writer has come: all of it is on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Tensors written, in the order of the plan.
    pub tensors: usize,
    /// Every finished shard.
    pub files: BTreeMap<String, FileDigest>,
    /// Length and hash of the unfinished shard so far, if there is one.
    pub open: Option<FileDigest>,
}

/// A [`Mark`] that the files on the disk bear out, with what is needed to go on from there.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub(super) mark: Mark,
    pub(super) hash: Sha256Stream,
}

impl Progress {
    /// Tensors written.
    pub fn tensors(&self) -> usize {
        self.mark.tensors
    }
}

/// Reads the shards in `dir` and checks them against `marks`, which are in the order they were made. Returns those that
/// hold, up to the first that does not, after an empty one: going on from there means beginning anew.
///
/// # Errors
/// I/O errors. A file that is missing, too short or different is none.
pub fn verify_marks(dir: &Path, plan: &ShardPlan, marks: &[Mark]) -> Result<Vec<Progress>, WriteError> {
    let mut good = vec![Progress::default()];
    let mut reader = Reader { dir, buffer: vec![0; 1 << 20], file: None, hash: Sha256Stream::default() };
    let mut files = BTreeMap::new();
    let mut shard = 0;
    for mark in marks {
        let Some((target, bytes)) = place(plan, mark.tensors) else { break };
        while shard < target {
            let name = &plan.shards()[shard].file;
            let Some(digest) = reader.finish(name, plan.shards()[shard].file_bytes())? else { return Ok(good) };
            files.insert(name.clone(), digest);
            shard += 1;
        }
        let open = match plan.shards().get(shard) {
            Some(next) if bytes > 0 => reader.advance(&next.file, bytes)?,
            _ => None,
        };
        let found = Mark { tensors: mark.tensors, files: files.clone(), open };
        if found != *mark {
            break;
        }
        good.push(Progress { mark: found, hash: reader.hash.clone() });
    }
    Ok(good)
}

/// The shard in which the tensor after the first `tensors` begins, and the bytes written of it; 0 bytes before its first
/// tensor. `None` for more tensors than planned.
fn place(plan: &ShardPlan, tensors: usize) -> Option<(usize, u64)> {
    let mut left = tensors;
    for (index, shard) in plan.shards().iter().enumerate() {
        if left < shard.tensors.len() {
            let last = left.checked_sub(1).and_then(|last| shard.tensors.get(last));
            let bytes = last.map_or(0, |(_, t)| shard.header.len() as u64 + t.data_offsets.1 as u64);
            return Some((index, bytes));
        }
        left -= shard.tensors.len();
    }
    (left == 0).then_some((plan.shards().len(), 0))
}

struct Reader<'a> {
    dir: &'a Path,
    buffer: Vec<u8>,
    /// The open shard, and how much of it was read.
    file: Option<(fs::File, u64)>,
    hash: Sha256Stream,
}

impl Reader<'_> {
    /// Hashes the shard `name` up to its byte `end`; `None` where it ends before.
    fn advance(&mut self, name: &str, end: u64) -> Result<Option<FileDigest>, WriteError> {
        let (mut file, mut done) = match self.file.take() {
            Some(open) => open,
            None => {
                self.hash = Sha256Stream::default();
                match fs::File::open(self.dir.join(name)) {
                    Ok(file) => (file, 0),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(e.into()),
                }
            }
        };
        while done < end {
            let want = self.buffer.len().min((end - done) as usize);
            match file.read(&mut self.buffer[..want]) {
                Ok(0) => return Ok(None),
                Ok(n) => {
                    self.hash.update(&self.buffer[..n]);
                    done += n as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.file = Some((file, done));
        Ok(Some(self.hash.clone().finish()))
    }

    /// Hashes the rest of a shard of `bytes` bytes, and leaves it.
    fn finish(&mut self, name: &str, bytes: u64) -> Result<Option<FileDigest>, WriteError> {
        let digest = self.advance(name, bytes)?;
        self.file = None;
        Ok(digest)
    }
}

impl StagedWriter {
    /// A writer that goes on after `progress`. Whatever lies in the folder beyond that is removed.
    ///
    /// # Errors
    /// I/O errors.
    pub fn resume(staging: Staging, plan: ShardPlan, progress: Progress) -> Result<Self, WriteError> {
        let Progress { mark, hash } = progress;
        let (shard, bytes) = place(&plan, mark.tensors).unwrap_or_default();
        let open = plan.shards().get(shard).filter(|_| bytes > 0).map(|s| s.file.clone());
        for entry in fs::read_dir(staging.dir())? {
            let entry = entry?;
            let name = entry.file_name();
            let known = name.to_str().is_some_and(|n| mark.files.contains_key(n) || open.as_deref() == Some(n));
            if !known {
                match entry.file_type()?.is_dir() {
                    true => ops::remove_dir_all(&entry.path())?,
                    false => ops::remove_file(&entry.path())?,
                }
            }
        }
        let current = match &open {
            Some(name) => Some(super::writer::HashedFile::reopen(&staging.dir().join(name), bytes, hash)?),
            None => None,
        };
        let before: usize = plan.shards()[..shard].iter().map(|s| s.tensors.len()).sum();
        Ok(StagedWriter::at(staging, plan, current, (shard, mark.tensors - before), mark.files))
    }
}

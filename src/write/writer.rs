//! Streams planned tensors and side files into a staging folder.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use fs_err as fs;

use super::leftover::COMPLETE;
use super::manifest::{MANIFEST, Manifest};
use super::plan::{INDEX, ShardPlan};
use super::publish::{Published, publish};
use super::resume::Mark;
use super::{Staging, WriteError, ops};
use crate::source::{FileDigest, Sha256Stream, TensorInfo, View, plain_file_name, stored_bytes};

/// Small tensors are gathered up to this many bytes before they are written.
const BUFFER: usize = 4 << 20;
/// From this size on, hashing and writing a piece run side by side.
const PARALLEL: usize = 1 << 20;
/// Blocks of this many bytes that are all zero are not written but skipped: they read as zeros and take no room.
const HOLE: usize = 1 << 16;

/// Writes one model into a [`Staging`] folder: tensors in the order of the plan, then any other file, then
/// [`StagedWriter::finish`]. Dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct StagedWriter {
    // First, so that files are closed before the folder is removed.
    current: Option<HashedFile>,
    plan: ShardPlan,
    /// Shard and tensor within it that come next.
    next: (usize, usize),
    /// Bytes of that tensor that were written already.
    written: u64,
    files: BTreeMap<String, FileDigest>,
    poisoned: bool,
    staging: Staging,
}

impl StagedWriter {
    /// A writer of the shards of `plan` into `staging`.
    pub fn new(staging: Staging, plan: ShardPlan) -> Self {
        Self::at(staging, plan, None, (0, 0), BTreeMap::new())
    }

    pub(super) fn at(
        staging: Staging,
        plan: ShardPlan,
        current: Option<HashedFile>,
        next: (usize, usize),
        files: BTreeMap<String, FileDigest>,
    ) -> Self {
        StagedWriter { current, plan, next, written: 0, files, poisoned: false, staging }
    }

    /// Name and place of the tensor that has to be written next; `None` when all are.
    pub fn next_tensor(&self) -> Option<(&str, &TensorInfo)> {
        self.plan.shards().get(self.next.0)?.tensors.get(self.next.1)
    }

    /// The plan that is being written.
    pub fn plan(&self) -> &ShardPlan {
        &self.plan
    }

    /// Folder that is written to; empty files of one's own must not be left there.
    pub fn staging(&self) -> &Staging {
        &self.staging
    }

    /// As [`StagedWriter::staging`], to write its journal.
    pub fn staging_mut(&mut self) -> &mut Staging {
        &mut self.staging
    }

    /// Waits until everything written is on the disk, and tells how far that is.
    ///
    /// # Errors
    /// I/O errors; [`WriteError::Incomplete`] within a tensor.
    pub fn mark(&mut self) -> Result<Mark, WriteError> {
        if self.written > 0 {
            return Err(self.incomplete());
        }
        let mut open = None;
        self.guarded(|w| {
            if let Some(file) = &mut w.current {
                open = Some(file.flush()?);
            }
            Ok(ops::sync_folder(w.staging.dir())?)
        })?;
        Ok(Mark { tensors: self.count(), files: self.files.clone(), open })
    }

    /// Tensors written.
    fn count(&self) -> usize {
        self.plan.shards()[..self.next.0].iter().map(|s| s.tensors.len()).sum::<usize>() + self.next.1
    }

    fn incomplete(&self) -> WriteError {
        let first = self.next_tensor().map_or_else(String::new, |(name, _)| name.to_owned());
        WriteError::Incomplete { missing: self.plan.tensors().count() - self.count(), first }
    }

    /// Writes the next tensor of the plan: little endian, row-major.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] or [`WriteError::WrongSize`] when it is not the one planned; I/O errors.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.guarded(|w| w.write_tensor_inner(name, bytes))
    }

    /// Writes the next tensor of the plan from anything that the crate `safetensors` could write.
    ///
    /// # Errors
    /// As [`StagedWriter::write_tensor`], and [`WriteError::NotAsPlanned`] for another dtype or shape than the plan's: that the
    /// bytes are as many does not make them the same values.
    pub fn write_view(&mut self, name: &str, view: &impl View) -> Result<(), WriteError> {
        if let Some((_, planned)) = self.next_tensor().filter(|(next, _)| *next == name)
            && (planned.dtype != view.dtype() || planned.shape != view.shape())
        {
            let shown = |dtype, shape: &[usize]| format!("{dtype} {shape:?}");
            return Err(WriteError::NotAsPlanned {
                name: name.to_owned(),
                expected: shown(planned.dtype, &planned.shape),
                found: shown(view.dtype(), view.shape()),
            });
        }
        self.write_tensor(name, &view.data())
    }

    /// Writes a piece of the next tensor of the plan; the tensor ends with the piece that fills it.
    ///
    /// # Errors
    /// As [`StagedWriter::write_tensor`].
    pub fn write_piece(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.guarded(|w| w.write_piece_inner(name, bytes))
    }

    /// Writes a small file, such as `config.json`, at the top level of the model.
    ///
    /// # Errors
    /// [`WriteError::BadFile`] for a name that is not plain, is taken, or belongs to the writer; I/O errors.
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.guarded(|w| {
            w.check_file_name(name)?;
            w.store(name, bytes)
        })
    }

    /// Copies the file at `path`, following links, to the top level of the model.
    ///
    /// # Errors
    /// As [`StagedWriter::write_file`].
    pub fn copy_file(&mut self, name: &str, path: &Path) -> Result<(), WriteError> {
        self.guarded(|w| {
            w.check_file_name(name)?;
            if !fs::metadata(path)?.is_file() {
                return Err(WriteError::BadFile { name: name.to_owned(), reason: "its source is no regular file" });
            }
            let mut from = fs::File::open(path)?;
            let mut to = HashedFile::create(&w.staging.dir().join(name))?;
            let mut buffer = vec![0; 1 << 16];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => to.write(&buffer[..n])?,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.into()),
                }
            }
            w.files.insert(name.to_owned(), to.finish()?);
            Ok(())
        })
    }

    /// Writes index and manifest, syncs everything and publishes the model under the output path.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] when tensors are missing; I/O errors. The output is untouched, except with
    /// [`WriteError::NotSynced`].
    pub fn finish(mut self) -> Result<Published, WriteError> {
        if self.poisoned {
            return Err(WriteError::Poisoned);
        }
        if self.next_tensor().is_some() {
            return Err(self.incomplete());
        }
        if let Some(index) = self.plan.index() {
            self.store(INDEX, &index)?;
        }
        let manifest = Manifest::new(std::mem::take(&mut self.files));
        let mut own = HashedFile::create(&self.staging.dir().join(MANIFEST))?;
        own.write(&manifest.to_bytes()?)?;
        let digest = own.finish()?;
        // So that a run that dies right after publishing is not taken for one that did not.
        self.staging.append(&serde_json::json!({ COMPLETE: digest.sha256 }))?;
        publish(self.staging, manifest)
    }

    /// Runs `action`, and refuses everything after an I/O error: a shard may then end anywhere.
    fn guarded(&mut self, action: impl FnOnce(&mut Self) -> Result<(), WriteError>) -> Result<(), WriteError> {
        if self.poisoned {
            return Err(WriteError::Poisoned);
        }
        let result = action(self);
        self.poisoned = matches!(result, Err(WriteError::Io(_) | WriteError::Full { .. }));
        result
    }

    fn write_tensor_inner(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        match self.next_tensor() {
            Some((next, info)) if next == name && stored_bytes(info) != bytes.len() as u64 => {
                Err(wrong_size(name, info, bytes.len() as u64))
            }
            _ => self.write_piece_inner(name, bytes),
        }
    }

    fn write_piece_inner(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let next = self.next_tensor();
        let Some((_, planned)) = next.filter(|(next, _)| *next == name) else {
            let expected = next.map(|(next, _)| next.to_owned());
            return Err(WriteError::OutOfOrder { expected, found: name.to_owned() });
        };
        let (expected, found) = (stored_bytes(planned), self.written + bytes.len() as u64);
        if found > expected {
            return Err(wrong_size(name, planned, found));
        }
        let shard = &self.plan.shards()[self.next.0];
        let mut file = match self.current.take() {
            Some(file) => file,
            None => {
                let mut file = HashedFile::create(&self.staging.dir().join(&shard.file))?;
                file.write(&shard.header)?;
                file
            }
        };
        file.write(bytes)?;
        self.written = found;
        if found < expected {
            self.current = Some(file);
            return Ok(());
        }
        self.written = 0;
        self.next.1 += 1;
        if self.next.1 == shard.tensors.len() {
            self.files.insert(shard.file.clone(), file.finish()?);
            self.next = (self.next.0 + 1, 0);
        } else {
            self.current = Some(file);
        }
        Ok(())
    }

    fn check_file_name(&self, name: &str) -> Result<(), WriteError> {
        let bad = |reason| Err(WriteError::BadFile { name: name.to_owned(), reason });
        if !plain_file_name(name) {
            return bad("it is not a plain file name");
        }
        if name == MANIFEST || name == INDEX || self.plan.shards().iter().any(|s| s.file == name) {
            return bad("the writer makes it itself");
        }
        if self.files.contains_key(name) {
            return bad("it was written before");
        }
        Ok(())
    }

    fn store(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let mut file = HashedFile::create(&self.staging.dir().join(name))?;
        file.write(bytes)?;
        self.files.insert(name.to_owned(), file.finish()?);
        Ok(())
    }
}

fn wrong_size(name: &str, planned: &TensorInfo, found: u64) -> WriteError {
    let (name, shape, dtype) = (name.to_owned(), planned.shape.clone(), planned.dtype);
    WriteError::WrongSize { name, shape, dtype, expected: stored_bytes(planned), found }
}

/// A file that is hashed while it is written.
#[derive(Debug)]
pub(super) struct HashedFile {
    file: BufWriter<fs::File>,
    hash: Sha256Stream,
    /// Bytes skipped at the end of what was written so far.
    hole: u64,
}

impl HashedFile {
    /// Creates a file that must not exist.
    pub(super) fn create(path: &Path) -> Result<Self, WriteError> {
        Ok(Self::new(ops::create_file(path)?, Sha256Stream::default()))
    }

    /// Goes on after the first `bytes` bytes of a file, whose hash so far is `hash`.
    pub(super) fn reopen(path: &Path, bytes: u64, hash: Sha256Stream) -> Result<Self, WriteError> {
        let mut file = fs::OpenOptions::new().write(true).open(path)?;
        ops::truncate(&file, bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self::new(file, hash))
    }

    fn new(file: fs::File, hash: Sha256Stream) -> Self {
        HashedFile { file: BufWriter::with_capacity(BUFFER, file), hash, hole: 0 }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let HashedFile { file, hash, hole } = self;
        if bytes.len() < PARALLEL {
            hash.update(bytes);
            put(file, hole, bytes)?;
        } else {
            // Faults are injected by thread, so that this one is met here and not on a worker.
            ops::point("write")?;
            rayon::join(|| hash.update(bytes), || put_sparsely(file, hole, bytes)).1?;
        }
        Ok(())
    }

    /// Writes what is buffered and waits until it is on the disk; length and hash so far.
    fn flush(&mut self) -> Result<FileDigest, WriteError> {
        ops::point("write")?;
        self.file.flush()?;
        if self.hole > 0 {
            let end = self.file.get_mut().stream_position()? + self.hole;
            ops::truncate(self.file.get_ref(), end)?;
        }
        ops::sync(self.file.get_ref())?;
        Ok(self.hash.clone().finish())
    }

    fn finish(mut self) -> Result<FileDigest, WriteError> {
        self.flush()
    }
}

/// Writes `bytes` after a hole.
fn put(file: &mut BufWriter<fs::File>, hole: &mut u64, bytes: &[u8]) -> io::Result<()> {
    if *hole > 0 {
        file.seek(SeekFrom::Current(*hole as i64))?;
        *hole = 0;
    }
    ops::write(file, bytes)
}

/// As [`put`], making holes of blocks that are all zero.
fn put_sparsely(file: &mut BufWriter<fs::File>, hole: &mut u64, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let zero = |block: &&[u8]| block.len() == HOLE && is_zero(block);
        let skipped = rest.chunks(HOLE).take_while(zero).count() * HOLE;
        *hole += skipped as u64;
        rest = &rest[skipped..];
        let kept = rest.chunks(HOLE).take_while(|b| !zero(b)).map(<[u8]>::len).sum();
        if kept > 0 {
            put(file, hole, &rest[..kept])?;
        }
        rest = &rest[kept..];
    }
    Ok(())
}

/// Whether all bytes are zero; words at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<64>();
    words.iter().all(|w| w.iter().fold(0, |a, b| a | b) == 0) && tail.iter().all(|b| *b == 0)
}

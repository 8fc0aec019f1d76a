//! Streams planned tensors and side files into a staging folder.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use fs_err as fs;

use super::manifest::{MANIFEST, Manifest};
use super::plan::{INDEX, PlacedTensor, ShardPlan};
use super::publish::{Published, publish};
use super::{Staging, WriteError};
use crate::source::{FileDigest, Sha256Stream, plain_file_name};

/// Small tensors are gathered up to this many bytes before they are written.
const BUFFER: usize = 4 << 20;
/// From this size on, hashing and writing a piece run side by side.
const PARALLEL: usize = 1 << 20;

/// Writes one model into a [`Staging`] folder: tensors in the order of the plan, then any other file, then
/// [`StagedWriter::finish`]. Dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct StagedWriter {
    // First, so that files are closed before the folder is removed.
    current: Option<HashedFile>,
    plan: ShardPlan,
    /// Shard and tensor within it that come next.
    next: (usize, usize),
    files: BTreeMap<String, FileDigest>,
    poisoned: bool,
    staging: Staging,
}

impl StagedWriter {
    /// A writer of the shards of `plan` into `staging`.
    pub fn new(staging: Staging, plan: ShardPlan) -> Self {
        StagedWriter { current: None, plan, next: (0, 0), files: BTreeMap::new(), poisoned: false, staging }
    }

    /// The tensor that has to be written next; `None` when all are.
    pub fn next_tensor(&self) -> Option<&PlacedTensor> {
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

    /// Writes the next tensor of the plan: little endian, row-major.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] or [`WriteError::WrongSize`] when it is not the one planned; I/O errors.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.guarded(|w| w.write_tensor_inner(name, bytes))
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
            let mut to = HashedFile::create(&w.staging.dir.join(name))?;
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
        if let Some(next) = self.next_tensor() {
            let first = next.name.clone();
            let written: usize =
                self.plan.shards()[..self.next.0].iter().map(|s| s.tensors.len()).sum::<usize>() + self.next.1;
            return Err(WriteError::Incomplete { missing: self.plan.tensors().count() - written, first });
        }
        if let Some(index) = self.plan.index() {
            self.store(INDEX, &index)?;
        }
        let manifest = Manifest::new(std::mem::take(&mut self.files));
        self.store(MANIFEST, &manifest.to_bytes()?)?;
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
        let next = self.next_tensor();
        let Some(planned) = next.filter(|t| t.name == name) else {
            let expected = next.map(|t| t.name.clone());
            return Err(WriteError::OutOfOrder { expected, found: name.to_owned() });
        };
        let (expected, found) = (planned.end - planned.begin, bytes.len() as u64);
        if expected != found {
            let (shape, dtype) = (planned.shape.clone(), planned.dtype);
            return Err(WriteError::WrongSize { name: name.to_owned(), shape, dtype, expected, found });
        }
        let shard = &self.plan.shards()[self.next.0];
        let mut file = match self.current.take() {
            Some(file) => file,
            None => {
                let mut file = HashedFile::create(&self.staging.dir.join(&shard.file))?;
                file.write(&shard.header)?;
                file
            }
        };
        file.write(bytes)?;
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
        let mut file = HashedFile::create(&self.staging.dir.join(name))?;
        file.write(bytes)?;
        self.files.insert(name.to_owned(), file.finish()?);
        Ok(())
    }
}

/// A file that is hashed while it is written.
#[derive(Debug)]
struct HashedFile {
    file: BufWriter<fs::File>,
    hash: Sha256Stream,
}

impl HashedFile {
    /// Creates a file that must not exist; mode 0666 less the umask, as any program does.
    fn create(path: &Path) -> Result<Self, WriteError> {
        let file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
        Ok(HashedFile { file: BufWriter::with_capacity(BUFFER, file), hash: Sha256Stream::default() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let HashedFile { file, hash } = self;
        if bytes.len() < PARALLEL {
            hash.update(bytes);
            file.write_all(bytes)?;
        } else {
            rayon::join(|| hash.update(bytes), || file.write_all(bytes)).1?;
        }
        Ok(())
    }

    /// Writes what is buffered and waits until it is on the disk: the last moment at which a network file system or a
    /// quota can report that it is not.
    fn finish(self) -> Result<FileDigest, WriteError> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(self.hash.finish())
    }
}

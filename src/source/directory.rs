//! All tensors of a checkpoint by name, read from their files when they are asked for.
//!
//! Reading is the rule: a file that another program truncates is an error and not a signal, the memory a tensor takes ends
//! with its last use, and a checkpoint may be larger than the address space a job was given. Who uses weights again and
//! again can have them in place, in a map of their file ([`TensorDirectory::in_place`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fs_err as fs;

use super::map::{MapSlot, MappedBytes};
use super::path::{Impostor, impostor, open_regular};
use super::{Dtype, Header, HeaderError, Layout, MAX_HEADER_BYTES, SourceError, TensorView, hash::sha256};

/// Bytes that [`TensorDirectory::for_each_piece`] reads at once; a multiple of every element size.
const PIECE: usize = 16 << 20;

/// Where a tensor of a checkpoint lies and how to read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Stored element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// File that holds it.
    pub file: PathBuf,
    /// First byte in the file.
    pub begin: u64,
    /// One past the last byte in the file.
    pub end: u64,
    shard: usize,
}

impl StoredTensor {
    /// Stored size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }

    /// Bytes of some rows within the tensor, `None` for all. Rows that it has not are left out.
    fn byte_range(&self, rows: Option<Range<usize>>) -> Range<u64> {
        let all = self.shape.first().copied().unwrap_or(1);
        let rows = rows.unwrap_or(0..all);
        let width = self.bytes().checked_div(all as u64).unwrap_or(0);
        let (first, end) = (rows.start.min(all), rows.end.min(all));
        first as u64 * width..end.max(first) as u64 * width
    }
}

/// Identity of one weight file, for provenance. The hash covers the header (the length field and the JSON), which
/// names every tensor with its place; hashing the data too would read the whole checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct WeightFingerprint {
    /// File name in the model folder.
    pub file: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the first `8 + header length` bytes, in hexadecimal.
    pub header_sha256: String,
    /// Nanoseconds since 1970 UTC at which the file was modified last, where the system tells.
    #[serde(skip)]
    pub modified: Option<u128>,
}

/// One weight file, open for reading.
#[derive(Debug)]
pub(super) struct Shard {
    /// Name in the model folder (the link, not the blob).
    pub(super) name: String,
    /// Path in the model folder.
    path: PathBuf,
    file: fs::File,
    map: MapSlot,
    bytes: u64,
    /// Bytes that take no room on the disk: holes, which read as zeros.
    holes: u64,
    modified: Option<SystemTime>,
    header_sha256: String,
    /// Length of the header with its length field.
    data_start: u64,
}

impl Shard {
    /// Opens and validates the regular file at `real`, known as `dir/name`; with the tensors it holds.
    pub(super) fn open(dir: &Path, name: &str, real: &Path) -> Result<(Self, Layout), SourceError> {
        let path = dir.join(name);
        let file = open_regular(real)?;
        let meta = file.metadata()?;
        let (bytes, modified) = (meta.len(), meta.modified().ok());
        let bad = |source| SourceError::Header { path: path.clone(), source };
        let header = read_header(&file, bytes)?.and_then(|h| Ok((Header::parse_parts(&h, bytes)?, h)));
        let (header, stored) = match header {
            Ok(both) => both,
            Err(source) => {
                let mut start = vec![0; bytes.min(256) as usize];
                read_at(&file, &mut start, 0)?;
                return Err(match impostor(&start) {
                    Some(Impostor::Lfs) => SourceError::LfsPointer { path },
                    Some(Impostor::Html) => SourceError::HtmlPage { path },
                    None => bad(source),
                });
            }
        };
        let header_sha256 = sha256(&stored);
        let holes = holes(&meta);
        let Header { tensors, data_start } = header;
        let (name, map) = (name.to_owned(), MapSlot::default());
        Ok((Shard { name, path, file, map, bytes, holes, modified, header_sha256, data_start }, tensors))
    }

    /// Fails when the open file is not what it was when it was opened. A file that took its place in the folder is another
    /// one, and does not matter.
    fn check_open(&self) -> Result<(), SourceError> {
        let meta = self.file.metadata()?;
        let what = if meta.len() < self.bytes {
            "it became shorter"
        } else if meta.len() > self.bytes {
            "it became longer"
        } else if meta.modified().ok() != self.modified {
            "its modification time"
        } else {
            return Ok(());
        };
        Err(SourceError::Changed { path: self.path.clone(), what })
    }

    /// As [`Shard::check_open`], and fails when a page of the map could not be read.
    fn check_in_place(&self) -> Result<(), SourceError> {
        if !self.map.used() {
            return Ok(());
        }
        // First the reason that says more.
        self.check_open()?;
        match self.map.failed() {
            false => Ok(()),
            true => Err(SourceError::Changed { path: self.path.clone(), what: "a part of it could not be read" }),
        }
    }
}

#[cfg(unix)]
fn holes(meta: &std::fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    meta.len().saturating_sub(meta.blocks().saturating_mul(512))
}

#[cfg(not(unix))]
fn holes(_: &std::fs::Metadata) -> u64 {
    0
}

/// Length field and JSON of a weight file of `bytes` bytes. Never more than the format allows is read.
fn read_header(file: &fs::File, bytes: u64) -> Result<Result<Vec<u8>, HeaderError>, SourceError> {
    if bytes < 8 {
        return Ok(Err(HeaderError::TooShort { bytes }));
    }
    let mut length = [0; 8];
    read_at(file, &mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Ok(Err(HeaderError::TooLong { length }));
    }
    if 8 + length > bytes {
        return Ok(Err(HeaderError::PastEnd { length, bytes }));
    }
    let mut header = vec![0; 8 + length as usize];
    read_at(file, &mut header, 0)?;
    Ok(Ok(header))
}

/// Fills `buffer` from byte `offset` of a file.
#[cfg(unix)]
fn read_at(file: &fs::File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.file().read_exact_at(buffer, offset)
}

/// Fills `buffer` from byte `offset` of a file.
#[cfg(windows)]
fn read_at(file: &fs::File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        match file.file().seek_read(buffer, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (buffer, offset) = (&mut buffer[n..], offset + n as u64),
        }
    }
    Ok(())
}

/// Every tensor of a checkpoint, by name.
#[derive(Debug, Default)]
pub struct TensorDirectory {
    tensors: BTreeMap<String, StoredTensor>,
    shards: Vec<Shard>,
    total_bytes: u64,
}

impl TensorDirectory {
    /// The dtype that most bytes of the weights have; f32 for no weights.
    pub fn main_dtype(&self) -> Dtype {
        let mut bytes = BTreeMap::new();
        for (_, t) in self.iter() {
            *bytes.entry(t.dtype).or_insert(0_u64) += t.bytes();
        }
        bytes.into_iter().max_by_key(|(_, n)| *n).map_or(Dtype::F32, |(dtype, _)| dtype)
    }

    /// Joins validated shards. Names must not repeat across shards; [`super::index`] reports those beforehand.
    pub(super) fn new(opened: Vec<(Shard, Layout)>) -> Self {
        let (mut tensors, mut shards) = (BTreeMap::new(), Vec::with_capacity(opened.len()));
        let mut total_bytes = 0;
        for (file, layout) in opened {
            total_bytes += layout.data_bytes();
            for (name, t) in layout.iter() {
                let (begin, end) = t.data_offsets;
                let stored = StoredTensor {
                    dtype: t.dtype,
                    shape: t.shape.clone(),
                    file: file.path.clone(),
                    begin: file.data_start + begin as u64,
                    end: file.data_start + end as u64,
                    shard: shards.len(),
                };
                tensors.insert(name.to_owned(), stored);
            }
            shards.push(file);
        }
        TensorDirectory { tensors, shards, total_bytes }
    }

    /// Where the tensor lies, if it exists.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All names and descriptions, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(n, i)| (n.as_str(), i))
    }

    /// All tensors by file and offset: the order in which reading is sequential.
    pub fn in_file_order(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_by_key(|(_, i)| (i.shard, i.begin, i.end));
        all.into_iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of all tensors, without headers.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes of the weight files that take no room on the disk, because they were never written and read as zeros.
    pub fn hole_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.holes).sum()
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// [`SourceError::MissingTensor`], with a few near names; [`SourceError::Changed`] when the file became shorter.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let (name, info) = self.find(name)?;
        let mut bytes = vec![0; info.bytes() as usize];
        self.read(info, 0, &mut bytes)?;
        Ok(TensorView { name, dtype: info.dtype, shape: &info.shape, bytes: Cow::Owned(bytes) })
    }

    /// Reads some rows of a tensor, `None` for all. Rows that it has not are left out; the shape is that of the whole.
    ///
    /// # Errors
    /// As [`TensorDirectory::view`].
    pub fn rows(&self, name: &str, rows: Option<Range<usize>>) -> Result<TensorView<'_>, SourceError> {
        let (name, info) = self.find(name)?;
        let range = info.byte_range(rows);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read(info, range.start, &mut bytes)?;
        Ok(TensorView { name, dtype: info.dtype, shape: &info.shape, bytes: Cow::Owned(bytes) })
    }

    /// Some rows of a tensor in place, `None` for all: bytes of a read-only map of its file, which stays mapped as long as
    /// somebody holds such bytes. Rows that it has not are left out. `Ok(None)` where the file cannot be mapped, or would take
    /// more than a quarter of an address space that is limited (`ulimit -v`); then [`TensorDirectory::rows`] reads them.
    ///
    /// What was computed with them is good if [`TensorDirectory::check_in_place`] says so afterwards.
    ///
    /// # Errors
    /// [`SourceError::MissingTensor`]; [`SourceError::Changed`] when the file is not what it was when it was opened.
    pub fn in_place(&self, name: &str, rows: Option<Range<usize>>) -> Result<Option<MappedBytes>, SourceError> {
        let (_, info) = self.find(name)?;
        let shard = &self.shards[info.shard];
        shard.check_open()?;
        let Range { start, end } = info.byte_range(rows);
        Ok(shard.map.get(&shard.file, shard.bytes, info.begin + start..info.begin + end))
    }

    /// Whether what [`TensorDirectory::in_place`] gave was, all the time until now, what the files held when they were
    /// opened: their size and modification time, and that no page failed to be read. Some microseconds.
    ///
    /// # Errors
    /// [`SourceError::Changed`] for the first that was not. It stays so: the model has to be opened again.
    pub fn check_in_place(&self) -> Result<(), SourceError> {
        self.shards.iter().try_for_each(Shard::check_in_place)
    }

    /// Reads one row of a tensor: index `row` of its first dimension.
    ///
    /// # Errors
    /// As [`TensorDirectory::view`].
    ///
    /// # Panics
    /// If the tensor has no dimension, or not that many rows.
    pub fn row(&self, name: &str, row: usize) -> Result<TensorView<'_>, SourceError> {
        let (name, info) = self.find(name)?;
        assert!(row < info.shape[0], "row {row} of tensor `{name}` of shape {:?}", info.shape);
        let width = info.bytes() / info.shape[0] as u64;
        let mut bytes = vec![0; width as usize];
        self.read(info, row as u64 * width, &mut bytes)?;
        Ok(TensorView { name, dtype: info.dtype, shape: &info.shape[1..], bytes: Cow::Owned(bytes) })
    }

    /// Hands a tensor's bytes to `f` in order, some megabytes of whole elements at a time.
    ///
    /// # Errors
    /// As [`TensorDirectory::view`], and what `f` returns.
    pub fn for_each_piece<E: From<SourceError>>(
        &self,
        name: &str,
        f: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.for_each_piece_of_rows(name, None, f)
    }

    /// The same for some rows of a tensor, `None` for all. Rows that it has not are left out.
    ///
    /// # Errors
    /// As [`TensorDirectory::view`], and what `f` returns.
    pub fn for_each_piece_of_rows<E: From<SourceError>>(
        &self,
        name: &str,
        rows: Option<Range<usize>>,
        mut f: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (_, info) = self.find(name)?;
        let Range { start: mut done, end } = info.byte_range(rows);
        let mut buffer = vec![0; PIECE.min((end - done) as usize)];
        while done < end {
            let piece = &mut buffer[..PIECE.min((end - done) as usize)];
            self.read(info, done, piece)?;
            f(piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Whether two tensors hold the same bytes.
    ///
    /// # Errors
    /// As [`TensorDirectory::view`].
    pub fn same_bytes(&self, a: &str, b: &str) -> Result<bool, SourceError> {
        let (_, other) = self.find(b)?;
        if self.find(a)?.1.bytes() != other.bytes() {
            return Ok(false);
        }
        let (mut same, mut done, mut buffer) = (true, 0, Vec::new());
        self.for_each_piece(a, |piece| {
            if same {
                buffer.resize(piece.len(), 0);
                self.read(other, done, &mut buffer)?;
                same = buffer == piece;
                done += piece.len() as u64;
            }
            Ok::<(), SourceError>(())
        })?;
        Ok(same)
    }

    fn find(&self, name: &str) -> Result<(&str, &StoredTensor), SourceError> {
        match self.tensors.get_key_value(name) {
            Some((name, info)) => Ok((name, info)),
            None => Err(SourceError::MissingTensor { name: name.to_owned(), near: self.near(name) }),
        }
    }

    /// Fills `buffer` from byte `offset` of a tensor.
    fn read(&self, info: &StoredTensor, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let shard = &self.shards[info.shard];
        read_at(&shard.file, buffer, info.begin + offset).map_err(|e| match e.kind() {
            // In bounds when it was opened: `Header::parse_parts` proved that the ranges tile the data.
            std::io::ErrorKind::UnexpectedEof => {
                SourceError::Changed { path: shard.path.clone(), what: "it became shorter" }
            }
            kind => std::io::Error::new(kind, format!("cannot read `{}`: {e}", shard.path.display())).into(),
        })
    }

    /// Identity of every weight file, in the order of the file names.
    pub fn fingerprint(&self) -> Vec<WeightFingerprint> {
        let mut list: Vec<_> = self
            .shards
            .iter()
            .map(|s| WeightFingerprint {
                file: s.name.clone(),
                bytes: s.bytes,
                header_sha256: s.header_sha256.clone(),
                modified: s.modified.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).map(|d| d.as_nanos()),
            })
            .collect();
        list.sort_by(|a, b| a.file.cmp(&b.file));
        list
    }

    /// Checks that no weight file changed since it was opened: size, modification time, header.
    ///
    /// # Errors
    /// [`SourceError::Changed`] for the first that did.
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        for s in &self.shards {
            let changed = |what| SourceError::Changed { path: s.path.clone(), what };
            let meta = fs_err::metadata(&s.path)?;
            if meta.len() != s.bytes {
                return Err(changed("its size"));
            }
            if meta.modified().ok() != s.modified {
                return Err(changed("its modification time"));
            }
            let mut header = vec![0; s.data_start as usize];
            read_at(&s.file, &mut header, 0)?;
            if sha256(&header) != s.header_sha256 {
                return Err(changed("its header"));
            }
        }
        Ok(())
    }

    /// Up to three names with the smallest edit distance, if any is close.
    fn near(&self, name: &str) -> Vec<String> {
        let limit = name.chars().count() / 3 + 1;
        let mut scored: Vec<_> = self
            .tensors
            .keys()
            .filter(|k| k.len().abs_diff(name.len()) <= limit * 4)
            .take(20_000)
            .map(|k| (edit_distance(k, name), k))
            .filter(|(d, _)| *d <= limit)
            .collect();
        scored.sort();
        scored.into_iter().take(3).map(|(_, k)| k.clone()).collect()
    }
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(256).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(256).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::edit_distance;

    #[test]
    fn distances() {
        for (a, b, d) in [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("q_proj", "k_proj", 1)] {
            assert_eq!(edit_distance(a, b), d, "{a} {b}");
            assert_eq!(edit_distance(b, a), d, "{b} {a}");
        }
    }
}

//! All tensors of a checkpoint by name, mapped into memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

use super::path::{Impostor, impostor, open_regular};
use super::{Dtype, Header, SourceError, TensorView, hash::Sha256Stream};

/// Where a tensor lies and how to read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
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

impl TensorInfo {
    /// Stored size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
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
}

/// One weight file, opened and mapped.
#[derive(Debug)]
pub(super) struct Shard {
    /// Name in the model folder (the link, not the blob).
    pub(super) name: String,
    /// Path in the model folder.
    path: PathBuf,
    map: Mmap,
    modified: Option<SystemTime>,
    header_sha256: String,
    pub(super) header: Header,
}

impl Shard {
    /// Opens, maps and validates the regular file at `real`, known as `dir/name`.
    pub(super) fn open(dir: &Path, name: &str, real: &Path) -> Result<Self, SourceError> {
        let path = dir.join(name);
        let file = open_regular(real)?;
        let modified = file.metadata()?.modified().ok();
        // SAFETY: the map is private to this struct and only read. Another process that truncates the file while it
        // is mapped makes reads fail with SIGBUS; the same holds for every tool that maps checkpoints, and
        // `check_unchanged` reports changes that do not. The content is treated as untrusted bytes.
        let map = unsafe { Mmap::map(file.file()) }
            .map_err(|e| std::io::Error::new(e.kind(), format!("cannot map `{}`: {e}", path.display())))?;
        let header = Header::parse(&map).map_err(|source| match impostor(&map) {
            Some(Impostor::Lfs) => SourceError::LfsPointer { path: path.clone() },
            Some(Impostor::Html) => SourceError::HtmlPage { path: path.clone() },
            None => SourceError::Header { path: path.clone(), source },
        })?;
        let header_sha256 = hash_header(&map, header.data_start);
        Ok(Shard { name: name.to_owned(), path, map, modified, header_sha256, header })
    }
}

fn hash_header(map: &[u8], data_start: u64) -> String {
    let mut hash = Sha256Stream::default();
    hash.update(&map[..data_start as usize]);
    hash.finish().sha256
}

/// Every tensor of a checkpoint, by name.
#[derive(Debug, Default)]
pub struct TensorDirectory {
    tensors: BTreeMap<String, TensorInfo>,
    shards: Vec<Shard>,
    total_bytes: u64,
}

impl TensorDirectory {
    /// Joins validated shards. Names must not repeat across shards; [`super::index`] reports those beforehand.
    pub(super) fn new(mut shards: Vec<Shard>) -> Self {
        let mut tensors = BTreeMap::new();
        let mut total_bytes = 0;
        for (shard, file) in shards.iter_mut().enumerate() {
            let start = file.header.data_start;
            for t in std::mem::take(&mut file.header.tensors) {
                total_bytes += t.end - t.begin;
                let info = TensorInfo {
                    dtype: t.dtype,
                    shape: t.shape,
                    file: file.path.clone(),
                    begin: start + t.begin,
                    end: start + t.end,
                    shard,
                };
                tensors.insert(t.name, info);
            }
        }
        TensorDirectory { tensors, shards, total_bytes }
    }

    /// Where the tensor lies, if it exists.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All names and descriptions, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(n, i)| (n.as_str(), i))
    }

    /// All tensors by file and offset: the order in which reading is sequential.
    pub fn in_file_order(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
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

    /// The tensor in place, without copying.
    ///
    /// # Errors
    /// [`SourceError::MissingTensor`], with a few near names.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let Some((name, info)) = self.tensors.get_key_value(name) else {
            return Err(SourceError::MissingTensor { name: name.to_owned(), near: self.near(name) });
        };
        // In bounds: `Header::parse` proved that the ranges tile the data of this very map.
        let bytes = &self.shards[info.shard].map[info.begin as usize..info.end as usize];
        Ok(TensorView { name, dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// Tells the system that the pages of this tensor will not be needed soon, so that streaming a large checkpoint
    /// does not count as memory in use. Only a hint: reading the tensor again works, from the file.
    pub fn advise_dontneed(&self, name: &str) {
        #[cfg(unix)]
        if let Some(info) = self.tensors.get(name)
            && info.end > info.begin
        {
            let map = &self.shards[info.shard].map;
            // SAFETY: the map is a shared, read-only map of a file. Dropping its pages cannot lose data: the next
            // access reads the same bytes from the file again, also for neighbours on the first and last page.
            let _ = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    info.begin as usize,
                    (info.end - info.begin) as usize,
                )
            };
        }
        #[cfg(not(unix))]
        let _ = name;
    }

    /// Identity of every weight file, in the order of the file names.
    pub fn fingerprint(&self) -> Vec<WeightFingerprint> {
        let mut list: Vec<_> = self
            .shards
            .iter()
            .map(|s| WeightFingerprint {
                file: s.name.clone(),
                bytes: s.map.len() as u64,
                header_sha256: s.header_sha256.clone(),
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
            if meta.len() != s.map.len() as u64 {
                return Err(changed("its size"));
            }
            if meta.modified().ok() != s.modified {
                return Err(changed("its modification time"));
            }
            if hash_header(&s.map, s.header.data_start) != s.header_sha256 {
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

//! `manifest.json`: size and hash of every file of a converted model.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::WriteError;
use crate::source::{FileDigest, plain_file_name, sha256_file};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";

/// Largest manifest read.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// Content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format: 1.
    pub version: u32,
    /// Every file but the manifest itself.
    pub files: BTreeMap<String, FileDigest>,
}

impl Manifest {
    /// The manifest of these files.
    pub(super) fn new(files: BTreeMap<String, FileDigest>) -> Self {
        Manifest { version: 1, files }
    }

    /// Its bytes: indented JSON, sorted, with a final newline.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let mut text = serde_json::to_vec_pretty(self).map_err(io::Error::from)?;
        text.push(b'\n');
        Ok(text)
    }
}

/// How a folder differs from its manifest. All names sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ManifestReport {
    /// Files whose size and hash are right.
    pub intact: Vec<String>,
    /// Files with another size or hash, and files that are no regular files.
    pub differing: Vec<String>,
    /// Files of the manifest that are not there.
    pub missing: Vec<String>,
    /// Files that the manifest does not know.
    pub extra: Vec<String>,
}

impl ManifestReport {
    /// Whether every file of the manifest is there and right, and no other.
    pub fn is_clean(&self) -> bool {
        self.differing.is_empty() && self.missing.is_empty() && self.extra.is_empty()
    }
}

/// Compares the files of `dir` with its `manifest.json`, reading all of them.
///
/// # Errors
/// No manifest, one that cannot be understood, or a file that cannot be read.
pub fn verify_manifest(dir: &Path) -> Result<ManifestReport, WriteError> {
    let path = dir.join(MANIFEST);
    let manifest = read(&path)?;
    let mut report = ManifestReport::default();
    for (name, expected) in &manifest.files {
        let file = dir.join(name);
        let list = match fs::symlink_metadata(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => &mut report.missing,
            Err(e) => return Err(e.into()),
            // Links are followed (a folder may have been moved to a cache), special files are never opened.
            Ok(_) if !file.is_file() => &mut report.differing,
            Ok(_) if fs::metadata(&file)?.len() != expected.bytes => &mut report.differing,
            Ok(_) if sha256_file(&file)? != *expected => &mut report.differing,
            Ok(_) => &mut report.intact,
        };
        list.push(name.clone());
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != MANIFEST && !manifest.files.contains_key(&name) {
            report.extra.push(name);
        }
    }
    report.extra.sort();
    Ok(report)
}

fn read(path: &PathBuf) -> Result<Manifest, WriteError> {
    let bad = |reason: String| WriteError::BadManifest { path: path.clone(), reason };
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.len() > MAX_MANIFEST_BYTES {
        return Err(bad("not a small regular file".to_owned()));
    }
    parse(&fs::read(path)?).map_err(bad)
}

/// Reads the content of a manifest; every file it names lies in its folder.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse(content: &[u8]) -> Result<Manifest, String> {
    let manifest: Manifest = serde_json::from_slice(content).map_err(|e| e.to_string())?;
    if manifest.version != 1 {
        return Err(format!("version {} is not known, expected 1", manifest.version));
    }
    match manifest.files.keys().find(|n| !plain_file_name(n)) {
        Some(name) => Err(format!("{name:?} is not a plain file name")),
        None => Ok(manifest),
    }
}

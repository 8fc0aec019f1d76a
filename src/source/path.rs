//! Which paths named by a checkpoint may be followed.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::SourceError;

/// Whether `name` is a plain file name: one component that stays in its folder on every system.
pub(crate) fn plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

/// The real path of the regular file `dir/name`, with its size.
///
/// A symbolic link is followed when it ends inside `dir`, or in the `blobs` folder of a hub cache that `dir` is a
/// snapshot of (`<repo>/snapshots/<commit>` next to `<repo>/blobs`). The file is never opened here, so that a FIFO
/// cannot block.
///
/// # Errors
/// Missing file, link that leads elsewhere, or anything that is not a regular file.
pub(crate) fn resolve_regular(dir: &Path, name: &str) -> Result<(PathBuf, u64), SourceError> {
    let path = dir.join(name);
    let link = fs::symlink_metadata(&path)?;
    let (real, meta) = if link.file_type().is_symlink() {
        let real = fs::canonicalize(&path)?;
        let home = fs::canonicalize(dir)?;
        if !real.starts_with(&home) && !blobs_folder(&home).is_some_and(|b| real.starts_with(b)) {
            return Err(SourceError::Escapes { path, target: real });
        }
        let meta = fs::symlink_metadata(&real)?;
        (real, meta)
    } else {
        (path.clone(), link)
    };
    match kind_of(&meta) {
        None => Ok((real, meta.len())),
        Some(kind) => Err(SourceError::NotRegular { path, kind }),
    }
}

/// `blobs` of the hub cache, where `home` is `<repo>/snapshots/<commit>`.
fn blobs_folder(home: &Path) -> Option<PathBuf> {
    let snapshots = home.parent()?;
    if snapshots.file_name()? != "snapshots" {
        return None;
    }
    fs::canonicalize(snapshots.parent()?.join("blobs")).ok()
}

/// What a file is when it is not a regular file.
fn kind_of(meta: &std::fs::Metadata) -> Option<&'static str> {
    let t = meta.file_type();
    if t.is_file() {
        return None;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if t.is_fifo() {
            return Some("a pipe");
        }
        if t.is_socket() {
            return Some("a socket");
        }
        if t.is_block_device() || t.is_char_device() {
            return Some("a device");
        }
    }
    Some(if t.is_dir() { "a folder" } else { "a special file" })
}

/// Opens a regular file for reading without ever blocking on it, should it turn into a pipe meanwhile.
pub(crate) fn open_regular(path: &Path) -> Result<fs::File, SourceError> {
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use fs_err::os::unix::fs::OpenOptionsExt;
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    }
    let file = options.open(path)?;
    match kind_of(&file.metadata()?) {
        None => Ok(file),
        Some(kind) => Err(SourceError::NotRegular { path: path.to_owned(), kind }),
    }
}

/// Reads a small file whole, refusing one above `limit` bytes before reading it, and naming git-lfs pointers and web
/// pages for what they are.
pub(crate) fn read_small(dir: &Path, name: &str, limit: u64) -> Result<Vec<u8>, SourceError> {
    use std::io::Read;
    let (real, bytes) = resolve_regular(dir, name)?;
    let path = dir.join(name);
    if bytes > limit {
        return Err(SourceError::TooLarge { path, bytes, limit });
    }
    let mut content = Vec::with_capacity(bytes as usize);
    open_regular(&real)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(SourceError::TooLarge { path, bytes: content.len() as u64, limit });
    }
    match impostor(&content) {
        Some(Impostor::Lfs) => Err(SourceError::LfsPointer { path }),
        Some(Impostor::Html) => Err(SourceError::HtmlPage { path }),
        None => Ok(content),
    }
}

/// What is sometimes found in place of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Impostor {
    Lfs,
    Html,
}

/// Recognises a git-lfs pointer or a web page by its first bytes.
pub(crate) fn impostor(content: &[u8]) -> Option<Impostor> {
    let head = &content[..content.len().min(256)];
    let text = head.trim_ascii_start();
    if text.starts_with(b"version https://git-lfs") {
        return Some(Impostor::Lfs);
    }
    let lower = text.to_ascii_lowercase();
    (lower.starts_with(b"<!doctype html") || lower.starts_with(b"<html")).then_some(Impostor::Html)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for bad in ["", ".", "..", "a/b", "../a", "/etc/passwd", "C:\\x", "C:x", "a\\b", "a\0b", "a\nb"] {
            assert!(!plain_file_name(bad), "{bad:?}");
        }
        assert!(!plain_file_name(&"x".repeat(256)));
        for good in ["model.safetensors", "model-00001-of-00002.safetensors", "..a", "ü"] {
            assert!(plain_file_name(good), "{good:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_inside_or_in_the_cache() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("repo/snapshots/abc");
        let blobs = root.path().join("repo/blobs");
        fs_err::create_dir_all(&snapshot).unwrap();
        fs_err::create_dir_all(&blobs).unwrap();
        fs_err::write(blobs.join("b"), "12345").unwrap();
        fs_err::write(root.path().join("secret"), "x").unwrap();
        fs_err::write(snapshot.join("inside"), "x").unwrap();
        symlink("../../blobs/b", snapshot.join("blob")).unwrap();
        symlink("inside", snapshot.join("near")).unwrap();
        symlink("../../../secret", snapshot.join("far")).unwrap();
        symlink(".", snapshot.join("loop")).unwrap();
        assert_eq!(resolve_regular(&snapshot, "blob").unwrap().1, 5);
        assert_eq!(resolve_regular(&snapshot, "near").unwrap().1, 1);
        assert!(matches!(resolve_regular(&snapshot, "far"), Err(SourceError::Escapes { .. })));
        assert!(matches!(resolve_regular(&snapshot, "loop"), Err(SourceError::NotRegular { .. })));
        assert!(matches!(resolve_regular(&snapshot, "gone"), Err(SourceError::Io(_))));
        // The same link from a folder that is no snapshot leads outside.
        let plain = root.path().join("plain");
        fs_err::create_dir(&plain).unwrap();
        symlink("../repo/blobs/b", plain.join("blob")).unwrap();
        assert!(matches!(resolve_regular(&plain, "blob"), Err(SourceError::Escapes { .. })));
    }
}

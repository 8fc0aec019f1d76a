//! The cache of a hub, laid out as the Python client does: `blobs` by what the hub calls the content, `snapshots` of links to
//! them by commit, `refs` from branch to commit, `.no_exist` for files that a commit lacks, and locks beside them.

use std::fs::TryLockError;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use fs_err as fs;
use hf_hub::{Cache, Repo, RepoType};

use super::TICK;
use super::client::{About, Client};
use super::failure::Failure;

/// How long another process may hold the lock of a small file.
const LOCKED: Duration = Duration::from_secs(10);

/// The part of the cache that one model has.
#[derive(Debug, Clone)]
pub(super) struct Store {
    cache: Cache,
    /// `org/name`.
    id: String,
}

impl Store {
    pub(super) fn new(cache: PathBuf, id: String) -> Self {
        Self { cache: Cache::new(cache), id }
    }

    /// The model at a branch, tag or commit.
    pub(super) fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    /// `<cache>/models--org--name`.
    fn folder(&self) -> PathBuf {
        self.cache.path().join(self.at("").folder_name())
    }

    /// `<cache>/.locks/models--org--name/<name>.lock`.
    pub(super) fn lock(&self, name: &str) -> PathBuf {
        self.cache.path().join(".locks").join(self.at("").folder_name()).join(format!("{name}.lock"))
    }

    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.cache.model(self.id.clone()).blob_path(name)
    }

    /// `snapshots/<commit>`.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.model(self.id.clone()).pointer_path(commit)
    }

    /// The commit that a branch, tag or commit stands for, as far as the cache knows.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder().join("refs").join(revision)).ok()?.trim().to_owned();
        may_be_commit(&commit).then_some(commit)
    }

    fn remember(&self, revision: &str, commit: &str) -> Result<(), Failure> {
        if !is_commit(revision) && self.commit(revision).as_deref() != Some(commit) {
            self.cache.repo(self.at(revision)).create_ref(commit)?;
        }
        Ok(())
    }

    /// Brings a file into the cache, unless it has the content, and returns its place in the snapshot.
    pub(super) fn fetch(
        &self,
        client: &Client,
        revision: &str,
        name: &str,
        progress: &Sender<(u64, u64)>,
    ) -> Result<PathBuf, Failure> {
        let place = self.snapshot(revision).join(name);
        if is_commit(revision) && fs::metadata(&place).is_ok() {
            return Ok(place);
        }
        let repo = self.at(revision);
        let about = client.about(&repo, name).map_err(|(failure, commit)| {
            if let (Failure::Refused(refusal), Some(commit)) = (&failure, commit)
                && refusal.no_file()
            {
                // For other programs; ours asks again.
                let _ = self.note_absent(revision, &commit, name);
            }
            failure
        })?;
        let blob = self.blob(&about.etag);
        if fs::metadata(&blob).is_err() {
            self.fill(client, &repo, name, &about, progress)?;
        }
        self.remember(revision, &about.commit)?;
        let place = self.snapshot(&about.commit).join(name);
        link(&blob, &place)?;
        Ok(place)
    }

    fn note_absent(&self, revision: &str, commit: &str, name: &str) -> Result<(), Failure> {
        let folder = self.folder().join(".no_exist").join(commit);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), b"")?;
        self.remember(revision, commit)
    }

    /// Downloads a blob. It gets its name when it is as long as the hub says.
    fn fill(
        &self,
        client: &Client,
        repo: &Repo,
        name: &str,
        about: &About,
        progress: &Sender<(u64, u64)>,
    ) -> Result<(), Failure> {
        let (blob, lock) = (self.blob(&about.etag), self.lock(&about.etag));
        for path in [&blob, &lock] {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
        }
        let held = fs::File::create(&lock)?;
        let since = Instant::now();
        // Where files cannot be locked, the check at the end is what keeps two writers apart.
        while let Err(TryLockError::WouldBlock) = held.file().try_lock() {
            if since.elapsed() > LOCKED {
                return Err(Failure::Busy(lock));
            }
            std::thread::sleep(TICK);
        }
        if fs::metadata(&blob).is_ok() {
            return Ok(());
        }
        let total = about.size.unwrap_or(0);
        let _ = progress.send((0, total));
        let incomplete = blob.with_file_name(format!("{}.incomplete", about.etag));
        let mut file = fs::File::create(&incomplete)?;
        let mut content = client.content(repo, name, None)?;
        let (mut there, mut buffer) = (0_u64, vec![0; 64 << 10]);
        loop {
            let n = content.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            there += n as u64;
            if about.size.is_some_and(|size| there > size) {
                break;
            }
            file.write_all(&buffer[..n])?;
            // The receiver is only gone when the download no longer matters.
            let _ = progress.send((there, total));
        }
        if let Some(expected) = about.size.filter(|size| *size != there) {
            let _ = fs::remove_file(&incomplete);
            let found = if there > expected { "more".to_owned() } else { format!("{there} bytes") };
            return Err(Failure::Length { expected, found });
        }
        file.sync_all()?;
        fs::rename(&incomplete, &blob)?;
        Ok(())
    }
}

/// Forty hexadecimal digits.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What can be the name of a commit, also at a hub that does not count in git's way.
pub(super) fn may_be_commit(word: &str) -> bool {
    (1..=64).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Makes `place`, which is `snapshots/<commit>/<name>`, stand for a blob beside `snapshots`. Others see the link or none, at
/// no time one to nothing.
#[cfg(not(windows))]
fn link(blob: &Path, place: &Path) -> Result<(), Failure> {
    let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    if fs::read_link(place).is_ok_and(|there| there == target) {
        return Ok(());
    }
    fs::create_dir_all(place.parent().unwrap_or(place))?;
    let mut fresh = place.as_os_str().to_owned();
    fresh.push(format!(".{}.link", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = fs::remove_file(&fresh);
    fs_err::os::unix::fs::symlink(&target, &fresh)?;
    fs::rename(&fresh, place)?;
    Ok(())
}

/// Links need rights there that users do not have.
#[cfg(windows)]
fn link(blob: &Path, place: &Path) -> Result<(), Failure> {
    fs::create_dir_all(place.parent().unwrap_or(place))?;
    fs::copy(blob, place)?;
    Ok(())
}

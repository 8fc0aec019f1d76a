//! A large file of the hub, fetched so that what came of it is kept: the next attempt asks for the rest (HTTP `Range`).
//!
//! The bytes wait in `blobs/<git oid>.gqa2mla-part`. That name stands for the content, whatever branch or commit it is
//! asked for by, so a part never continues another file. A part becomes a blob only when it is as long as announced, under
//! the SHA-256 of what is in it; whether that is the hash which the hub announces, the caller finds out.

use std::fs::TryLockError;
use std::future::poll_fn;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::time::Duration;

use fs_err as fs;
use hf_hub::repository::HFRepository;
use hf_hub::{HFError, RepoTypeModel};

use super::{Failure, Remote, Snapshot, TICK, Target};
use crate::source::sha256_file;

/// Attempts in a row that bring nothing before it is given up.
const FRUITLESS: u32 = 3;
/// How often a server may send the whole file where the rest of it was asked for.
const RESTARTS: u32 = 2;

/// A file that is being fetched.
#[derive(Debug, Clone)]
pub(super) struct Part {
    name: String,
    commit: String,
    size: u64,
    /// Where the bytes are gathered.
    part: PathBuf,
    /// Held while somebody does so.
    lock: PathBuf,
    /// `snapshots/<commit>/<name>`.
    place: PathBuf,
}

/// How a body ended.
enum End {
    /// With its last byte, whole or not.
    Closed,
    /// It holds more than was asked for.
    Beyond,
}

impl Part {
    /// `None` for what is not stored as a large file: it is small, and the listing has no name for its content.
    pub(super) fn of(snapshot: &Snapshot, file: &Remote) -> Option<Self> {
        let oid = file.large.as_ref()?;
        // <cache>/models--org--name/snapshots/<commit>
        let folder = snapshot.dir.parent()?.parent()?;
        Some(Part {
            name: file.name.clone(),
            commit: snapshot.commit.clone(),
            size: file.size,
            part: folder.join("blobs").join(format!("{oid}.gqa2mla-part")),
            lock: folder.parent()?.join(".locks").join(folder.file_name()?).join(format!("{oid}.gqa2mla.lock")),
            place: snapshot.dir.join(&file.name),
        })
    }

    /// Gathers the file and returns the blob it became, or nothing when another process has fetched it meanwhile. Tells
    /// `progress` how many bytes are there, of how many.
    pub(super) fn fetch(
        &self,
        target: &Target,
        stall: Duration,
        progress: &Sender<(u64, u64)>,
    ) -> Result<Option<PathBuf>, Failure> {
        for path in [&self.part, &self.lock] {
            fs::create_dir_all(path.parent().unwrap_or(path)).map_err(HFError::Io)?;
        }
        let lock = fs::File::create(&self.lock).map_err(HFError::Io)?;
        // Where files cannot be locked, the hash at the end is what keeps two writers apart.
        while let Err(TryLockError::WouldBlock) = lock.file().try_lock() {
            let there = fs::metadata(&self.part).map_or(0, |m| m.len());
            let _ = progress.send((there, self.size));
            std::thread::sleep(TICK);
        }
        if fs::metadata(&self.place).is_ok() {
            return Ok(None);
        }
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&self.part).map_err(HFError::Io)?;
        // A runtime and a client of its own: this one may be called from a thread that drives another.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(HFError::Io)?;
        let repo = target.client()?.model(&target.owner, &target.name);
        runtime.block_on(self.gather(&repo, &mut file, stall, progress))?;
        file.sync_all().map_err(HFError::Io)?;
        let hash = sha256_file(&self.part).map_err(|e| HFError::Other(e.to_string()))?.sha256;
        let blob = self.part.with_file_name(hash);
        fs::rename(&self.part, &blob).map_err(HFError::Io)?;
        Ok(Some(blob))
    }

    /// Appends to `file` until it is whole.
    async fn gather(
        &self,
        repo: &HFRepository<RepoTypeModel>,
        file: &mut fs::File,
        stall: Duration,
        progress: &Sender<(u64, u64)>,
    ) -> Result<(), Failure> {
        let (mut fruitless, mut restarts) = (0, 0);
        loop {
            let have = file.seek(SeekFrom::End(0)).map_err(HFError::Io)?;
            let _ = progress.send((have, self.size));
            if have == self.size {
                return Ok(());
            }
            if have > self.size {
                file.set_len(0).map_err(HFError::Io)?;
                continue;
            }
            let end = self.stream(repo, file, have, stall, progress).await;
            let now = file.seek(SeekFrom::End(0)).map_err(HFError::Io)?;
            fruitless = if now > have { 0 } else { fruitless + 1 };
            let failure = match end {
                // The server knows no ranges, and what was appended is the beginning of the file.
                Ok(End::Beyond) => {
                    file.set_len(0).map_err(HFError::Io)?;
                    restarts += 1;
                    if have > 0 && restarts <= RESTARTS {
                        continue;
                    }
                    return Err(Failure::Length { expected: self.size, found: "more".to_owned() });
                }
                Ok(End::Closed) => Failure::Length { expected: self.size, found: format!("{now} bytes") },
                // "Range not satisfiable": what the server has is not as long as was announced.
                Err(Failure::Client(HFError::Http { context })) if context.status.as_u16() == 416 => {
                    return Err(Failure::Length { expected: self.size, found: format!("at most {have} bytes") });
                }
                Err(Failure::Client(e)) if may_pass(&e) => Failure::Client(e),
                Err(e) => return Err(e),
            };
            if fruitless >= FRUITLESS {
                return Err(failure);
            }
            if now < self.size {
                tokio::time::sleep(TICK * (1 << fruitless)).await;
            }
        }
    }

    /// Appends what one request brings.
    async fn stream(
        &self,
        repo: &HFRepository<RepoTypeModel>,
        file: &mut fs::File,
        have: u64,
        stall: Duration,
        progress: &Sender<(u64, u64)>,
    ) -> Result<End, Failure> {
        let request = repo.download_file_stream().filename(&self.name).revision(&self.commit);
        let request = request.maybe_range((have > 0).then_some(have..self.size)).send();
        let stalled = |_| Failure::Stalled(stall);
        let (_, mut body) = tokio::time::timeout(stall, request).await.map_err(stalled)??;
        let mut there = have;
        loop {
            let next = poll_fn(|context| Pin::new(&mut *body).poll_next(context));
            let Some(bytes) = tokio::time::timeout(stall, next).await.map_err(stalled)? else { return Ok(End::Closed) };
            let bytes = bytes?;
            if bytes.len() as u64 > self.size - there {
                return Ok(End::Beyond);
            }
            file.write_all(&bytes).map_err(HFError::Io)?;
            there += bytes.len() as u64;
            // The receiver is only gone when the download no longer matters.
            let _ = progress.send((there, self.size));
        }
    }
}

/// Whether the same request may succeed a moment later.
fn may_pass(e: &HFError) -> bool {
    match e {
        HFError::Request { .. } | HFError::Xet { .. } => true,
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

//! A large file of the hub, fetched so that what came of it is kept: the next attempt asks for the rest (HTTP `Range`).
//!
//! The bytes wait in `blobs/<git oid>.gqa2mla-part`. That name stands for the content, whatever branch or commit it is
//! asked for by, so a part never continues another file. A part becomes a blob only when it is as long as announced, under
//! the SHA-256 of what is in it; whether that is the hash which the hub announces, the caller finds out.

use std::fs::TryLockError;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::mpsc::Sender;

use fs_err as fs;
use hf_hub::Repo;

use super::client::Client;
use super::failure::{Failure, Refusal};
use super::store::Store;
use super::{Remote, TICK};
use crate::source::sha256_file;

/// Attempts in a row that bring nothing before it is given up.
const FRUITLESS: u32 = 3;
/// How often a server may send the whole file where the rest of it was asked for.
const RESTARTS: u32 = 2;

/// A file that is being fetched.
#[derive(Debug, Clone)]
pub(super) struct Part {
    name: String,
    /// The model at a commit.
    repo: Repo,
    size: u64,
    /// Where the bytes are gathered.
    part: PathBuf,
    /// Held while somebody does so.
    lock: PathBuf,
    /// `snapshots/<commit>/<name>`.
    place: PathBuf,
}

/// What became of a part. To be kept until the file is linked to: those who wait for the lock look for it there.
pub(super) struct Made {
    /// `blobs/<hash of its bytes>`.
    pub(super) blob: PathBuf,
    _lock: fs::File,
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
    pub(super) fn of(store: &Store, commit: &str, file: &Remote) -> Option<Self> {
        let oid = file.large.as_ref()?;
        Some(Part {
            name: file.name.clone(),
            repo: store.at(commit),
            size: file.size,
            part: store.blob(&format!("{oid}.gqa2mla-part")),
            lock: store.lock(&format!("{oid}.gqa2mla")),
            place: store.snapshot(commit).join(&file.name),
        })
    }

    /// Gathers the file and returns the blob it became, or nothing when another process has fetched it meanwhile. Tells
    /// `progress` how many bytes are there, of how many.
    pub(super) fn fetch(&self, client: &Client, progress: &Sender<(u64, u64)>) -> Result<Option<Made>, Failure> {
        for path in [&self.part, &self.lock] {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
        }
        let lock = fs::File::create(&self.lock)?;
        // Where files cannot be locked, the hash at the end is what keeps two writers apart.
        while let Err(TryLockError::WouldBlock) = lock.file().try_lock() {
            let there = fs::metadata(&self.part).map_or(0, |m| m.len());
            let _ = progress.send((there, self.size));
            std::thread::sleep(TICK);
        }
        if fs::metadata(&self.place).is_ok() {
            return Ok(None);
        }
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&self.part)?;
        self.gather(client, &mut file, progress)?;
        file.sync_all()?;
        let hash = sha256_file(&self.part)?.sha256;
        let blob = self.part.with_file_name(hash);
        fs::rename(&self.part, &blob)?;
        Ok(Some(Made { blob, _lock: lock }))
    }

    /// Appends to `file` until it is whole.
    fn gather(&self, client: &Client, file: &mut fs::File, progress: &Sender<(u64, u64)>) -> Result<(), Failure> {
        let (mut fruitless, mut restarts) = (0, 0);
        loop {
            let have = file.seek(SeekFrom::End(0))?;
            let _ = progress.send((have, self.size));
            if have == self.size {
                return Ok(());
            }
            if have > self.size {
                file.set_len(0)?;
                continue;
            }
            let end = self.stream(client, file, have, progress);
            let now = file.seek(SeekFrom::End(0))?;
            fruitless = if now > have { 0 } else { fruitless + 1 };
            let failure = match end {
                // The server knows no ranges, and what was appended is the beginning of the file.
                Ok(End::Beyond) => {
                    file.set_len(0)?;
                    restarts += 1;
                    if have > 0 && restarts <= RESTARTS {
                        continue;
                    }
                    return Err(Failure::Length { expected: self.size, found: "more".to_owned() });
                }
                Ok(End::Closed) => Failure::Length { expected: self.size, found: format!("{now} bytes") },
                // "Range not satisfiable": what the server has is not as long as was announced.
                Err(Failure::Refused(Refusal { status: 416, .. })) => {
                    return Err(Failure::Length { expected: self.size, found: format!("at most {have} bytes") });
                }
                Err(failure) if failure.may_pass() => failure,
                Err(failure) => return Err(failure),
            };
            if fruitless >= FRUITLESS {
                return Err(failure);
            }
            if now < self.size {
                std::thread::sleep(TICK * (1 << fruitless));
            }
        }
    }

    /// Appends what one request brings.
    fn stream(
        &self,
        client: &Client,
        file: &mut fs::File,
        have: u64,
        progress: &Sender<(u64, u64)>,
    ) -> Result<End, Failure> {
        let mut content = client.content(&self.repo, &self.name, (have > 0).then_some((have, self.size)))?;
        let (mut there, mut buffer) = (have, vec![0; 128 << 10]);
        loop {
            let n = content.read(&mut buffer)?;
            if n == 0 {
                return Ok(End::Closed);
            }
            if n as u64 > self.size - there {
                return Ok(End::Beyond);
            }
            file.write_all(&buffer[..n])?;
            there += n as u64;
            // The receiver is only gone when the download no longer matters.
            let _ = progress.send((there, self.size));
        }
    }
}

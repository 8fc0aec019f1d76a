//! One writer per output, without trusting `flock`: a lock file that appears whole or not at all.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::{WriteError, ops};

/// Content of a lock file: who holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) pid: u32,
    pub(super) host: String,
    /// Seconds since 1970 UTC.
    pub(super) started: u64,
    /// Start of the process in clock ticks since boot, where the system tells: a pid alone may be reused.
    process_start: Option<u64>,
}

impl Owner {
    pub(super) fn this() -> Self {
        let pid = std::process::id();
        Owner {
            pid,
            host: host(),
            started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            process_start: process_start(pid),
        }
    }

    /// Whether the owner certainly does not run any more. Only known on its own host.
    pub(super) fn is_dead(&self) -> bool {
        self.host == host() && !(alive(self.pid) && self.process_start == process_start(self.pid))
    }

    /// Whether the owner is certainly another process that still runs.
    pub(super) fn is_alive(&self) -> bool {
        self.host == host() && self.pid != std::process::id() && !self.is_dead()
    }
}

/// A held lock; released on drop.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    owner: Owner,
}

impl Lock {
    /// Takes the lock at `path` for `output`; from a dead owner, if there is one.
    pub(super) fn take(path: PathBuf, output: &Path) -> Result<Self, WriteError> {
        let owner = Owner::this();
        // A second round follows when the lock of a dead process was removed; a third only if others race for it.
        for _ in 0..3 {
            if create(&path, &owner)? {
                return Ok(Lock { path, owner });
            }
            let Some(holder) = read(&path)? else { continue };
            if !holder.is_dead() {
                let Owner { pid, host, started, .. } = holder;
                return Err(WriteError::Locked { output: output.to_owned(), lock: path, pid, host, started });
            }
            remove_stale(&path, &holder)?;
        }
        Err(WriteError::BadLock { lock: path, reason: "other runs keep taking it".to_owned() })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Only our own: someone may have judged it stale from another host and removed it by hand.
        if matches!(read(&self.path), Ok(Some(owner)) if owner == self.owner) {
            let _ = ops::remove_file(&self.path);
        }
    }
}

/// Creates the lock file with its content; `false` when it exists already.
///
/// Written under another name and then hard-linked, which fails when the target exists: no reader ever sees half a
/// lock, also on network file systems. Where links are not supported it is created exclusively instead.
fn create(path: &Path, owner: &Owner) -> Result<bool, WriteError> {
    let text = serde_json::to_vec(owner).map_err(io::Error::from)?;
    let draft = unique_sibling(path, "draft");
    let mut file = ops::create_file(&draft)?;
    let written = ops::write(&mut file, &text).and_then(|()| ops::sync(&file));
    drop(file);
    let linked = written.and_then(|()| ops::hard_link(&draft, path));
    if let Err(e) = ops::remove_file(&draft) {
        if linked.is_ok() {
            let _ = ops::remove_file(path);
        }
        return Err(e.into());
    }
    match linked {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
            match fs::OpenOptions::new().write(true).create_new(true).open(path) {
                Ok(mut file) => {
                    file.write_all(&text)?;
                    Ok(true)
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(e.into()),
            }
        }
        Err(e) => Err(e.into()),
    }
}

/// The owner named in the lock file; `None` when the file is gone.
fn read(path: &Path) -> Result<Option<Owner>, WriteError> {
    let bad = |reason: String| WriteError::BadLock { lock: path.to_owned(), reason };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if !meta.is_file() || meta.len() > 1 << 16 {
        return Err(bad("it is not a small regular file".to_owned()));
    }
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| bad(e.to_string())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Removes the lock of a dead process. It is renamed away first, which only one of several racing runs can do, and
/// put back when it turns out to be another, live one that was created in between.
fn remove_stale(path: &Path, holder: &Owner) -> Result<(), WriteError> {
    let aside = unique_sibling(path, "stale");
    match ops::rename(path, &aside) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    if read(&aside)?.as_ref() != Some(holder) {
        let _ = fs::hard_link(&aside, path);
    }
    ops::remove_file(&aside)?;
    Ok(())
}

/// `path` with `.<what>-<pid>-<n>` appended; unique in this host's processes.
pub(super) fn unique_sibling(path: &Path, what: &str) -> PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{what}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    PathBuf::from(name)
}

/// A new name for a staging folder: `hidden` with `.partial-<host>_<start>-<pid>-<n>` appended, the host as eight digits of
/// a hash, the start of the process where the system tells it: a pid alone may be reused.
pub(super) fn staging_folder(hidden: &Path) -> PathBuf {
    let start = process_start(std::process::id()).map_or_else(String::new, |s| format!("_{s}"));
    unique_sibling(hidden, &format!("partial-{}{start}", host_digits()))
}

/// Whether a folder whose name ends in `maker` (`<host>_<start>-<pid>-<n>`) was made on this host by a process that is gone.
pub(super) fn made_by_the_dead(maker: &str) -> bool {
    let mut parts = maker.split('-');
    let (host, pid) = (parts.next(), parts.next().and_then(|p| p.parse().ok()));
    let host = host.map(|h| h.split_once('_').map_or((h, None), |(h, s)| (h, s.parse::<u64>().ok())));
    let (Some((host, start)), Some(pid)) = (host, pid) else { return false };
    let another = || start.is_some_and(|was| process_start(pid).is_some_and(|is| is != was));
    host == host_digits() && (!alive(pid) || another())
}

fn host_digits() -> String {
    crate::source::sha256(host().as_bytes())[..8].to_owned()
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| fs::read_to_string("/etc/hostname"));
    let name = name.ok().or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    match name.trim() {
        "" => "unknown".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(unix)]
fn alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    // EPERM means that it runs, as another user.
    pid.is_some_and(|p| rustix::process::test_kill_process(p) != Err(rustix::io::Errno::SRCH))
}

#[cfg(not(unix))]
fn alive(_: u32) -> bool {
    true
}

/// Start time of a process in clock ticks since boot: field 22 of `/proc/<pid>/stat`, counted after the command name,
/// which may itself hold spaces and parentheses.
fn process_start(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_tells_who_made_it() {
        let path = staging_folder(Path::new("/x/.out"));
        let name = path.file_name().unwrap().to_str().unwrap();
        let maker = name.strip_prefix(".out.partial-").unwrap();
        assert!(!made_by_the_dead(maker), "this process lives");
        let of = |pid: &str| format!("{}-{pid}-0", host_digits());
        // Above what Linux gives out.
        assert!(made_by_the_dead(&of("2147483646")));
        assert!(!made_by_the_dead("00000000-2147483646-0"), "another host");
        if process_start(std::process::id()).is_some() {
            let us = std::process::id();
            assert!(made_by_the_dead(&format!("{}_1-{us}-0", host_digits())), "our pid, of an earlier process");
            assert!(!made_by_the_dead(&format!("{}-{us}-0", host_digits())), "no start is told");
        }
        assert!(!made_by_the_dead(&of("x")) && !made_by_the_dead(""));
    }

    #[test]
    fn second_taker_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".out.lock");
        let lock = Lock::take(path.clone(), dir.path()).unwrap();
        match Lock::take(path.clone(), dir.path()) {
            Err(WriteError::Locked { pid, host: h, .. }) => {
                assert_eq!(pid, std::process::id());
                assert_eq!(h, host());
            }
            other => panic!("{other:?}"),
        }
        drop(lock);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_owner_loses_it_a_foreign_host_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".out.lock");
        // Our own pid with another start time: a reused pid.
        let reused = Owner { process_start: Some(1), ..Owner::this() };
        assert!(create(&path, &reused).unwrap());
        drop(Lock::take(path.clone(), dir.path()).unwrap());
        let foreign = Owner { host: "elsewhere".to_owned(), ..reused };
        assert!(create(&path, &foreign).unwrap());
        assert!(matches!(Lock::take(path.clone(), dir.path()), Err(WriteError::Locked { .. })));
        fs::write(&path, "{").unwrap();
        assert!(matches!(Lock::take(path, dir.path()), Err(WriteError::BadLock { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

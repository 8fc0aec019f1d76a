//! Every call that changes the disk, in one place, so that a test can stop the world before each of them.

use std::io;
use std::path::Path;

use fs_err as fs;

/// A place where a test may let the run die, or the disk fail. Does nothing outside tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point(_: &'static str) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(crate) use faults::point;

/// Creates a folder that must not exist: a planted link is an error.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    point("create folder")?;
    fs::create_dir(path)
}

/// Creates a file that must not exist; mode 0666 less the umask, as any program does.
pub(crate) fn create_file(path: &Path) -> io::Result<fs::File> {
    point("create file")?;
    fs::OpenOptions::new().write(true).create_new(true).open(path)
}

/// Writes all of `bytes`.
pub(crate) fn write(file: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    point("write")?;
    file.write_all(bytes)
}

/// Waits until a file is on the disk: the last moment at which a network file system or a quota can report that it is not.
pub(crate) fn sync(file: &fs::File) -> io::Result<()> {
    point("sync")?;
    file.sync_all()
}

/// Makes the entries of a folder durable. Windows has no such call.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    point("sync folder")?;
    #[cfg(unix)]
    fs::File::open(path)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Cuts a file to `bytes`.
pub(crate) fn truncate(file: &fs::File, bytes: u64) -> io::Result<()> {
    point("truncate")?;
    file.set_len(bytes)
}

/// Renames a file or folder.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    point("rename")?;
    fs::rename(from, to)
}

/// Gives a file a second name, which must not exist.
pub(crate) fn hard_link(from: &Path, to: &Path) -> io::Result<()> {
    point("link")?;
    fs::hard_link(from, to)
}

/// Removes a file.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    point("remove file")?;
    fs::remove_file(path)
}

/// Removes a folder and all in it.
pub(crate) fn remove_dir_all(path: &Path) -> io::Result<()> {
    point("remove folder")?;
    fs::remove_dir_all(path)
}

/// Where tests stop the world. The state belongs to a thread: tests run side by side.
#[cfg(test)]
pub(crate) mod faults {
    use std::cell::Cell;
    use std::io;

    /// What happens at the chosen point.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Fault {
        /// The process is gone: this call and all that follow, clean-up included, do nothing.
        Death,
        /// The disk is full for this one call, or for the next that takes room.
        Full,
    }

    thread_local! {
        static COUNT: Cell<usize> = const { Cell::new(0) };
        static PLAN: Cell<Option<(usize, Fault)>> = const { Cell::new(None) };
    }

    /// Runs `f` with a fault at its `at`-th point (none: only count). The second value is the number of points met.
    pub(crate) fn with<T>(fault: Option<(usize, Fault)>, f: impl FnOnce() -> T) -> (T, usize) {
        COUNT.set(0);
        PLAN.set(fault);
        let out = f();
        PLAN.set(None);
        (out, COUNT.get())
    }

    pub(crate) fn point(what: &'static str) -> io::Result<()> {
        let here = COUNT.get();
        COUNT.set(here + 1);
        match PLAN.get() {
            Some((at, Fault::Death)) if here >= at => Err(io::Error::other(format!("dead before {what}"))),
            Some((at, Fault::Full)) if here >= at && !what.starts_with("remove") => {
                PLAN.set(None);
                Err(io::Error::new(io::ErrorKind::StorageFull, what))
            }
            _ => Ok(()),
        }
    }
}

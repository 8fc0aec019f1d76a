//! Weight files in place: a read-only map of each, beside the reader.
//!
//! Mapped weights cost no memory of the process: they are pages of the system's file cache, read from the disk when they
//! are first used, shared with every other process that maps the file, and given up when memory runs short. What a map
//! cannot do is fail: a page that the file no longer has raises SIGBUS. So every use of a map is between two checks of the
//! file, and what happens between them is survived ([`fault`]) and told by the second.

#[cfg(unix)]
mod fault;

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fs_err as fs;
use memmap2::{Mmap, MmapOptions};

/// Share of the address space that one map may take where a limit is set on it (`ulimit -v`).
#[cfg(target_os = "linux")]
const SHARE: u64 = 4;

/// The map of a weight file, as long as somebody uses it.
#[derive(Debug, Default)]
pub(super) struct MapSlot {
    map: Mutex<Weak<WeightMap>>,
    seen: Arc<Seen>,
}

/// What is known of all maps of a file that there were.
#[derive(Debug, Default)]
struct Seen {
    used: AtomicBool,
    failed: AtomicBool,
}

impl MapSlot {
    /// Bytes `range` of a file of `bytes` bytes; `None` where it cannot be mapped.
    pub(super) fn get(&self, file: &fs::File, bytes: u64, range: Range<u64>) -> Option<MappedBytes> {
        let mut held = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let map = match held.upgrade() {
            Some(map) => map,
            None => {
                let map = Arc::new(WeightMap::new(file, bytes, self.seen.clone()).ok()?);
                *held = Arc::downgrade(&map);
                map
            }
        };
        let range = usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?;
        map.map.get(range.clone())?;
        Some(MappedBytes { map, range })
    }

    /// Whether the file was ever mapped.
    pub(super) fn used(&self) -> bool {
        self.seen.used.load(Ordering::Acquire)
    }

    /// Whether a page of it could not be read, since the file was opened. What was read from there on were zeros.
    pub(super) fn failed(&self) -> bool {
        let now = self.map.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        now.is_some_and(|map| map.failed()) || self.seen.failed.load(Ordering::Acquire)
    }
}

/// A whole weight file in the address space of the process.
#[derive(Debug)]
struct WeightMap {
    // Before the map, so that no address is watched that belongs to somebody else.
    #[cfg(unix)]
    watch: fault::Watch,
    map: Mmap,
    seen: Arc<Seen>,
}

impl WeightMap {
    /// Maps the `bytes` bytes of a file.
    fn new(file: &fs::File, bytes: u64, seen: Arc<Seen>) -> std::io::Result<Self> {
        // Where the address space is limited, what is computed needs some of it.
        #[cfg(target_os = "linux")]
        if rustix::process::getrlimit(rustix::process::Resource::As).current.is_some_and(|all| bytes > all / SHARE) {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        let length = usize::try_from(bytes).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        // SAFETY: nobody in this process writes to the file. Another process may: it is then read as bytes, of which every
        // pattern is a number, and the checks of `TensorDirectory` refuse what was computed from them. A file that gets
        // shorter is survived on Unix, and cannot be made shorter on Windows while it is mapped.
        let map = unsafe { MmapOptions::new().len(length).map(file.file())? };
        #[cfg(unix)]
        let watch = fault::Watch::new(map.as_ptr() as usize, map.len());
        seen.used.store(true, Ordering::Release);
        Ok(Self {
            #[cfg(unix)]
            watch,
            map,
            seen,
        })
    }

    /// Whether a page could not be read since the file was mapped.
    #[cfg(unix)]
    fn failed(&self) -> bool {
        self.watch.failed()
    }

    /// Whether a page could not be read since the file was mapped.
    #[cfg(not(unix))]
    fn failed(&self) -> bool {
        false
    }
}

impl Drop for WeightMap {
    fn drop(&mut self) {
        if self.failed() {
            self.seen.failed.store(true, Ordering::Release);
        }
    }
}

/// Bytes of a tensor in place. Keeps its file mapped.
///
/// They are what the file holds at that moment. Whoever computes with them asks
/// [`TensorDirectory::check_in_place`](super::TensorDirectory::check_in_place) before the result is used.
#[derive(Debug, Clone)]
pub struct MappedBytes {
    map: Arc<WeightMap>,
    range: Range<usize>,
}

impl MappedBytes {
    /// Asks the system to read them ahead, without waiting for it.
    pub fn read_ahead(&self) {
        // It is advice: where it is not taken, the pages come when they are used.
        #[cfg(unix)]
        let _ = self.map.map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len());
    }
}

impl Deref for MappedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // In bounds since it was made.
        self.map.map.get(self.range.clone()).unwrap_or_default()
    }
}

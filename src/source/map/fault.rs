//! Reading a mapped page that the file no longer has, without the end of the process.
//!
//! Truncating a file takes its pages out of every map at once, so no check of the size can exclude that the next read
//! meets a page that is gone; a disk that fails does the same. The system then sends SIGBUS to the thread that read. The
//! handler here looks whether the address is in a map that is watched. If so, it puts zeros in the place of the rest of that
//! map and notes it: the thread goes on with zeros, and the next check refuses whatever it made of them. Any other SIGBUS
//! goes to the handler that was there before, Rust's own (for stacks that overflow) among them.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

/// Addresses that are watched. Slots are never freed but used again, so the handler may walk them at any time.
struct Slot {
    /// First address; 0 while the slot is free.
    start: AtomicUsize,
    /// One past the last address.
    end: AtomicUsize,
    failed: AtomicBool,
    next: AtomicPtr<Slot>,
}

/// The slot that was made last.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(null_mut());
/// Held by who takes a slot; never by the handler.
static TAKING: Mutex<()> = Mutex::new(());
/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();
/// Bytes of a page, known before the handler can run.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// All slots, the newest first.
fn slots() -> impl Iterator<Item = &'static Slot> {
    let mut next = SLOTS.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: null, or a slot that was leaked when it was made.
        let slot = unsafe { next.as_ref() }?;
        next = slot.next.load(Ordering::Acquire);
        Some(slot)
    })
}

/// Watches a map until it is dropped.
pub(super) struct Watch(&'static Slot);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("failed", &self.failed()).finish()
    }
}

impl Watch {
    /// Watch a read-only map of a file that this process made.
    pub(super) fn new(start: usize, bytes: usize) -> Self {
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        install();
        let free = slots().find(|slot| slot.start.load(Ordering::Acquire) == 0);
        let slot = free.unwrap_or_else(|| {
            let slot: &'static Slot = Box::leak(Box::new(Slot {
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                failed: AtomicBool::new(false),
                next: AtomicPtr::new(SLOTS.load(Ordering::Acquire)),
            }));
            SLOTS.store(std::ptr::from_ref(slot).cast_mut(), Ordering::Release);
            slot
        });
        slot.failed.store(false, Ordering::Release);
        slot.end.store(start + bytes, Ordering::Release);
        slot.start.store(start, Ordering::Release);
        Self(slot)
    }

    /// Whether a page of the map could not be read.
    pub(super) fn failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
    }
}

/// Sets the handler up, once. Where the system does not take it, a page that is gone ends the process as it would have.
fn install() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        PAGE.store(rustix::param::page_size(), Ordering::Release);
        // SAFETY: a `sigaction` of zeros is the default action with an empty mask, and `sigaction(2)` fills it. The new
        // one has the signature that SA_SIGINFO asks for, and does only what a handler may: it reads atomics, calls
        // `mmap`, and what was there before. SA_ONSTACK, since a stack that overflows may be what the signal is about.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) != 0 {
                return;
            }
            BEFORE.get_or_init(|| before);
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, null_mut());
        }
    });
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system hands over valid pointers. An address comes only with signals that the system itself raised, whose
    // code is positive.
    let (raised, address) = unsafe { ((*info).si_code > 0, (*info).si_addr() as usize) };
    if raised && survive(address) {
        return;
    }
    // SAFETY: what is called is what the process had set up for this signal, with what it would have been given.
    unsafe { as_before(signal, raised, info, context) };
}

/// Puts zeros in the place of the rest of the watched map that `address` is in. False for any other address.
fn survive(address: usize) -> bool {
    for slot in slots() {
        let start = slot.start.load(Ordering::Acquire);
        let end = slot.end.load(Ordering::Acquire);
        // A slot that went to another map between the two reads has another start.
        if start == 0 || !(start..end).contains(&address) || slot.start.load(Ordering::Acquire) != start {
            continue;
        }
        let page = PAGE.load(Ordering::Acquire);
        let first = address - address % page;
        slot.failed.store(true, Ordering::Release);
        // SAFETY: the pages from `first` on belong to the map, which this thread is reading, so it is not unmapped now. They
        // are replaced at once by pages that may be read as these could, and go when the map goes. Another thread that does
        // the same gets the same.
        let replaced = unsafe {
            rustix::mm::mmap_anonymous(
                first as *mut c_void,
                end - first,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        return replaced.is_ok();
    }
    false
}

/// What the signal would have done without this handler.
///
/// # Safety
/// Only within a handler, with its arguments.
unsafe fn as_before(signal: c_int, raised: bool, info: *mut libc::siginfo_t, context: *mut c_void) {
    let (action, flags) = BEFORE.get().map_or((libc::SIG_DFL, 0), |b| (b.sa_sigaction, b.sa_flags));
    match action {
        // The system does not let a fault be ignored either: it would come again for ever.
        libc::SIG_IGN if !raised => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: both calls are async-signal-safe. The signal waits until the handler returns, and ends the process.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
        // SAFETY: a function that was installed with these flags has this signature.
        handler => unsafe {
            if flags & libc::SA_SIGINFO != 0 {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute(handler);
                handler(signal, info, context);
            } else {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MapSlot, MappedBytes};
    use fs_err as fs;

    /// A file of ones, mapped.
    fn mapped(bytes: usize) -> (tempfile::TempDir, fs::File, MapSlot, MappedBytes) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("weights");
        fs::write(&path, vec![1; bytes]).expect("written");
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).expect("opens");
        let slot = MapSlot::default();
        let map = slot.get(&file, bytes as u64, 0..bytes as u64).expect("mapped");
        (dir, file, slot, map)
    }

    fn sum(map: &[u8]) -> u64 {
        map.iter().map(|b| u64::from(*b)).sum()
    }

    #[test]
    fn pages_that_are_gone_read_as_zeros_and_are_told() {
        let (_dir, file, slot, map) = mapped(100_000);
        assert_eq!(sum(&map), 100_000);
        assert!(!slot.failed());
        file.set_len(50_000).expect("cut");
        // What is left of the last page reads as zeros without a fault.
        assert_eq!(sum(&map), 50_000);
        assert!(slot.failed());
        // Growing it again brings nothing back, nor does another map of the file.
        file.set_len(100_000).expect("grown");
        assert_eq!(sum(&map), 50_000);
        drop(map);
        let again = slot.get(&file, 100_000, 0..10).expect("mapped");
        assert_eq!(sum(&again), 10);
        assert!(slot.failed());
    }

    #[test]
    fn a_file_is_mapped_once_and_only_while_it_is_used() {
        let (_dir, file, slot, map) = mapped(10_000);
        let other = slot.get(&file, 10_000, 5_000..6_000).expect("mapped");
        assert_eq!(other.as_ptr() as usize - map.as_ptr() as usize, 5_000);
        assert!(slot.get(&file, 10_000, 9_000..10_001).is_none());
        drop((map, other));
        assert!(slot.map.lock().expect("free").upgrade().is_none());
        assert!(slot.used());
    }

    #[test]
    fn threads_that_read_while_a_file_is_cut_all_go_on() {
        for round in 0..20 {
            let (_dir, file, slot, map) = mapped(1 << 20);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        while !slot.failed() {
                            std::hint::black_box(sum(&map));
                        }
                    });
                }
                std::thread::sleep(std::time::Duration::from_micros(150 * round));
                file.set_len(4096 * round % 20_000).expect("cut");
            });
        }
    }

    #[test]
    fn only_the_map_that_failed_is_told() {
        let ((_a, file, first, cut), (_b, _, second, whole)) = (mapped(1 << 16), mapped(1 << 16));
        file.set_len(0).expect("cut");
        assert_eq!((sum(&cut), sum(&whole)), (0, 1 << 16));
        assert!(first.failed() && !second.failed());
        // Where a map was watched that is gone, the next one has not failed.
        drop(cut);
        let (_c, _, third, next) = mapped(1 << 16);
        assert_eq!(sum(&next), 1 << 16);
        assert!(first.failed() && !third.failed());
    }
}

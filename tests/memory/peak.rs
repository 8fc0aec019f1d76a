//! The allocator of this binary, which counts the heap of its process.

use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::counting::Counting;

/// Bytes held now.
pub static HELD: AtomicIsize = AtomicIsize::new(0);
/// Bytes held at most.
pub static PEAK: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: isize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

#[global_allocator]
static ALLOCATOR: Counting = Counting(count);

static ALONE: Mutex<()> = Mutex::new(());

/// One test at a time: they share the counters.
pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

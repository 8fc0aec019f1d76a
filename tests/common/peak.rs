//! The allocator of a test that counts the heap of its process.

#[path = "counting.rs"]
mod counting;

use std::sync::atomic::{AtomicIsize, Ordering};

use counting::Counting;

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

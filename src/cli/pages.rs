//! The allocator of the program: the system's, which is told that large blocks may lie on large pages.
//!
//! A conversion makes and drops matrices of tens to hundreds of megabytes for every layer. On pages of 4 KiB the kernel
//! spends about as long handing them out, one fault each, as the processor spends on what is computed in them.

use std::alloc::{GlobalAlloc, Layout, System};

/// Blocks at least this large are worth a system call: two large pages of x86-64 and AArch64 (2 MiB), so that at least one
/// fits whole.
const LARGE: usize = 4 << 20;

/// The system's allocator, with advice on large blocks.
pub struct Advised;

/// Advise the kernel to back a block with large pages. Only advice: nothing depends on whether it is taken.
fn advise(pointer: *mut u8, size: usize) {
    #[cfg(target_os = "linux")]
    if size >= LARGE && !pointer.is_null() {
        let page = rustix::param::page_size();
        let first = pointer.addr() / page * page;
        let start = pointer.with_addr(first);
        // SAFETY: the pages are mapped, since the block was just allocated there, and the advice changes no contents; what
        // else lies on its first and last page may be advised as well as not.
        let _ = unsafe {
            rustix::mm::madvise(start.cast(), pointer.addr() + size - first, rustix::mm::Advice::LinuxHugepage)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (pointer, size, LARGE);
}

// SAFETY: every call goes to the system's allocator unchanged; advice neither allocates nor moves anything.
unsafe impl GlobalAlloc for Advised {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promised.
        let pointer = unsafe { System.alloc(layout) };
        advise(pointer, layout.size());
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promised.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        advise(pointer, layout.size());
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promised.
        let pointer = unsafe { System.realloc(pointer, layout, size) };
        advise(pointer, size);
        pointer
    }
}

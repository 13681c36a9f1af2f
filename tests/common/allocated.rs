//! An allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering::SeqCst};

/// Counts the bytes that are given out.
struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

// SAFETY: everything is the system allocator's; only a number is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let before = LIVE.fetch_add(layout.size() as isize, SeqCst);
        PEAK.fetch_max(before + layout.size() as isize, SeqCst);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, SeqCst);
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `work` adds and gives back, and those that it leaves.
pub fn during<T>(work: impl FnOnce() -> T) -> (isize, isize, T) {
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    let made = work();
    (PEAK.load(SeqCst) - before, LIVE.load(SeqCst) - before, made)
}

//! The program's allocator: large buffers are the system's, on whole cache lines; small ones are mimalloc's where the system
//! has glibc.

use std::alloc::{GlobalAlloc, Layout, System};

/// Of small buffers. glibc has one arena here ([`keep_freed_memory`](super::process::keep_freed_memory)), which all threads lock: two
/// of them tokenized half as fast as one. With several arenas they do not wait, but the freed large buffers of one arena are lost to
/// the others, and a step's peak memory grows by up to a quarter (LOG.md, 2026-11-30).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const SMALL: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
const SMALL: System = System;

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;

/// Buffers from this size on begin at a cache line. Smaller ones are numerous, and alignment would waste memory.
const LARGE: usize = 4096;

/// Bytes before a large buffer that store the address from the system.
const ADDRESS: usize = size_of::<usize>();

/// glibc's large buffers begin 16 bytes after the start of a cache line, so that every 64-byte vector in them touches
/// two lines, and neighbouring rows of a matrix share one. Here they begin at a line; on 2 cores of an AMD EPYC (Zen 4)
/// that made a step's elementwise ops and attention faster by a tenth to a third (LOG.md, 2026-11-29). glibc's own
/// `memalign` uses more memory.
pub struct WholeLines;

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= LINE
}

/// The layout of a large buffer with room for the shift and the address; `None` if no address space is that large.
fn padded(layout: Layout) -> Option<Layout> {
    Layout::from_size_align(layout.size().checked_add(LINE)?, layout.align().max(2 * ADDRESS)).ok()
}

/// The first line that begins after `start`.
///
/// # Safety
/// `start` has a padded layout.
unsafe fn line_after(start: *mut u8) -> *mut u8 {
    // SAFETY: the padded layout has room for a line before the requested buffer.
    unsafe { start.add(LINE - start.addr() % LINE) }
}

/// The first line that begins after `start`, which the system returned for [`padded`]; stores `start` before the line.
///
/// # Safety
/// `start` is null or has a padded layout.
unsafe fn line_of(start: *mut u8) -> *mut u8 {
    if start.is_null() {
        return start;
    }
    // SAFETY: `start` is a multiple of two addresses, so the line begins at least that far after it and at most `LINE`.
    unsafe {
        let line = line_after(start);
        line.sub(ADDRESS).cast::<*mut u8>().write(start);
        line
    }
}

/// The `start` that [`line_of`] was called with.
///
/// # Safety
/// [`line_of`] returned `line`, and it is not null.
unsafe fn start_of(line: *mut u8) -> *mut u8 {
    // SAFETY: promised by the caller.
    unsafe { line.sub(ADDRESS).cast::<*mut u8>().read() }
}

// SAFETY: a buffer is one of `SMALL`, or for large ones a part of one of the system's with the requested size and a
// stricter alignment; the layout alone decides between the two.
unsafe impl GlobalAlloc for WholeLines {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: promised by the caller; the padded layout is not empty.
        unsafe {
            match padded(layout) {
                Some(padded) if is_large(layout) => line_of(System.alloc(padded)),
                _ => SMALL.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        unsafe {
            match padded(layout) {
                Some(padded) if is_large(layout) => line_of(System.alloc_zeroed(padded)),
                _ => SMALL.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, buffer: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller: `buffer` was allocated here with this layout.
        unsafe {
            match padded(layout) {
                Some(padded) if is_large(layout) => System.dealloc(start_of(buffer), padded),
                _ => SMALL.dealloc(buffer, layout),
            }
        }
    }

    unsafe fn realloc(&self, buffer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(resized) = Layout::from_size_align(size, layout.align()) else { return std::ptr::null_mut() };
        // SAFETY: promised by the caller; the content is moved within the system's buffer for `size`, or to another
        // buffer.
        unsafe {
            match (is_large(layout), is_large(resized), padded(layout), padded(resized)) {
                (false, false, ..) => SMALL.realloc(buffer, layout, size),
                (true, true, Some(before), Some(after)) => {
                    let start = start_of(buffer);
                    let shift = buffer.addr() - start.addr();
                    let start = System.realloc(start, before, after.size());
                    if start.is_null() {
                        return start;
                    }
                    // Before `start` is stored, because the content may lie there.
                    line_after(start).copy_from(start.add(shift), layout.size().min(size));
                    line_of(start)
                }
                _ => {
                    let other = self.alloc(resized);
                    if !other.is_null() {
                        other.copy_from_nonoverlapping(buffer, layout.size().min(size));
                        self.dealloc(buffer, layout);
                    }
                    other
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes on both sides of the bound, each grown and shrunk to each other.
    #[test]
    fn large_buffers_begin_at_a_line_and_keep_their_content() {
        let sizes = [1, 100, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE + 3];
        for (align, from, to) in [1, 16, 64].into_iter().flat_map(|a| {
            sizes.into_iter().flat_map(move |from| sizes.into_iter().map(move |to| (a, from, to)))
        }) {
            let layout = Layout::from_size_align(from, align).unwrap();
            // SAFETY: buffers are used within their sizes, and given back with their layouts.
            unsafe {
                let buffer = WholeLines.alloc_zeroed(layout);
                assert!((0..from).all(|i| *buffer.add(i) == 0), "{layout:?}");
                (0..from).for_each(|i| *buffer.add(i) = i as u8);
                let buffer = WholeLines.realloc(buffer, layout, to);
                assert!((0..from.min(to)).all(|i| *buffer.add(i) == i as u8), "{layout:?} to {to}");
                assert!(
                    buffer.addr().is_multiple_of(if to >= LARGE { LINE } else { align }),
                    "{layout:?} to {to}"
                );
                WholeLines.dealloc(buffer, Layout::from_size_align(to, align).unwrap());
            }
        }
    }
}

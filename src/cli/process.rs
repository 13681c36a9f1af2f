//! System calls of the process: its allocator's setting, its end at a closed pipe, its peak memory.

/// Makes glibc keep freed buffers instead of returning each to the system: a tuning step frees and allocates the same
/// few hundred megabytes, and fresh pages cost more than writing them.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets parameters of the allocator, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Ends the process quietly if the reader of its output stops reading, as in `gneiss inspect PATH | head`; with Rust's
/// default setting the process panics.
pub fn end_at_a_closed_pipe() {
    #[cfg(unix)]
    // SAFETY: the default action of a signal, set before any other thread exists.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// The most memory that the process used, bytes; `None` if the system does not report it.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Resets the peak to the memory in use now, as far as the system allows it.
pub fn forget_peak() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim returns free pages of the allocator, and touches no memory in use.
    unsafe {
        libc::malloc_trim(0);
    }
    // Linux: 5 sets VmHWM to the resident memory of now. If that can't be written, the peak is that of the whole
    // process.
    let _refused = std::fs::write("/proc/self/clear_refs", "5");
}

/// The process's own memory, for a benchmark on the CPU.
pub struct ProcessMemory;

impl gneiss::device::PeakMemory for ProcessMemory {
    fn forget(&mut self) {
        forget_peak();
    }

    fn step(&mut self) {}

    fn peak(&self) -> Option<u64> {
        peak_bytes()
    }
}

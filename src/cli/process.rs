//! What the process asks of the system: its allocator's setting, its end at a closed pipe, its peak memory.

/// Tells glibc to keep freed buffers instead of giving each back to the system: a tuning step frees and takes
/// the same few hundred megabytes, and fresh pages cost more than writing them does.
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

/// Ends the process quietly where whoever reads its output stops reading, as `gneiss inspect PATH | head`
/// does; Rust's own setting turns that into a panic.
pub fn end_at_a_closed_pipe() {
    #[cfg(unix)]
    // SAFETY: the default action of a signal, set before any other thread exists.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// The most memory that the process held, bytes; `None` where the system does not tell.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Forgets the peak so far, as far as the system lets it: what is held now stays in it.
pub fn forget_peak() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim gives free pages of the allocator back, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
    // Linux: 5 sets VmHWM to what is resident now. Where that may not be written, the peak is that of the
    // whole process.
    let _refused = std::fs::write("/proc/self/clear_refs", "5");
}

/// The process's own memory, as a benchmark on the CPU reads it.
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

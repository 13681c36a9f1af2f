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

/// Lets this thread's writes to a connection that the client has closed fail. Otherwise their signal would end the process, as
/// [`end_at_a_closed_pipe`] says: the system's call for several buffers at once sends it for connections too.
#[cfg(feature = "serve")]
pub fn survive_closed_connections() {
    #[cfg(unix)]
    // SAFETY: the set is initialized before it is read, and only this thread's mask changes.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGPIPE);
        let status = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        assert_eq!(status, 0, "a valid set of signals can be blocked");
    }
}

/// Cores of the machine, whichever of them the process may use; `None` if the system does not report it.
pub fn online_cores() -> Option<usize> {
    #[cfg(unix)]
    // SAFETY: it reads a number.
    return usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).ok();
    #[cfg(not(unix))]
    None
}

/// Calls `handler` on SIGUSR1, which would end the process otherwise; the first handler stays. It may do no more than set an
/// atomic.
pub fn at_user_signal(handler: fn()) {
    static HANDLER: std::sync::OnceLock<fn()> = std::sync::OnceLock::new();
    #[cfg(unix)]
    extern "C" fn call(_signal: libc::c_int) {
        if let Some(handler) = HANDLER.get() {
            handler();
        }
    }
    let _already_there = HANDLER.set(handler);
    #[cfg(unix)]
    // SAFETY: the struct is zeroed, which is a valid value of all its fields; `call` reads a value that was set before and calls
    // a function that only sets an atomic, both of which a signal handler may do. Calls of the system that it interrupts go on.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = call as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
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

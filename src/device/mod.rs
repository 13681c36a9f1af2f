//! The memory of a device, and the errors of a device that has too little.

mod cgroup;
mod choose;
#[cfg(test)]
pub(crate) mod faults;
mod memory;

pub use choose::{Chosen, DeviceChoice, cuda_devices, kind, open};
pub use memory::{DeviceMemory, PeakMemory, name};

use crate::{Error, Result};
use candle_core::Device;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Vector instructions of this CPU that gneiss uses, found when the program runs, by the operating system's names; the
/// fastest one for products of bf16 is the last.
pub fn cpu_instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let general = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
    ];
    #[cfg(target_arch = "aarch64")]
    let general = [("neon", true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let general: [(&str, bool); 0] = [];
    let general = general.into_iter().filter(|(_, has)| *has).map(|(name, _)| name);
    general.chain(crate::ops::bf16::Isa::all().iter().map(|isa| isa.name())).collect()
}

/// Processes that share the device of this one, itself included.
static SHARERS: AtomicUsize = AtomicUsize::new(1);

/// Says that so many processes use the device of this one: [`free_memory`] is then the part of each.
pub fn share(processes: usize) {
    SHARERS.store(processes.max(1), Ordering::Relaxed);
}

/// Free memory of `device`, bytes, this process's part if several [`share`] it; `None` if the system does not report it. On
/// CUDA it is the driver's figure, which
/// includes the limits of containers and MIG slices, plus the unused memory that the allocator holds. On the CPU it is
/// what Linux calls available, or what is left of the limits of the process's control groups if that is less.
///
/// # Errors
/// Returns an error if the device can't be asked.
pub fn free_memory(device: &Device) -> Result<Option<usize>> {
    Ok(free_on(device)?.map(|bytes| bytes / SHARERS.load(Ordering::Relaxed)))
}

/// Free memory of a device for all processes that use it.
fn free_on(device: &Device) -> Result<Option<usize>> {
    match device {
        Device::Cpu => Ok(cgroup::least(available_on_the_host(), cgroup::free())),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Some(crate::ops::gpu::cuda::memory(cuda)?.0)),
        #[cfg(feature = "metal")]
        Device::Metal(metal) => {
            let device = metal.metal_device();
            let advised = device.recommended_max_working_set_size();
            Ok(Some(advised.saturating_sub(device.current_allocated_size())))
        }
        #[allow(unreachable_patterns)]
        _ => Ok(None),
    }
}

fn available_on_the_host() -> Option<usize> {
    available_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// `MemAvailable` of Linux's `/proc/meminfo`, bytes.
fn available_in(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib << 10)
}

/// Whether the error says that a device's memory is used up. candle passes on the message of the driver's library as
/// text.
pub fn is_out_of_memory(error: &Error) -> bool {
    // In this order: CUDA's driver, cuBLAS, a Metal buffer without room, a Metal command that ran out of memory.
    const SIGNS: [&str; 4] = [
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "Failed to create metal resource: Buffer",
        "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    ];
    matches!(error, Error::OutOfMemory { .. }) || says(error, &SIGNS)
}

/// The messages of cuBLAS for a kernel that can't be loaded for lack of memory, and for other failures.
fn may_be_out_of_memory(error: &Error) -> bool {
    says(error, &["CUBLAS_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_EXECUTION_FAILED"])
}

fn says(error: &Error, signs: &[&str]) -> bool {
    let Error::Candle(error) = error else { return false };
    let text = error.to_string();
    signs.iter().any(|sign| text.contains(sign))
}

/// Below this number of free bytes a failure of cuBLAS is treated as lack of memory: the code of its kernels takes some
/// tens of megabytes for each library, and the driver reserves some more.
const SCARCE: usize = 200 << 20;

/// Recognises the errors of a device that has too little memory, and frees memory for another attempt.
pub(crate) struct Shortage {
    device: Device,
    /// Free memory without the unused memory that the allocator holds.
    free: fn(&Device) -> Option<usize>,
    /// Whether an error of unclear cause was already treated as lack of memory.
    guessed: bool,
}

impl Shortage {
    pub(crate) fn new(device: &Device) -> Self {
        Self { device: device.clone(), free: free_now, guessed: false }
    }

    /// Whether too little memory caused `error`: the device says so, or cuBLAS failed while almost no memory was free,
    /// which counts only once. Then the unused memory that the allocator holds is freed for the next attempt.
    pub(crate) fn caused(&mut self, error: &Error) -> bool {
        let scarce = || (self.free)(&self.device).is_some_and(|bytes| bytes < SCARCE);
        let guess = !self.guessed && may_be_out_of_memory(error) && scarce();
        let found = guess || is_out_of_memory(error);
        self.guessed |= guess;
        if found {
            // If the device fails here as well, the next attempt fails and reports it.
            let _ = free_memory(&self.device);
        }
        found
    }
}

fn free_now(device: &Device) -> Option<usize> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => crate::ops::gpu::cuda::free_now(cuda).ok(),
        _ => None,
    }
}

/// Fails in tests that ask for it ([`faults`]), before `rows` rows run through `what`.
#[inline]
pub(crate) fn before(_what: Work, _rows: usize) -> Result<()> {
    #[cfg(test)]
    faults::before(_what, _rows)?;
    Ok(())
}

/// What needs memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// A pass through the model's layers.
    Pass,
    /// Logits of hidden states.
    Logits,
    /// A cache of keys and values.
    Cache,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn candle(text: &str) -> Error {
        Error::Candle(candle_core::Error::Msg(text.into()))
    }

    #[test]
    fn out_of_memory_is_known_by_its_text() {
        let cuda =
            candle_core::Error::Cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        assert!(is_out_of_memory(&Error::Candle(cuda.bt())));
        assert!(is_out_of_memory(&candle("CublasError(CUBLAS_STATUS_ALLOC_FAILED)")));
        assert!(is_out_of_memory(&candle("Metal error Failed to create metal resource: Buffer")));
        let insufficient = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)";
        assert!(is_out_of_memory(&candle(insufficient)));
        assert!(!is_out_of_memory(&candle("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"...\")")));
        assert!(!is_out_of_memory(&Error::Invalid("CUDA_ERROR_OUT_OF_MEMORY".into())));
    }

    #[test]
    fn a_failure_of_cublas_counts_once_where_memory_is_scarce() {
        let with = |free: fn(&Device) -> Option<usize>| Shortage { free, ..Shortage::new(&Device::Cpu) };
        for text in ["CUBLAS_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_EXECUTION_FAILED"] {
            let error = candle(text);
            let mut scarce = with(|_| Some(100 << 20));
            assert!(scarce.caused(&error) && !scarce.caused(&error), "{text}");
            // What is surely memory still counts.
            assert!(scarce.caused(&candle("CUDA_ERROR_OUT_OF_MEMORY")));
            assert!(!with(|_| Some(300 << 20)).caused(&error) && !with(|_| None).caused(&error), "{text}");
        }
        let mut scarce = with(|_| Some(0));
        assert!(!scarce.caused(&candle("CUBLAS_STATUS_NOT_SUPPORTED")));
    }

    #[test]
    fn free_memory_is_what_linux_calls_available() {
        let text = "MemTotal:       24684084 kB\nMemFree:        21530104 kB\nMemAvailable:   22622332 kB\n";
        assert_eq!(available_in(text), Some(22_622_332 * 1024));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free_memory(&Device::Cpu).unwrap().unwrap() > 1_000_000);
        }
    }
}

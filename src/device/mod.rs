//! What a device has of memory, and which errors say that it has too little.

mod cgroup;
mod choose;
#[cfg(test)]
pub(crate) mod faults;
mod memory;

pub use choose::{Chosen, DeviceChoice, kind, open};
pub use memory::{DeviceMemory, PeakMemory, name};

use crate::{Error, Result};
use candle_core::Device;

/// Memory that `device` has free, bytes; `None` where the system does not say. On CUDA it is what the driver says, so that
/// the limits of containers and of MIG's slices are those; memory that the allocator holds without use counts. On the CPU
/// it is what Linux calls available, or what the process's control groups leave of their limits where that is less.
///
/// # Errors
/// The device's.
pub fn free_memory(device: &Device) -> Result<Option<usize>> {
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

/// Whether a device said that its memory is used up. candle passes on what the driver's library says, as text.
pub fn is_out_of_memory(error: &Error) -> bool {
    // In turn: CUDA's driver, cuBLAS, a Metal buffer that there was no room for, a Metal command that ran into it.
    const SIGNS: [&str; 4] = [
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "Failed to create metal resource: Buffer",
        "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    ];
    matches!(error, Error::OutOfMemory { .. }) || says(error, &SIGNS)
}

/// What cuBLAS says of a kernel that can't be loaded for lack of memory, and of other failures.
fn may_be_out_of_memory(error: &Error) -> bool {
    says(error, &["CUBLAS_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_EXECUTION_FAILED"])
}

fn says(error: &Error, signs: &[&str]) -> bool {
    let Error::Candle(error) = error else { return false };
    let text = error.to_string();
    signs.iter().any(|sign| text.contains(sign))
}

/// Under so many free bytes a failure of cuBLAS is taken for lack of memory: its kernels' code is some tens of megabytes a
/// library, and the driver keeps some more for itself.
const SCARCE: usize = 200 << 20;

/// Tells the errors of a device that has too little memory, and makes room for another try.
pub(crate) struct Shortage {
    device: Device,
    /// Free memory as it is, what the allocator holds not counted.
    free: fn(&Device) -> Option<usize>,
    /// Whether an error that need not be one of memory was taken for one.
    guessed: bool,
}

impl Shortage {
    pub(crate) fn on(device: &Device) -> Self {
        Self { device: device.clone(), free: free_now, guessed: false }
    }

    /// Whether too little memory caused `error`: the device says so, or cuBLAS failed while next to none was free, which
    /// counts once. What the allocator holds without use is given back then, so that what is tried next may have it.
    pub(crate) fn caused(&mut self, error: &Error) -> bool {
        let scarce = || (self.free)(&self.device).is_some_and(|bytes| bytes < SCARCE);
        let guess = !self.guessed && may_be_out_of_memory(error) && scarce();
        let found = guess || is_out_of_memory(error);
        self.guessed |= guess;
        if found {
            // A device that fails here too fails what is tried next, which reports it.
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

/// Fails in tests that ask for it ([`faults`]), before `rows` rows go through `what`.
#[inline]
pub(crate) fn before(_what: Work, _rows: usize) -> Result<()> {
    #[cfg(test)]
    faults::before(_what, _rows)?;
    Ok(())
}

/// What needs memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// A pass through the model's blocks.
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
        let with = |free: fn(&Device) -> Option<usize>| Shortage { free, ..Shortage::on(&Device::Cpu) };
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

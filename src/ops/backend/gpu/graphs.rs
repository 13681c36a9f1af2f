//! Graphs: work of a CUDA device that is recorded once and launched as often as needed, by one call for all of its kernels, copies
//! and allocations (CUDA C++ Programming Guide, "CUDA Graphs"). **They have not run on a GPU**, so they are off unless
//! [`VARIABLE`] asks for them.
//!
//! A launch repeats every address and every size. The work may therefore depend on nothing but what is in the buffers that it
//! reads: it uploads nothing, downloads nothing and waits for nothing. Memory that it allocates it frees again; it is there
//! while the graph runs.

// Without CUDA nothing is recorded.
#![cfg_attr(not(feature = "cuda"), allow(dead_code, unused_variables))]

use crate::{Error, Result};
use candle_core::Device;

/// The environment variable that asks for graphs: 1 for yes, 0 for no.
pub(crate) const VARIABLE: &str = "GNEISS_CUDA_GRAPHS";

/// Whether the user asks for graphs.
///
/// # Errors
/// Returns an error if the variable has another value than 0 or 1.
pub(crate) fn are_requested() -> Result<bool> {
    let Some(value) = std::env::var_os(VARIABLE) else { return Ok(false) };
    is_yes(&value.to_string_lossy())
}

fn is_yes(value: &str) -> Result<bool> {
    match value {
        "1" => Ok(true),
        "" | "0" => Ok(false),
        other => {
            Err(Error::Invalid(format!("{VARIABLE}: expected 0 or 1 in the environment, found {other:?}")))
        }
    }
}

/// Why `device` can't record graphs; `None` if it can.
pub(crate) fn obstacle(device: &Device) -> Option<&'static str> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::graph::obstacle(device),
        _ => Some("only NVIDIA GPUs have them"),
    }
}

/// Recorded work of a device. What it reads and writes has to live as long as it is launched.
pub(crate) enum Graph {
    /// Of a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::graph::StreamGraph),
}

impl Graph {
    /// Enqueues the recorded work.
    ///
    /// # Errors
    /// Returns an error if there is too little memory for its allocations, or the device fails.
    pub(crate) fn launch(&self) -> Result<()> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref graph) => graph.launch(),
        }
    }
}

/// Records what `work` enqueues on `device`; nothing of it runs. `work` has run once before with the same shapes
/// ([`with_kept_arguments`]), so that the code of all kernels is loaded.
///
/// # Errors
/// Returns an error if `work` does, or if it makes a call that can't be recorded. Nothing is being recorded any more then.
pub(crate) fn capture(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::graph::capture(device, work).map(Graph::Cuda),
        other => Err(Error::Invalid(format!("graphs: expected a CUDA device, found {other:?}"))),
    }
}

/// Runs `f`. Shapes and strides that candle uploads for its kernels stay on the device, for [`capture`] of the same work later,
/// which can't upload.
pub(crate) fn with_kept_arguments<R>(device: &Device, f: impl FnOnce() -> R) -> R {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let _kept = device.enable_cuda_graph_htod_cache();
            f()
        }
        _ => f(),
    }
}

/// Gives the memory of graphs that were dropped back to the device.
///
/// # Errors
/// Returns an error if the device fails.
pub(crate) fn free_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::graph::free_memory(device),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_0_or_1() {
        assert!(is_yes("1").unwrap() && !is_yes("0").unwrap() && !is_yes("").unwrap());
        let message = is_yes("yes").unwrap_err().to_string();
        assert!(message.contains(VARIABLE) && message.contains("\"yes\""), "{message}");
    }

    #[test]
    fn the_cpu_records_nothing() {
        assert!(obstacle(&Device::Cpu).is_some());
        assert!(capture(&Device::Cpu, || Ok(())).is_err());
    }
}

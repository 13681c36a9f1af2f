//! What the ops run on: the CPU in f32 and f64 ([`cpu`]), the CPU's products of bf16 ([`bf16`]) and those of few rows in f32
//! ([`few_rows`]), and GPUs ([`gpu`]).

pub(crate) mod bf16;
pub(crate) mod cpu;
pub(crate) mod few_rows;
pub(crate) mod gpu;

use candle_core::{DeviceLocation, Tensor};

/// The code that runs an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The CPU's own code.
    Cpu,
    /// A GPU's kernel or library.
    Kernel,
}

/// The route of an op whose activations are `x`.
pub(crate) fn route(x: &Tensor) -> Route {
    #[cfg(test)]
    if gpu::emulated::is_on() {
        return Route::Kernel;
    }
    device_route(x.device().location())
}

/// The route of all ops on a device.
pub(crate) fn device_route(device: DeviceLocation) -> Route {
    match device {
        DeviceLocation::Cpu => Route::Cpu,
        _ => Route::Kernel,
    }
}

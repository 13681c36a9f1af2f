//! Opening a GPU. A problem that keeps this build from running on it is reported here, and not in the middle of a step.

use super::blas;
use crate::{Error, Result};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys as driver};
use candle_core::{CudaDevice, DType, Device, Tensor};
use std::ffi::c_int;

/// Least compute capability with machine code here: 8.0, Ampere.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// The target that candle's own kernels were compiled for, from build.rs.
const CANDLE_TARGET: &str = env!("GNEISS_CANDLE_CUDA_TARGET");

unsafe extern "C" {
    /// Of libcuda, which this build is linked with; cudarc does not declare it.
    fn cuDriverGetVersion(version: *mut c_int) -> driver::CUresult;
}

/// Opens GPU `index` with one stream for the whole process, and prepares it: buffers carry no events, freed memory stays
/// in the device's pool instead of going back to the driver at every synchronisation, and cuBLAS sums in f32 in every
/// algorithm. Returns a warning if the device has no memory pools.
///
/// # Errors
/// Returns an error if the driver is older than this build's toolkit, there is no GPU of that number, the GPU is older than
/// Ampere or candle's kernels were not compiled for it, there is too little free memory, or a call of the driver fails.
pub(crate) fn open(index: usize) -> Result<(Device, Option<String>)> {
    check_driver()?;
    let device =
        Device::new_cuda_with_stream(index).map_err(|error| not_opened(index, &error.to_string()))?;
    let Device::Cuda(cuda) = &device else { unreachable!("it was opened as CUDA") };
    let warning = prepare(cuda)?;
    Ok((device, warning))
}

/// candle's kernels are PTX, which a driver refuses if the toolkit that made it is newer than itself; so does cuBLAS of a
/// newer major version.
fn check_driver() -> Result<()> {
    let mut found = 0;
    // SAFETY: it writes an int.
    let status = unsafe { cuDriverGetVersion(&raw mut found) };
    let expected = driver::CUDA_VERSION as c_int;
    if status != driver::CUresult::CUDA_SUCCESS || found == 0 || found >= expected {
        return Ok(());
    }
    let text = |version: c_int| format!("{}.{}", version / 1000, version % 1000 / 10);
    Err(Error::Invalid(format!(
        "CUDA: expected a driver for CUDA {} or newer, the toolkit of this build, found one for CUDA {}; hint: update the \
         driver, or build with a toolkit of the version that nvidia-smi shows",
        text(expected),
        text(found)
    )))
}

/// Why there is no GPU `index`, by what the driver said.
fn not_opened(index: usize, said: &str) -> Error {
    if said.contains("CUDA_ERROR_NO_DEVICE") {
        return Error::Invalid(format!(
            "model.device: expected an NVIDIA GPU, found none: {said}; hint: nvidia-smi lists those that the driver \
             knows, and CUDA_VISIBLE_DEVICES hides some; --device cpu works without one"
        ));
    }
    if said.contains("CUDA_ERROR_INVALID_DEVICE") {
        let last = result::device::get_count().unwrap_or(1).max(1) - 1;
        return Error::Invalid(format!(
            "model.device: expected one of cuda:0 to cuda:{last}, found cuda:{index}: {said}"
        ));
    }
    failed(said)
}

/// What the driver said, as an error that names the cause if it is memory.
fn failed(said: &str) -> Error {
    if said.contains("OUT_OF_MEMORY") || said.contains("ALLOC_FAILED") {
        return Error::OutOfMemory { problem: said.to_owned() };
    }
    Error::Candle(candle_core::Error::msg(format!("opening the GPU: {said}")))
}

fn prepare(device: &CudaDevice) -> Result<Option<String>> {
    let found = super::compute_capability(device);
    if found < LEAST_CAPABILITY {
        return Err(Error::Invalid(format!(
            "model.device: expected a GPU of compute capability {}.{} (Ampere) or newer, found {}.{}; hint: --device cpu",
            LEAST_CAPABILITY.0, LEAST_CAPABILITY.1, found.0, found.1
        )));
    }
    // SAFETY: the device was made with one stream, which all work of this process goes through.
    unsafe { device.disable_event_tracking() };
    blas::prepare(device).map_err(|error| failed(&error.to_string()))?;
    let candles = format!("candle's kernels for compute capability {CANDLE_TARGET}");
    run_a_candle_kernel(device).map_err(|error| not_loaded(&candles, found, &error.to_string()))?;
    let stream = device.cuda_stream();
    if !stream.context().has_async_alloc() {
        return Ok(Some(
            "this GPU has no memory pools (some virtual GPUs and old Jetsons): each tensor that is freed waits for \
             the device, so every command is several times slower"
                .into(),
        ));
    }
    let mut keep_all = u64::MAX;
    let threshold = driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the context is alive, the pool is its device's, and the attribute is a u64.
    unsafe {
        let pool = result::device::get_mem_pool(stream.context().cu_device()).w()?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut keep_all).cast()).w()?;
    }
    Ok(None)
}

/// Runs one of candle's own kernels, so that a build for another GPU is found here.
fn run_a_candle_kernel(device: &CudaDevice) -> candle_core::Result<()> {
    let device = Device::Cuda(device.clone());
    let two = Tensor::ones(1, DType::F32, &device)?.affine(2.0, 0.0)?.to_vec1::<f32>()?;
    if two != [2.0] {
        candle_core::bail!("expected 1 * 2 = 2 of the device, found {two:?}");
    }
    Ok(())
}

/// Why `code` can't be loaded on a GPU of compute capability `found`, by what the driver said.
pub(super) fn not_loaded(code: &str, (major, minor): (i32, i32), said: &str) -> Error {
    if said.contains("UNSUPPORTED_PTX_VERSION") {
        return Error::Invalid(format!(
            "CUDA: expected a driver that is at least as new as the CUDA toolkit of this build, found an older one: \
             {said} ({code}); hint: update the driver, or build with a toolkit of the version that nvidia-smi shows"
        ));
    }
    let other_target = ["NO_BINARY_FOR_GPU", "INVALID_PTX", "INVALID_IMAGE", "INVALID_SOURCE"];
    if other_target.iter().any(|sign| said.contains(sign)) {
        return Error::Invalid(format!(
            "CUDA: expected kernels that run on this GPU of compute capability {major}.{minor}, found {code}: {said}; \
             hint: build with CUDA_COMPUTE_CAP=80, as `make cuda` does"
        ));
    }
    failed(&format!("{code}: {said}"))
}

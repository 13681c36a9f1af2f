//! CUDA: launches of the embedded kernels; [`start`] opens a GPU, matrix products are in [`blas`].

pub(super) mod blas;
pub(super) mod graph;
mod lt;
mod start;

use super::{Kernel, KernelParameters};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::driver::{result, sys as driver};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Storage, Tensor};
use half::{bf16, f16};
use start::not_loaded;
pub(crate) use start::open;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

// `fatbin(file, element)`: machine code of each kernel file for each dtype, from build.rs.
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Shared memory that a block may use without setting an attribute.
const PLAIN_SHARED_BYTES: usize = 48 * 1024;

/// Functions by device, kernel and dtype; modules by device, file and dtype.
#[derive(Default)]
struct LoadedKernels {
    functions: HashMap<(DeviceId, &'static str, DType), CudaFunction>,
    modules: HashMap<(DeviceId, &'static str, DType), Arc<CudaModule>>,
}

/// A kernel's parameter struct, passed by value.
#[repr(transparent)]
struct ByValue<P>(P);
// SAFETY: `KernelParameters` promises a plain struct of 4-byte fields.
unsafe impl<P: KernelParameters> DeviceRepr for ByValue<P> {}

/// Major and minor compute capability; (0, 0) if the driver does not report it.
pub(crate) fn compute_capability(device: &CudaDevice) -> (i32, i32) {
    device.cuda_stream().context().compute_capability().unwrap_or((0, 0))
}

/// Free and total memory of the device, bytes. The pool's unused memory is returned to the driver first, which waits for the
/// device.
pub(crate) fn memory(device: &CudaDevice) -> Result<(usize, usize)> {
    let stream = device.cuda_stream();
    if stream.context().has_async_alloc() {
        stream.synchronize().w()?;
        // SAFETY: the context is alive, and the pool is its device's.
        unsafe {
            let pool = result::device::get_mem_pool(stream.context().cu_device()).w()?;
            result::mem_pool::trim_to(pool, 0).w()?;
        }
    }
    Ok(stream.context().mem_get_info().w()?)
}

/// Free memory of the device, bytes, without the pool's unused memory.
pub(crate) fn free_now(device: &CudaDevice) -> Result<usize> {
    Ok(device.cuda_stream().context().mem_get_info().w()?.0)
}

fn function(device: &CudaDevice, kernel: &Kernel, element: DType) -> Result<CudaFunction> {
    static LOADED: OnceLock<Mutex<LoadedKernels>> = OnceLock::new();
    let mut loaded =
        LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(function) = loaded.functions.get(&(device.id(), kernel.name, element)) {
        return Ok(function.clone());
    }
    let key = (device.id(), kernel.file, element);
    let module = match loaded.modules.get(&key) {
        Some(module) => module.clone(),
        None => {
            let Some(code) = fatbin(kernel.file, element) else {
                let found = format!("kernels/{}.cu for {element:?}", kernel.file);
                return Err(Error::Invalid(format!(
                    "{}: expected compiled code, found none of {found}",
                    kernel.name
                )));
            };
            let module = device.cuda_stream().context().load_module(Ptx::from_binary(code.to_vec()));
            let module = module.w().map_err(|error| {
                let code = format!("kernels/{}.cu for {element:?}", kernel.file);
                not_loaded(&code, compute_capability(device), &error.to_string())
            })?;
            loaded.modules.insert(key, module.clone());
            module
        }
    };
    let function = module.load_function(kernel.name).w()?;
    if kernel.shared > PLAIN_SHARED_BYTES {
        let most = driver::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, kernel.shared as i32).w()?;
    }
    loaded.functions.insert((device.id(), kernel.name, element), function.clone());
    Ok(function)
}

/// Address of a contiguous tensor's first element.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Invalid(format!("expected a tensor on CUDA, found {:?}", tensor.device())));
    };
    let stream = storage.device().cuda_stream();
    // The address outlives the guards: nothing is tracked by events, and all work is on one stream.
    let base = match storage.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        DType::U32 => storage.as_cuda_slice::<u32>()?.device_ptr(&stream).0,
        other => return Err(Error::Invalid(format!("expected f32, bf16, f16 or u32, found {other:?}"))),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// # Safety
/// As for [`super::launch`].
pub(super) unsafe fn launch<P: KernelParameters>(
    device: &CudaDevice,
    kernel: &Kernel,
    element: DType,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    // Loading a module does not bind the context to this thread, and an op that works in place made no allocation that would.
    device.cuda_stream().context().bind_to_thread().w()?;
    let function = function(device, kernel, element)?;
    let addresses = buffers.iter().map(|b| address(b)).collect::<Result<Vec<u64>>>()?;
    let parameters = ByValue(*parameters);
    let stream = device.cuda_stream();
    let mut arguments = stream.launch_builder(&function);
    for address in &addresses {
        arguments.arg(address);
    }
    arguments.arg(&parameters);
    let [x, y, z] = kernel.grid.map(super::uint);
    let config = LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (super::uint(kernel.threads), 1, 1),
        shared_mem_bytes: super::uint(kernel.shared),
    };
    // SAFETY: the caller's promise; the buffers live on this stream.
    unsafe { arguments.launch(config) }.w()?;
    Ok(())
}

//! Launching the kernels of `kernels/`: by CUDA, by Metal, or in tests by the emulator.
//!
//! A kernel file is compiled once per dtype of the activations; see `kernels/README.md`. Buffers are
//! contiguous tensors of one device, parameters a `#[repr(C)]` struct of 4-byte fields.

// A build for the CPU alone launches nothing.
#![cfg_attr(not(any(test, feature = "cuda", feature = "metal")), allow(dead_code, unused_variables))]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod emulated;
#[cfg(feature = "metal")]
mod metal;
pub(crate) mod products;
#[cfg(feature = "cuda")]
mod upload;

use crate::{Error, Result};
use candle_core::{DType, Device, DeviceLocation, Shape, Tensor};

/// One launch: which kernel, and how many threads of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    /// Name of the file in `kernels/`, without its ending.
    pub(crate) file: &'static str,
    pub(crate) name: &'static str,
    /// Blocks.
    pub(crate) grid: [usize; 3],
    /// Threads of a block, a multiple of 32.
    pub(crate) threads: usize,
    /// Bytes of shared memory beyond what the kernel declares.
    pub(crate) shared: usize,
}

impl Kernel {
    /// A kernel with as many blocks as `blocks` in one dimension.
    pub(crate) fn new(file: &'static str, name: &'static str, blocks: usize, threads: usize) -> Self {
        Self { file, name, grid: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// A kernel's last argument.
///
/// # Safety
/// The type is `#[repr(C)]`, of 4-byte fields alone, in the order of the struct in the kernel file.
pub(crate) unsafe trait Parameters: Copy {}

/// Declares a kernel's parameters: the struct of the same name in the kernel file.
macro_rules! parameters {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ident),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == 4 * [$(stringify!($field)),*].len());
        // SAFETY: repr(C), and the assertion above holds each field to 4 bytes.
        unsafe impl $crate::ops::gpu::Parameters for $name {}
    };
}
pub(crate) use parameters;

/// What runs an op on a tensor's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The CPU's own code.
    Cpu,
    /// A kernel of `kernels/`.
    Kernel,
    /// Plain candle ops: a dtype that the kernels are not compiled for.
    Reference,
}

/// The route of an op whose activations are `x`.
pub(crate) fn route(x: &Tensor) -> Route {
    #[cfg(test)]
    if emulated::is_on() {
        return Route::Kernel;
    }
    route_on(x.device().location(), x.dtype())
}

/// The route of an op on such a device whose activations have this dtype.
pub(crate) fn route_on(device: DeviceLocation, dtype: DType) -> Route {
    match (device, dtype) {
        (DeviceLocation::Cpu, _) => Route::Cpu,
        (_, DType::F32 | DType::BF16 | DType::F16) => Route::Kernel,
        _ => Route::Reference,
    }
}

/// Whether kernels may use `mma.sync` on 16-bit floats: CUDA from compute capability 8.0 on.
pub(crate) fn has_tensor_cores(x: &Tensor) -> bool {
    match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::compute_capability(device) >= (8, 0),
        #[cfg(test)]
        Device::Cpu => emulated::is_on(),
        _ => false,
    }
}

/// `list` as a tensor of u32 on `device`. On CUDA the copy is from pinned memory that is not used again before it is done;
/// the call returns before that.
///
/// # Errors
/// The device's.
pub(crate) fn upload(list: &[u32], device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    UPLOADS.set(UPLOADS.get() + 1);
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => upload::upload(device, list),
        _ => Ok(Tensor::new(list, device)?),
    }
}

#[cfg(test)]
thread_local! {
    static UPLOADS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Calls of [`upload`] on this thread so far.
#[cfg(test)]
pub(crate) fn uploads() -> usize {
    UPLOADS.get()
}

/// `tensor` on `device`. Where the GPU reads the host's pages itself a copy from memory that is freed at once is a race: there
/// this waits for it.
///
/// # Errors
/// The device's.
pub(crate) fn to_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let moved = tensor.to_device(device)?;
    #[cfg(feature = "cuda")]
    if let (Device::Cpu, Device::Cuda(device)) = (tensor.device(), device) {
        upload::settle(device)?;
    }
    Ok(moved)
}

/// A tensor whose elements a kernel is going to write, on the device of `like`.
///
/// In the emulator it is filled with NaN, so that an element left unwritten is seen.
pub(crate) fn empty(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    if emulated::is_on() {
        return emulated::poisoned(shape.into(), dtype);
    }
    let shape: Shape = shape.into();
    if shape.elem_count() == 0 {
        return Ok(super::no_rows(1, dtype, like.device())?.reshape(shape)?);
    }
    // SAFETY: every bit pattern is a value of the dtypes used here, and the kernel that the tensor is made for
    // writes all of it.
    Ok(unsafe { Tensor::empty(shape, dtype, like.device()) }?)
}

/// 1 where kernels may access rows of these widths in `tensors` 16 bytes at a time: widths are multiples of 8
/// elements, and so are the places where views begin (allocations themselves are aligned).
pub(crate) fn aligned(widths: &[usize], tensors: &[&Tensor]) -> u32 {
    let begins = |t: &&Tensor| {
        let (_, layout) = t.storage_and_layout();
        layout.start_offset() % 8 == 0
    };
    u32::from(widths.iter().all(|w| w % 8 == 0) && tensors.iter().all(begins))
}

/// Runs a kernel, compiled for activations of dtype `element`, over `buffers` in the order of its arguments. On
/// a GPU the call returns before the kernel has run.
///
/// # Errors
/// A buffer that is not contiguous; the device's.
pub(crate) fn launch<P: Parameters>(
    kernel: &Kernel,
    element: DType,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    debug_assert!(kernel.threads.is_multiple_of(32), "{kernel:?}");
    if let Some(buffer) = buffers.iter().find(|b| !b.is_contiguous()) {
        return Err(Error::Shape {
            op: kernel.name,
            expected: "contiguous tensors".into(),
            found: format!("strides {:?} of {:?}", buffer.stride(), buffer.dims()),
        });
    }
    if kernel.grid.contains(&0) {
        return Ok(());
    }
    match buffers[0].device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::launch(device, kernel, element, buffers, parameters),
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::launch(device, kernel, element, buffers, parameters),
        #[cfg(test)]
        Device::Cpu if emulated::is_on() => emulated::launch(kernel, element, buffers, parameters),
        other => {
            let problem =
                format!("{}: expected a GPU that this build has kernels for, found {other:?}", kernel.name);
            Err(Error::Invalid(problem))
        }
    }
}

/// As a kernel's `uint`; sizes beyond it can't be met by any device's memory.
pub(crate) fn uint(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// `scale * a b + bias + add`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// [m, k].
    pub(crate) a: &'a Tensor,
    /// [k, n], or [n, k] if `transposed`.
    pub(crate) b: &'a Tensor,
    pub(crate) transposed: bool,
    pub(crate) scale: f64,
    /// `[n]`, added to every row of the scaled product.
    pub(crate) bias: Option<&'a Tensor>,
    /// [m, n].
    pub(crate) add: Option<&'a Tensor>,
}

/// Whether a product on the device of `x` adds a matrix without a pass of its own: by cuBLASLt.
pub(crate) fn adds_in_products(x: &Tensor) -> bool {
    match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => route(x) == Route::Kernel,
        #[cfg(test)]
        Device::Cpu => emulated::adds_in_products(),
        _ => false,
    }
}

/// The product [m, n]; sums of 16-bit products are f32.
///
/// # Errors
/// The device's.
pub(crate) fn matmul(product: &Product) -> Result<Tensor> {
    let Product { a, b, transposed, scale, bias, add } = *product;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = a.device() {
        return cuda::blas::matmul(device, product);
    }
    let y = if transposed { a.matmul(&b.t()?)? } else { a.matmul(b)? };
    let y = if scale == 1.0 { y } else { (y * scale)? };
    let y = match bias {
        Some(bias) if y.dims()[0] > 0 => y.broadcast_add(bias)?,
        _ => y,
    };
    Ok(match add {
        Some(add) => (y + add)?,
        None => y,
    })
}

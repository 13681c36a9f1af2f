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

/// `tensor` on `device`.
///
/// # Errors
/// The device's.
pub(crate) fn to_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let moved = tensor.to_device(device)?;
    if tensor.device().is_cpu() {
        settle(device)?;
    }
    Ok(moved)
}

/// Waits for copies to `device` from memory that is about to be freed, if the GPU reads the host's pages itself: there such a
/// copy is a race.
///
/// # Errors
/// The device's.
pub(crate) fn settle(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => upload::settle(device),
        _ => Ok(()),
    }
}

/// Rows that [`empty`] takes memory for: of large matrices a multiple of 256. Steps have other numbers of rows each, and
/// an allocator that meets few sizes finds the memory that the step before gave back.
pub(crate) fn allocated_rows(rows: usize) -> usize {
    const MULTIPLE: usize = 256;
    // Of fewer rows the rest would be more than an eighth, and their matrices are small.
    if rows > 8 * MULTIPLE { rows.next_multiple_of(MULTIPLE) } else { rows }
}

/// A tensor whose elements a kernel is going to write, on the device of `like`. It is contiguous; a large matrix is the
/// leading rows of one with [`allocated_rows`].
///
/// In the emulator it is filled with NaN, so that an element left unwritten is seen.
pub(crate) fn empty(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    let shape: Shape = shape.into();
    if let [rows, columns] = *shape.dims()
        && rows < allocated_rows(rows)
    {
        return Ok(allocate((allocated_rows(rows), columns).into(), dtype, like)?.narrow(0, 0, rows)?);
    }
    allocate(shape, dtype, like)
}

fn allocate(shape: Shape, dtype: DType, like: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    if emulated::is_on() {
        return emulated::poisoned(shape, dtype);
    }
    if shape.elem_count() == 0 {
        return Ok(crate::ops::no_rows(1, dtype, like.device())?.reshape(shape)?);
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

/// Threads of a block for `tasks` equal tasks, of which each thread does one at a time and a block at most 256: a multiple of
/// 32 that leaves the fewest threads without a task in the last round, the most threads where several do.
pub(crate) fn balanced_threads(tasks: usize) -> usize {
    const MOST: usize = 256;
    if tasks <= MOST {
        return tasks.max(1).next_multiple_of(32);
    }
    let idle = |threads: &usize| tasks.next_multiple_of(*threads) - tasks;
    // Under 128 threads a block has too few loads on their way.
    (128..=MOST).rev().step_by(32).min_by_key(idle).unwrap_or(MOST)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_rounds_the_rows_of_large_matrices_up() -> Result<()> {
        assert_eq!([1, 100, 2048, 2049, 8166, 8192].map(allocated_rows), [1, 100, 2048, 2304, 8192, 8192]);
        let like = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        emulated::emulate(0, || {
            let matrix = empty((2100, 3), DType::F32, &like)?;
            assert!(matrix.is_contiguous() && matrix.dims() == [2100, 3]);
            let (storage, _) = matrix.storage_and_layout();
            let candle_core::Storage::Cpu(candle_core::CpuStorage::F32(values)) = &*storage else {
                panic!("a matrix on the CPU in f32")
            };
            assert_eq!(values.len(), 2304 * 3);
            Ok(())
        })
    }

    #[test]
    fn balanced_threads_leave_few_without_a_task() {
        // 8b's rope: 40 heads of 8 tasks; its swiglu: 12,800 columns of 8.
        assert_eq!([1, 100, 256, 320, 1600].map(balanced_threads), [32, 128, 256, 160, 160]);
        for tasks in 1..3000 {
            let threads = balanced_threads(tasks);
            assert!(threads.is_multiple_of(32) && (32..=256).contains(&threads), "{tasks}: {threads}");
            assert!(tasks.next_multiple_of(threads) <= tasks.next_multiple_of(256), "{tasks}: {threads}");
        }
    }
}

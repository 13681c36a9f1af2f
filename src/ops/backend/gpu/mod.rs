//! Launching the kernels of `kernels/` by CUDA, by Metal, or in tests by the emulator.
//!
//! A kernel file is compiled once per dtype of the activations; see `kernels/README.md`. Buffers are
//! contiguous tensors of one device, parameters a `#[repr(C)]` struct of 4-byte fields.

// A build for the CPU alone launches nothing.
#![cfg_attr(not(any(test, feature = "cuda", feature = "metal")), allow(dead_code, unused_variables))]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod emulated;
pub(crate) mod graphs;
#[cfg(feature = "metal")]
mod metal;
pub(crate) mod products;
#[cfg(feature = "cuda")]
mod upload;

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use products::ProductDtype;

/// One launch of a kernel: its name and its numbers of blocks and threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    /// Name of the file in `kernels/`, without its ending.
    pub(crate) file: &'static str,
    pub(crate) name: &'static str,
    /// Blocks.
    pub(crate) grid: [usize; 3],
    /// Threads of a block, a multiple of 32.
    pub(crate) threads: usize,
    /// Bytes of shared memory in addition to the kernel's own declarations.
    pub(crate) shared: usize,
}

impl Kernel {
    /// A launch of `blocks` blocks in one dimension.
    pub(crate) fn new(file: &'static str, name: &'static str, blocks: usize, threads: usize) -> Self {
        Self { file, name, grid: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// A kernel's last argument.
///
/// # Safety
/// The type is `#[repr(C)]`, of 4-byte fields alone, in the order of the struct in the kernel file.
pub(crate) unsafe trait KernelParameters: Copy {}

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
        unsafe impl $crate::ops::gpu::KernelParameters for $name {}
    };
}
pub(crate) use parameters;

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

/// `list` as a tensor of u32 on `device`. On CUDA the call returns before the copy is done; the copy is from pinned memory,
/// which is not used again before.
pub(crate) fn upload(list: &[u32], device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    UPLOADS.set(UPLOADS.get() + 1);
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => upload::upload(device, list),
        _ => Ok(Tensor::new(list, device)?),
    }
}

/// Writes `list` to `buffer` of u32, of as many elements. On CUDA as [`upload`].
pub(crate) fn write(buffer: &Tensor, list: &[u32]) -> Result<()> {
    if buffer.elem_count() != list.len() || !buffer.is_contiguous() {
        return Err(Error::shape(
            "write",
            format!("{} adjacent numbers", list.len()),
            format!("{:?}", buffer.layout()),
        ));
    }
    #[cfg(test)]
    WRITES.set(WRITES.get() + 1);
    match buffer.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => upload::write(device, buffer, list),
        device => Ok(buffer.slice_set(&Tensor::new(list, device)?, 0, 0)?),
    }
}

#[cfg(test)]
thread_local! {
    static UPLOADS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    static WRITES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Calls of [`upload`] on this thread so far.
#[cfg(test)]
pub(crate) fn uploads() -> usize {
    UPLOADS.get()
}

/// Calls of [`write`] on this thread so far.
#[cfg(test)]
pub(crate) fn writes() -> usize {
    WRITES.get()
}

/// `tensor` on `device`.
pub(crate) fn to_device(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let moved = tensor.to_device(device)?;
    if tensor.device().is_cpu() {
        settle(device)?;
    }
    Ok(moved)
}

/// Waits for copies to `device` from memory that is about to be freed, if the GPU reads the host's pages itself: on such a GPU
/// the copy would race with the free.
pub(crate) fn settle(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => upload::settle(device),
        _ => Ok(()),
    }
}

/// Rows for which [`empty`] allocates memory: a multiple of 256 for large matrices. The number of rows differs from step to
/// step, and an allocator that is asked for few sizes can reuse the memory that the last step freed.
pub(crate) fn allocated_rows(rows: usize) -> usize {
    const MULTIPLE: usize = 256;
    // With fewer rows the additional rows could be more than an eighth of the matrix, and such matrices are small.
    if rows > 8 * MULTIPLE { rows.next_multiple_of(MULTIPLE) } else { rows }
}

/// A contiguous tensor on the device of `like`, whose elements a kernel is going to write. A large matrix is the leading rows of
/// one with [`allocated_rows`].
///
/// In the emulator it is filled with NaN, so that a test sees an element that was not written.
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
    match like.device() {
        Device::Cpu => Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?),
        // SAFETY: the memory is the GPU's: until it is written it holds unspecified bits, which are a value of each dtype used here.
        device => Ok(unsafe { Tensor::empty(shape, dtype, device) }?),
    }
}

/// 1 if kernels may access rows of these widths in `tensors` 16 bytes at a time, else 0: widths are multiples of 8 elements, and
/// so are the offsets at which views begin (allocations themselves are aligned).
pub(crate) fn aligned(widths: &[usize], tensors: &[&Tensor]) -> u32 {
    let is_aligned = |t: &&Tensor| {
        let (_, layout) = t.storage_and_layout();
        layout.start_offset() % 8 == 0
    };
    u32::from(widths.iter().all(|w| w % 8 == 0) && tensors.iter().all(is_aligned))
}

/// Returns an error if one of `tensors` has another dtype than the kernel of `op` reads.
pub(crate) fn check_dtype(op: &'static str, tensors: &[&Tensor], dtype: DType) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.dtype() != dtype) {
        None => Ok(()),
        Some(other) => {
            let found = format!("{:?} of shape {:?}", other.dtype(), other.dims());
            Err(Error::shape(op, format!("{dtype:?}"), found))
        }
    }
}

/// Runs a kernel, compiled for activations of dtype `element`, over `buffers` in the order of its arguments. On a GPU the call
/// returns before the kernel has run.
///
/// # Errors
/// Returns an error if there is no kernel for `element`, a buffer is not contiguous, or a device operation fails.
///
/// # Safety
/// The buffers have the dtypes that the kernel declares, and every element that the kernel accesses with these parameters and
/// with the indices in the buffers. Nothing else accesses the elements that it writes while it runs; on a GPU nothing does, since
/// all work of a device is in one queue.
pub(crate) unsafe fn launch<P: KernelParameters>(
    kernel: &Kernel,
    element: DType,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    debug_assert!(kernel.threads.is_multiple_of(32), "{kernel:?}");
    if !matches!(element, DType::F32 | DType::BF16 | DType::F16) {
        let expected = "activations in f32, bf16 or f16 on a GPU";
        return Err(Error::shape(kernel.name, expected, format!("{element:?}")));
    }
    if let Some(buffer) = buffers.iter().find(|b| !b.is_contiguous()) {
        return Err(Error::shape(
            kernel.name,
            "contiguous tensors",
            format!("strides {:?} of {:?}", buffer.stride(), buffer.dims()),
        ));
    }
    if kernel.grid.contains(&0) {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    match buffers[0].device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => unsafe { cuda::launch(device, kernel, element, buffers, parameters) },
        #[cfg(feature = "metal")]
        Device::Metal(device) => unsafe { metal::launch(device, kernel, element, buffers, parameters) },
        #[cfg(test)]
        Device::Cpu if emulated::is_on() => unsafe { emulated::launch(kernel, element, buffers, parameters) },
        other => {
            let problem =
                format!("{}: expected a GPU that this build has kernels for, found {other:?}", kernel.name);
            Err(Error::Invalid(problem))
        }
    }
}

/// Threads of a block for `tasks` equal tasks, of which each thread does one at a time: a multiple of 32, at most 256, that
/// leaves the fewest threads without a task in the last round, and the largest such number.
pub(crate) fn balanced_threads(tasks: usize) -> usize {
    const MOST: usize = 256;
    if tasks <= MOST {
        return tasks.max(1).next_multiple_of(32);
    }
    let idle = |threads: &usize| tasks.next_multiple_of(*threads) - tasks;
    // A block of fewer than 128 threads has too few loads in flight.
    (128..=MOST).rev().step_by(32).min_by_key(idle).unwrap_or(MOST)
}

/// `n` as a kernel's `uint`; larger sizes do not fit in any device's memory.
pub(crate) fn uint(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// `scale * a b + bias + add`.
#[derive(Clone, Copy)]
pub(crate) struct MatrixProduct<'a> {
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

/// Whether a product on the device of `x` adds a matrix without another pass over memory: that of cuBLASLt does.
pub(crate) fn adds_in_products(x: &Tensor) -> bool {
    match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => true,
        #[cfg(test)]
        Device::Cpu => emulated::adds_in_products(),
        _ => false,
    }
}

/// The product [m, n]; sums of 16-bit products are f32.
///
/// # Errors
/// Returns an error if the operands are not f32, bf16 or f16, or a device operation fails.
pub(crate) fn matmul(product: &MatrixProduct) -> Result<Tensor> {
    let MatrixProduct { a, b, transposed, scale, bias, add } = *product;
    ProductDtype::new(a.dtype())?;
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
    fn empty_rounds_up_the_rows_of_large_matrices() -> Result<()> {
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
    fn ops_refuse_f64_on_a_gpu_by_name() -> Result<()> {
        let x = Tensor::zeros((2, 6), DType::F64, &Device::Cpu)?;
        let layer = crate::ops::Linear::new(Tensor::zeros((3, 6), DType::F64, &Device::Cpu)?, None)?;
        emulated::emulate(0, || {
            let error = crate::ops::swiglu::forward(&x).unwrap_err().to_string();
            assert_eq!(error, "swiglu_forward: expected activations in f32, bf16 or f16 on a GPU, found F64");
            let error = layer.forward(&x).unwrap_err().to_string();
            assert_eq!(error, "linear: expected f32, bf16 or f16, found F64");
        });
        Ok(())
    }

    #[test]
    fn balanced_threads_leaves_few_threads_without_a_task() {
        // 8b's rope: 40 heads of 8 tasks; its swiglu: 12,800 columns of 8.
        assert_eq!([1, 100, 256, 320, 1600].map(balanced_threads), [32, 128, 256, 160, 160]);
        for tasks in 1..3000 {
            let threads = balanced_threads(tasks);
            assert!(threads.is_multiple_of(32) && (32..=256).contains(&threads), "{tasks}: {threads}");
            assert!(tasks.next_multiple_of(threads) <= tasks.next_multiple_of(256), "{tasks}: {threads}");
        }
    }
}

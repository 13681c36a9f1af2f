//! Copies from the host to a CUDA device that do not depend on memory that is freed.
//!
//! `cuMemcpyHtoDAsync` from pageable memory returns when the driver has staged it, but on machines whose GPU reads the host's
//! pages itself (Grace Hopper, GB200, GB10) there is nothing to stage, and the call may return before the copy.

use crate::{Error, Result};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, DevicePtrMut, PinnedHostSlice, result, sys,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// Least indices of a pinned buffer: those of a step of 8,192 rows are some 30,000.
const LEAST: usize = 1 << 16;

/// Pinned memory, and the event after the last copy from it.
///
/// [`PinnedHostSlice`] has an event of its own for which its drop waits, but cudarc records it only while it tracks events,
/// which is not needed with one stream ([`super::cuda::open`]). So buffers are not dropped: each is used again once `copied` is
/// complete.
struct PinnedStaging {
    memory: PinnedHostSlice<u32>,
    copied: CudaEvent,
}

static STAGING: Mutex<Vec<PinnedStaging>> = Mutex::new(Vec::new());

impl PinnedStaging {
    fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        // SAFETY: the memory is written before it is read.
        let memory = unsafe { context.alloc_pinned(len.next_power_of_two().max(LEAST)) }.w()?;
        Ok(Self { memory, copied: context.new_event(None).w()? })
    }

    /// A buffer of at least `len` indices from which nothing is being copied.
    fn take(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        let mut all = STAGING.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |s: &PinnedStaging| {
            s.memory.context() == context && s.memory.len() >= len && s.copied.is_complete()
        };
        match all.iter().position(free) {
            Some(index) => Ok(all.swap_remove(index)),
            None => Self::new(context, len),
        }
    }
}

/// `list` as a tensor on `device`.
pub(super) fn upload(device: &CudaDevice, list: &[u32]) -> Result<Tensor> {
    let stream = device.cuda_stream();
    // SAFETY: all of it is written by the copy below.
    let mut uploaded = unsafe { stream.alloc::<u32>(list.len()) }.w()?;
    let to = uploaded.device_ptr_mut(&stream).0;
    copy(device, to, list)?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(uploaded, device.clone()));
    Ok(Tensor::from_storage(storage, list.len(), BackpropOp::none(), false))
}

/// Writes `list` to `buffer` of u32, which is contiguous and has as many elements.
pub(super) fn write(device: &CudaDevice, buffer: &Tensor, list: &[u32]) -> Result<()> {
    if buffer.dtype() != DType::U32 {
        return Err(Error::shape("write", "u32", format!("{:?}", buffer.dtype())));
    }
    copy(device, super::cuda::address(buffer)?, list)
}

/// Enqueues a copy of `list` to `to`, where the device has room for it.
fn copy(device: &CudaDevice, to: sys::CUdeviceptr, list: &[u32]) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    context.bind_to_thread().w()?;
    let mut staging = PinnedStaging::take(context, list.len())?;
    staging.memory.as_mut_slice().w()?[..list.len()].copy_from_slice(list);
    let from = &staging.memory.as_slice().w()?[..list.len()];
    // SAFETY: both are alive and of this size; the source is not written before its event, or else until the stream is idle.
    let copied = unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) };
    if let Err(error) = copied.and_then(|()| staging.copied.record(&stream)) {
        stream.synchronize().w()?;
        return Err(error).w().map_err(Into::into);
    }
    STAGING.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
    Ok(())
}

/// Waits for copies to `device` from memory that is about to be freed, if the driver does not stage them.
pub(super) fn settle(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let host_pages =
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
    if stream.context().attribute(host_pages).w()? == 1 {
        stream.synchronize().w()?;
    }
    Ok(())
}

//! Capture of the device's stream and launch of the graph (CUDA driver API, "Stream Management", "Graph Management").

use crate::{Error, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};

/// As [`crate::ops::gpu::graphs::Graph`].
pub(crate) struct StreamGraph(CudaGraph);

impl StreamGraph {
    pub(in crate::ops::backend::gpu) fn launch(&self) -> Result<()> {
        Ok(self.0.launch().w()?)
    }
}

/// As [`crate::ops::gpu::graphs::obstacle`].
pub(in crate::ops::backend::gpu) fn obstacle(device: &CudaDevice) -> Option<&'static str> {
    // Without pools an allocation is a call that no capture allows.
    (!device.cuda_stream().context().has_async_alloc()).then_some("this GPU has no memory pools")
}

/// As [`crate::ops::gpu::graphs::capture`].
pub(in crate::ops::backend::gpu) fn capture(
    device: &CudaDevice,
    work: impl FnOnce() -> Result<()>,
) -> Result<StreamGraph> {
    let stream = device.cuda_stream();
    let context = stream.context();
    // Calls of other threads neither fail because of the capture nor end it. They use other streams or none: the thread that
    // generates is the only one that enqueues work meanwhile.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let worked = work();
    // If the capture became invalid, tensors could not be freed in it. cudarc keeps that error for its next call, which is the
    // end of the capture and has to be made.
    let freed = context.check_err();
    let ended = stream.end_capture(CUgraphInstantiate_flags(0));
    worked?;
    let graph = ended.w()?;
    freed.w()?;
    graph.map(StreamGraph).ok_or_else(|| Error::Invalid("graphs: expected recorded work, found none".into()))
}

/// As [`crate::ops::gpu::graphs::free_memory`].
pub(in crate::ops::backend::gpu) fn free_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    // The memory of a graph that still runs would stay.
    stream.synchronize().w()?;
    // SAFETY: the device exists, and the call takes nothing else.
    unsafe { sys::cuDeviceGraphMemTrim(stream.context().cu_device()) }.result().w()?;
    Ok(())
}

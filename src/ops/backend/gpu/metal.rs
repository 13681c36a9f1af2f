//! Metal: the text of `kernels/` compiled at run time, once per file and dtype, and launched on candle's command
//! encoder, whose hazard barriers order it with candle's own kernels.

use super::{Kernel, KernelParameters};
use crate::{Error, Result};
use candle_core::{DType, MetalDevice, Storage, Tensor};
use candle_metal_kernels::metal::{ComputePipeline, Library};
use objc2_metal::MTLSize;
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

/// The dialect, and the kernel files that Metal compiles (`*_mma.cu` are CUDA's alone).
const DIALECT: &str = include_str!("../../../../kernels/metal.h");
const FILES: [(&str, &str); 13] = [
    ("adamw", include_str!("../../../../kernels/adamw.cu")),
    ("attention", include_str!("../../../../kernels/attention.cu")),
    ("conv", include_str!("../../../../kernels/conv.cu")),
    ("cross_entropy", include_str!("../../../../kernels/cross_entropy.cu")),
    ("distillation", include_str!("../../../../kernels/distillation.cu")),
    ("embed", include_str!("../../../../kernels/embed.cu")),
    ("experts", include_str!("../../../../kernels/experts.cu")),
    ("gated_norm", include_str!("../../../../kernels/gated_norm.cu")),
    ("rms_norm", include_str!("../../../../kernels/rms_norm.cu")),
    ("rope", include_str!("../../../../kernels/rope.cu")),
    ("rows", include_str!("../../../../kernels/rows.cu")),
    ("ssd", include_str!("../../../../kernels/ssd.cu")),
    ("swiglu", include_str!("../../../../kernels/swiglu.cu")),
];

/// By device, name and dtype.
type Key = (candle_core::metal_backend::DeviceId, &'static str, DType);

#[derive(Default)]
struct LoadedPipelines {
    pipelines: HashMap<Key, ComputePipeline>,
    libraries: HashMap<Key, Library>,
}

fn element_name(element: DType) -> Result<&'static str> {
    match element {
        DType::F32 => Ok("ELEMENT_F32"),
        DType::BF16 => Ok("ELEMENT_BF16"),
        DType::F16 => Ok("ELEMENT_F16"),
        other => Err(Error::Invalid(format!("expected f32, bf16 or f16, found {other:?}"))),
    }
}

fn library(device: &MetalDevice, kernel: &Kernel, element: DType) -> Result<Library> {
    let Some((_, text)) = FILES.iter().find(|(file, _)| *file == kernel.file) else {
        return Err(Error::Invalid(format!("{}: expected a kernel file for Metal, found none", kernel.name)));
    };
    let source = format!("#define {}\n{DIALECT}\n{text}", element_name(element)?);
    Ok(device.metal_device().new_library_with_source(&source, None).map_err(candle_core::Error::wrap)?)
}

fn pipeline(device: &MetalDevice, kernel: &Kernel, element: DType) -> Result<ComputePipeline> {
    static LOADED: OnceLock<Mutex<LoadedPipelines>> = OnceLock::new();
    let mut loaded =
        LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let key = (device.id(), kernel.name, element);
    if let Some(pipeline) = loaded.pipelines.get(&key) {
        return Ok(pipeline.clone());
    }
    let file_key = (device.id(), kernel.file, element);
    if !loaded.libraries.contains_key(&file_key) {
        let library = library(device, kernel, element)?;
        loaded.libraries.insert(file_key, library);
    }
    let function =
        loaded.libraries[&file_key].get_function(kernel.name, None).map_err(candle_core::Error::wrap)?;
    let pipeline = device
        .metal_device()
        .new_compute_pipeline_state_with_function(&function)
        .map_err(candle_core::Error::wrap)?;
    if pipeline.max_total_threads_per_threadgroup() < kernel.threads {
        let most = pipeline.max_total_threads_per_threadgroup();
        let problem = format!(
            "{}: expected room for {} threads in a threadgroup, found {most}",
            kernel.name, kernel.threads
        );
        return Err(Error::Invalid(problem));
    }
    loaded.pipelines.insert(key, pipeline.clone());
    Ok(pipeline)
}

/// # Safety
/// As for [`super::launch`].
pub(super) unsafe fn launch<P: KernelParameters>(
    device: &MetalDevice,
    kernel: &Kernel,
    element: DType,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    debug_assert_eq!(
        kernel.shared, 0,
        "{}: only CUDA's kernels have shared memory by the launch",
        kernel.name
    );
    let pipeline = pipeline(device, kernel, element)?;
    let guard = device.command_encoder()?;
    guard.set_compute_pipeline_state(&pipeline);
    let encoder: &candle_metal_kernels::metal::ComputeCommandEncoder = guard.as_ref();
    for (i, tensor) in buffers.iter().enumerate() {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Metal(storage) = &*storage else {
            return Err(Error::Invalid(format!("expected a tensor on Metal, found {:?}", tensor.device())));
        };
        let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
        // Any of the buffers may be written: an output waits for all earlier commands.
        encoder.set_output_buffer(i, Some(storage.buffer()), offset);
    }
    encoder.set_bytes(buffers.len(), parameters);
    let [width, height, depth] = kernel.grid;
    encoder.dispatch_thread_groups(
        MTLSize { width, height, depth },
        MTLSize { width: kernel.threads, height: 1, depth: 1 },
    );
    Ok(())
}

//! The memory of a device that is in use, and the device's name.

use candle_core::Device;

/// Measures the most memory that a case uses.
pub trait PeakMemory {
    /// Resets the peak to the memory that is in use now.
    fn forget(&mut self);
    /// Must be called at the end of a step, when the device is idle.
    fn step(&mut self);
    /// The most memory in use since [`PeakMemory::forget`], bytes; `None` if the system does not report it.
    fn peak(&self) -> Option<u64>;
}

/// Memory of a GPU.
///
/// * CUDA: the high-water mark of the stream-ordered pool that candle allocates from, which counts the tensors' memory
///   as `torch.cuda.max_memory_allocated` does. If the driver has no such pools, total minus free memory.
/// * Metal: the memory that the device has allocated for this process at the end of a step.
pub struct DeviceMemory {
    device: Device,
    sampled: Option<u64>,
    in_use: Option<u64>,
}

impl DeviceMemory {
    /// For a device that is not the CPU.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), sampled: None, in_use: None }
    }

    /// The most memory of a CUDA device in use at the end of a step, total minus free memory, bytes. It includes the
    /// context, unused memory of the pool, cuBLAS's workspaces and other processes.
    pub fn in_use(&self) -> Option<u64> {
        self.in_use
    }
}

impl PeakMemory for DeviceMemory {
    fn forget(&mut self) {
        (self.sampled, self.in_use) = (None, None);
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            cuda::forget(device);
        }
    }

    fn step(&mut self) {
        match &self.device {
            Device::Cpu => {}
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                self.in_use = self.in_use.max(cuda::in_use(device));
                self.sampled = self.sampled.max(cuda::high(device));
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {}
            #[cfg(feature = "metal")]
            Device::Metal(device) => {
                self.sampled = self.sampled.max(Some(device.current_allocated_size() as u64));
            }
            #[cfg(not(feature = "metal"))]
            Device::Metal(_) => {}
        }
    }

    fn peak(&self) -> Option<u64> {
        self.sampled.or(self.in_use)
    }
}

/// The device's own name, such as `NVIDIA H100 80GB HBM3`, or the processor's name with the number of threads.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu => {
            let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
            let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
            format!("{model}, {} threads", rayon::current_num_threads())
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::name(device).unwrap_or_else(|| "NVIDIA GPU".into()),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => "NVIDIA GPU".into(),
        #[cfg(feature = "metal")]
        Device::Metal(device) => device.architecture_name(),
        #[cfg(not(feature = "metal"))]
        Device::Metal(_) => "Apple GPU".into(),
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! A missing figure of the driver does not end a benchmark: every function returns `None` in that case.

    use candle_core::CudaDevice;
    use candle_core::cuda_backend::cudarc::driver::{result, sys};

    const HIGH: sys::CUmemPool_attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;

    pub(super) fn name(device: &CudaDevice) -> Option<String> {
        device.cuda_stream().context().name().ok()
    }

    pub(super) fn in_use(device: &CudaDevice) -> Option<u64> {
        let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
        Some((total - free) as u64)
    }

    /// The pool that the device's allocations come from.
    fn pool(device: &CudaDevice) -> Option<sys::CUmemoryPool> {
        // SAFETY: candle got the device from the driver and has a context of it.
        unsafe { result::device::get_mem_pool(device.cuda_stream().context().cu_device()) }.ok()
    }

    pub(super) fn high(device: &CudaDevice) -> Option<u64> {
        let mut bytes = 0u64;
        // SAFETY: the pool is the device's own; the attribute is a 64-bit number.
        unsafe { result::mem_pool::get_attribute(pool(device)?, HIGH, (&raw mut bytes).cast()) }.ok()?;
        (bytes > 0).then_some(bytes)
    }

    pub(super) fn forget(device: &CudaDevice) {
        let mut zero = 0u64;
        if let Some(pool) = pool(device) {
            // SAFETY: as in `high`; zero is the one value that the attribute may be set to.
            let _unsupported = unsafe { result::mem_pool::set_attribute(pool, HIGH, (&raw mut zero).cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_a_name() {
        let name = name(&Device::Cpu);
        assert!(name.ends_with(" threads") && name.len() > 12, "{name}");
    }
}

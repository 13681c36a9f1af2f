//! The choice of the device.

use crate::{Error, Result};
use candle_core::Device;
use candle_core::utils::{cuda_is_available, metal_is_available};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The device that a model runs on: `auto`, `cpu`, `cuda[:n]` or `metal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first GPU that this build can use, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this index; `cuda` is `cuda:0`.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Cpu => f.pad("cpu"),
            Self::Cuda(0) => f.pad("cuda"),
            Self::Cuda(index) => f.pad(&format!("cuda:{index}")),
            Self::Metal => f.pad("metal"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    /// Returns [`Error::Invalid`] if `name` is no device.
    fn from_str(name: &str) -> Result<Self> {
        let index = name.strip_prefix("cuda:").map(str::parse);
        match (name, index) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            ("metal", _) => Ok(Self::Metal),
            (_, Some(Ok(index))) => Ok(Self::Cuda(index)),
            _ => Err(Error::Invalid(format!(
                "expected auto, cpu, cuda, cuda:N or metal, found {name:?}; N is the GPU's index from 0"
            ))),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        device.to_string()
    }
}

/// A device, and a warning for its user.
#[derive(Debug)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// Why it is not the expected device, or what is slow on it.
    pub warnings: Vec<String>,
}

/// Opens the device that `choice` names. `auto` is a GPU if this build can use one; if none of the machine's GPUs
/// works, it is the CPU with a warning.
///
/// # Errors
/// Returns an error if this build or this machine does not have the device.
pub fn open(choice: DeviceChoice) -> Result<Chosen> {
    let open_cuda: Option<OpenGpu> = if cuda_is_available() { Some(&cuda) } else { None };
    let open_metal: Option<OpenGpu> = if metal_is_available() { Some(&metal) } else { None };
    choose(choice, open_cuda, open_metal)
}

/// Opens the GPU of a number, in a build that has its backend.
type OpenGpu<'a> = &'a dyn Fn(usize) -> Result<Chosen>;

fn choose(choice: DeviceChoice, cuda: Option<OpenGpu>, metal: Option<OpenGpu>) -> Result<Chosen> {
    let absent = |name: &str| {
        Error::Invalid(format!(
            "model.device: expected a device of this build, found {name}; build with --features {name}"
        ))
    };
    let mut warnings = Vec::new();
    match choice {
        DeviceChoice::Cpu => {}
        DeviceChoice::Cuda(index) => return cuda.ok_or_else(|| absent("cuda"))?(index),
        DeviceChoice::Metal => return metal.ok_or_else(|| absent("metal"))?(0),
        DeviceChoice::Auto => {
            for (name, open) in [("cuda", cuda), ("metal", metal)] {
                match open.map(|open| open(0)) {
                    Some(Ok(chosen)) => return Ok(chosen),
                    Some(Err(error)) => warnings.push(format!(
                        "the CPU is used: this build can use {name}, but no GPU of this machine works: {error}; hint: \
                         --device cpu chooses the CPU without this warning"
                    )),
                    None => {}
                }
            }
        }
    }
    Ok(Chosen { device: Device::Cpu, warnings })
}

/// The device's name on the command line.
pub fn kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// NVIDIA GPUs that this process sees; 0 without a driver or in another build.
pub fn cuda_devices() -> usize {
    #[cfg(feature = "cuda")]
    {
        use candle_core::cuda_backend::cudarc::driver::CudaContext;
        CudaContext::device_count().ok().and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
    }
    #[cfg(not(feature = "cuda"))]
    0
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Chosen> {
    let (device, warning) = crate::ops::gpu::cuda::open(index)?;
    Ok(Chosen { device, warnings: warning.into_iter().collect() })
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> Result<Chosen> {
    Ok(Chosen { device: Device::new_cuda(index)?, warnings: Vec::new() })
}

fn metal(index: usize) -> Result<Chosen> {
    Ok(Chosen { device: Device::new_metal(index)?, warnings: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(_: usize) -> Result<Chosen> {
        Err(Error::Invalid("CUDA_ERROR_NO_DEVICE".into()))
    }

    fn working(index: usize) -> Result<Chosen> {
        Ok(Chosen { device: Device::Cpu, warnings: vec![format!("GPU {index}")] })
    }

    #[test]
    fn choose_auto_takes_the_cpu_with_a_warning_if_the_gpu_does_not_work() {
        let chosen = choose(DeviceChoice::Auto, Some(&broken), None).unwrap();
        assert!(chosen.device.is_cpu());
        let [warning] = &chosen.warnings[..] else { panic!("{:?}", chosen.warnings) };
        assert!(warning.contains("CUDA_ERROR_NO_DEVICE") && warning.contains("--device cpu"), "{warning}");
        assert_eq!(choose(DeviceChoice::Auto, Some(&working), None).unwrap().warnings, ["GPU 0"]);
        assert!(choose(DeviceChoice::Auto, None, None).unwrap().warnings.is_empty());
        assert_eq!(choose(DeviceChoice::Auto, Some(&broken), Some(&working)).unwrap().warnings, ["GPU 0"]);
    }

    #[test]
    fn choose_a_named_gpu_fails_if_it_does_not_work() {
        let message = |choice, cuda| choose(choice, cuda, None).unwrap_err().to_string();
        assert_eq!(message(DeviceChoice::Cuda(0), Some(&broken)), "CUDA_ERROR_NO_DEVICE");
        assert!(message(DeviceChoice::Cuda(0), None).contains("--features cuda"));
        assert!(message(DeviceChoice::Metal, Some(&working)).contains("--features metal"));
        let second = choose(DeviceChoice::Cuda(1), Some(&working), None).unwrap();
        assert_eq!(second.warnings, ["GPU 1"]);
        assert!(choose(DeviceChoice::Cpu, Some(&working), None).unwrap().warnings.is_empty());
    }
}

//! The matrix product as fast as the device makes it: what a step's floating-point operations are held
//! against.

use crate::Result;
use crate::ops::Linear;
use crate::ops::packed::Isa;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::time::Instant;

/// Rows of the square matrices on the CPU: 2 x 16 MB in f32, past the caches, 0.1 s on two cores with
/// AVX-512.
const CPU_SIZE: usize = 2048;

/// Rows of the square matrices on a GPU: 1.1 TFLOP a product, so that an H100 takes over a millisecond for it
/// and the launch is lost in that.
const GPU_SIZE: usize = 8192;

/// Times that are taken, of which the best counts: this many, or fewer once they took a second.
const TRIES: usize = 8;

/// Times that are taken however long they take.
const LEAST: usize = 3;

/// The fastest square matrix product that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MatmulPeak {
    /// Rows and columns of both matrices.
    pub size: usize,
    /// Their dtype.
    pub dtype: &'static str,
    /// What makes it, by the name of the CPU's feature, where that is chosen as gneiss starts: in bf16 on the CPU.
    pub instructions: Option<&'static str>,
    /// Floating-point operations a second.
    pub flops_per_second: f64,
}

impl MatmulPeak {
    /// Measures it on `device` in `dtype`: candle's own product, and on a CPU in bf16 that of [`Linear`].
    ///
    /// # Errors
    /// The device's.
    pub fn measure(device: &Device, dtype: DType) -> Result<Self> {
        // On a GPU several products are queued behind each other, as in a step.
        let (size, queued) = if device.is_cpu() { (CPU_SIZE, 1) } else { (GPU_SIZE, 4) };
        let matrix = || Tensor::randn(0f32, 1.0, (size, size), device)?.to_dtype(dtype);
        // Three weights by turns, so that none is in a cache because it was the last one.
        let (x, weights) = (matrix()?, [matrix()?, matrix()?, matrix()?]);
        let on_bf16 = device.is_cpu() && dtype == DType::BF16;
        let packed = match on_bf16 {
            true => weights
                .iter()
                .map(|w| Linear::new(w.clone(), None)?.pack(DType::F32))
                .collect::<Result<_>>()?,
            false => Vec::new(),
        };
        let (mut best, begun) = (f64::INFINITY, Instant::now());
        // The first time is the warm-up.
        for i in 0..=TRIES {
            if i > LEAST && begun.elapsed().as_secs() >= 1 {
                break;
            }
            device.synchronize()?;
            let started = Instant::now();
            for j in 0..queued {
                let next = (i + j) % weights.len();
                match packed.get(next) {
                    Some(layer) => layer.forward(&x)?,
                    None => x.matmul(&weights[next])?,
                };
            }
            device.synchronize()?;
            let seconds = started.elapsed().as_secs_f64() / queued as f64;
            if i > 0 {
                best = best.min(seconds);
            }
        }
        let instructions = Isa::best().filter(|_| on_bf16).map(Isa::name);
        let flops_per_second = 2.0 * (size as f64).powi(3) / best;
        Ok(Self { size, dtype: dtype.as_str(), instructions, flops_per_second })
    }
}

//! The fastest matrix product on the device, to which the floating-point operations of a step are compared. On a CPU it
//! is the best of several times. A GPU slows down at its power limit within the first tenth of a second, so there it is
//! the rate over two seconds.

use super::canary::{Canary, Reading};
use super::data_sheet;
use super::sustained::seconds_per_call;
use crate::Result;
use crate::ops::Linear;
use crate::ops::bf16::Isa;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::time::Instant;

/// Rows of the square matrices on the CPU: 2 x 16 MB in f32, larger than the caches, 0.1 s on two cores with AVX-512.
const CPU_SIZE: usize = 2048;

/// Rows of the square matrices on a GPU: 1.1 TFLOP per product, so that an H100 needs over a millisecond and the launch
/// does not matter.
const GPU_SIZE: usize = 8192;

/// Number of times, of which the best counts; fewer if they took a second.
const TRIES: usize = 8;

/// Least number of times.
const LEAST: usize = 3;

/// Time for which a GPU's products are repeated, s.
const GPU_SECONDS: f64 = 2.0;

/// The rate of a square matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MatmulPeak {
    /// Rows and columns of both matrices.
    pub size: usize,
    /// Their dtype.
    pub dtype: &'static str,
    /// The CPU feature with which it is computed, if gneiss chooses one at the start: in bf16 on the CPU.
    pub instructions: Option<&'static str>,
    /// Floating-point operations per second.
    pub flops_per_second: f64,
    /// Time for which that rate was measured, s; `None` on a CPU, where the best of several times counts.
    pub sustained_seconds: Option<f64>,
    /// Floating-point operations per second by the card's data sheet, without sparsity; `None` for other devices.
    pub data_sheet_flops_per_second: Option<f64>,
    /// Whether the machine was quiet during at least one of the timed products; otherwise the device may be faster.
    /// `None` without a canary.
    pub quiet: Option<bool>,
}

impl MatmulPeak {
    /// Measures it on `device` in `dtype`: candle's own product, or that of [`Linear`] on a CPU in bf16. `canary` is
    /// for a CPU.
    pub fn measure(device: &Device, dtype: DType, canary: Option<&Canary>) -> Result<Self> {
        let size = if device.is_cpu() { CPU_SIZE } else { GPU_SIZE };
        let matrix = || Tensor::randn(0f32, 1.0, (size, size), device)?.to_dtype(dtype);
        // Three weights alternate, so that none is in a cache from the last product.
        let (x, weights) = (matrix()?, [matrix()?, matrix()?, matrix()?]);
        let on_bf16 = device.is_cpu() && dtype == DType::BF16;
        let (seconds, quiet) = if device.is_cpu() {
            best_seconds(&x, &weights, on_bf16, canary)?
        } else {
            let mut next = (0..weights.len()).cycle();
            let mut queue = || -> Result<()> {
                x.matmul(&weights[next.next().unwrap_or(0)])?;
                Ok(())
            };
            (seconds_per_call(device, GPU_SECONDS, &mut queue)?, None)
        };
        Ok(Self {
            size,
            dtype: dtype.as_str(),
            instructions: Isa::best().filter(|_| on_bf16).map(Isa::name),
            flops_per_second: 2.0 * (size as f64).powi(3) / seconds,
            sustained_seconds: (!device.is_cpu()).then_some(GPU_SECONDS),
            data_sheet_flops_per_second: data_sheet::flops_per_second(&crate::device::name(device), dtype),
            quiet,
        })
    }
}

/// The best time of a product on the CPU, and whether the machine was quiet by `canary` during any of them. A disturbed
/// time is never too short, so it counts as well.
fn best_seconds(
    x: &Tensor,
    weights: &[Tensor; 3],
    on_bf16: bool,
    canary: Option<&Canary>,
) -> Result<(f64, Option<bool>)> {
    let packed = match on_bf16 {
        true => weights
            .iter()
            .map(|w| Linear::new(w.clone(), None)?.pack(DType::F32))
            .collect::<Result<Vec<_>>>()?,
        false => Vec::new(),
    };
    let (mut times, begun) = (Vec::new(), Instant::now());
    let mut readings: Vec<Reading> = Vec::new();
    // The first time is the warm-up.
    for i in 0..=TRIES {
        if i > LEAST && begun.elapsed().as_secs() >= 1 {
            break;
        }
        let started = Instant::now();
        let next = i % weights.len();
        match packed.get(next) {
            Some(layer) => layer.forward(x)?,
            None => x.matmul(&weights[next])?,
        };
        let seconds = started.elapsed().as_secs_f64();
        if i > 0 {
            times.push(seconds);
        }
        readings.extend(canary.map(Canary::read));
    }
    let quiet = canary.map(|canary| canary.select(&readings, &times).disturbed < times.len());
    Ok((times.into_iter().fold(f64::INFINITY, f64::min), quiet))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::canary::RateSource;

    /// Rates of two threads, of which the second is slow but in every `quiet_every`-th reading.
    struct Slow {
        read: usize,
        quiet_every: usize,
    }

    impl RateSource for Slow {
        fn read(&mut self) -> Reading {
            self.read += 1;
            let second = if self.read.is_multiple_of(self.quiet_every) { 10.0 } else { 7.0 };
            Reading { rates: vec![10.0, second], waited: Vec::new() }
        }
    }

    #[test]
    fn best_seconds_says_whether_any_time_was_quiet() {
        let x = Tensor::ones((8, 8), DType::F32, &Device::Cpu).unwrap();
        let weights = [x.clone(), x.clone(), x.clone()];
        // Of every second reading, no two follow each other.
        for (quiet_every, expected) in [(1, true), (2, false)] {
            let canary = Canary::from_source(Box::new(Slow { read: 0, quiet_every }));
            let (_, quiet) = best_seconds(&x, &weights, false, Some(&canary)).unwrap();
            assert_eq!(quiet, Some(expected));
        }
        assert_eq!(best_seconds(&x, &weights, false, None).unwrap().1, None);
    }
}

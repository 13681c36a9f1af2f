//! The canary's work: small products on every thread of the pool at the same time.

use super::{RateSource, Reading};
use crate::ops::cpu::{self, Mat};
use crate::ops::packed::kernel::{self, Left, Line, Out, Panels};
use crate::ops::packed::{Isa, PANEL, Then};
use candle_core::DType;
use half::bf16;
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// For how long a thread's products are timed, about: long beside the clock's reading and the moment at which threads begin.
const TIMED: Duration = Duration::from_micros(80);

/// The part of that for which a thread multiplies before, so that its core has left its sleep and the clock at which
/// vectors of 512 bits begin (20 microseconds on an Emerald Rapids).
const WARMUP_PART: usize = 2;

/// How long a thread waits for the others. On an idle machine all of them come within some 50 microseconds.
const PATIENCE: Duration = Duration::from_millis(1);

/// The most products of a reading.
const MAX_ROUNDS: usize = 10_000;

/// Rows, columns and summed values of a product of bf16: 20 KB with the output.
const BF16_SHAPE: (usize, usize, usize) = (32, 32, 128);

/// The same of a product in f32: 27 KB.
const F32_SHAPE: (usize, usize, usize) = (48, 48, 48);

/// This machine's CPU.
pub(super) struct Machine {
    product: Product,
    /// Products of a reading on each thread.
    rounds: usize,
}

/// What the products of a step go by.
#[derive(Clone, Copy)]
enum Product {
    /// The kernels of bf16.
    Bf16(Isa),
    /// `gemm` in f32.
    F32,
}

/// The matrices of a thread.
enum Operands {
    Bf16 { isa: Isa, left: Vec<bf16>, right: Vec<Line>, out: Vec<f32> },
    F32 { left: Vec<f32>, right: Vec<f32>, out: Vec<f32> },
}

impl Machine {
    /// With the instructions of a step whose products are in `dtype`.
    pub(super) fn new(dtype: DType) -> Self {
        let product = match Isa::best() {
            Some(isa) if dtype == DType::BF16 => Product::Bf16(isa),
            _ => Product::F32,
        };
        Self { product, rounds: rounds(product) }
    }

    /// What it runs.
    pub(super) fn work(&self) -> &'static str {
        match self.product {
            Product::Bf16(isa) => isa.name(),
            Product::F32 => "gemm",
        }
    }
}

impl RateSource for Machine {
    fn read(&mut self) -> Reading {
        let (product, rounds) = (self.product, self.rounds);
        let ready = AtomicUsize::new(0);
        let readings = rayon::broadcast(|thread| {
            let mut operands = Operands::new(product);
            let together = meet(&ready, thread.num_threads());
            operands.multiply(rounds.div_ceil(WARMUP_PART));
            let started = Instant::now();
            operands.multiply(rounds);
            let rate = rounds as f64 * product.flops() / started.elapsed().as_secs_f64().max(1e-9);
            (together, rate, waited())
        });
        let together = readings.iter().all(|(together, _, _)| *together);
        Reading {
            rates: readings.iter().map(|(_, rate, _)| if together { *rate } else { 0.0 }).collect(),
            waited: readings.iter().map(|(_, _, waited)| *waited).collect::<Option<_>>().unwrap_or_default(),
        }
    }
}

/// Waits until all threads have come; whether they did.
fn meet(ready: &AtomicUsize, threads: usize) -> bool {
    ready.fetch_add(1, Ordering::AcqRel);
    let started = Instant::now();
    while ready.load(Ordering::Acquire) < threads {
        if started.elapsed() >= PATIENCE {
            return false;
        }
        spin_loop();
    }
    true
}

/// Products that take about [`TIMED`].
fn rounds(product: Product) -> usize {
    let mut operands = Operands::new(product);
    let mut one = || {
        let started = Instant::now();
        operands.multiply(1);
        started.elapsed().as_secs_f64()
    };
    let fastest = (0..64).map(|_| one()).fold(f64::INFINITY, f64::min).max(1e-8);
    ((TIMED.as_secs_f64() / fastest).ceil() as usize).clamp(1, MAX_ROUNDS)
}

/// For how long this thread was ready and waited for a core since it began, s: the second number of Linux's `schedstat`
/// (Documentation/scheduler/sched-stats.rst); `None` if the system has no such file.
fn waited() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(nanoseconds as f64 * 1e-9)
}

impl Product {
    /// Floating-point operations of a product.
    fn flops(self) -> f64 {
        let (rows, columns, depth) = match self {
            Self::Bf16(_) => BF16_SHAPE,
            Self::F32 => F32_SHAPE,
        };
        2.0 * (rows * columns * depth) as f64
    }
}

impl Operands {
    /// Made by the thread that uses them, so that their lines are in its cache alone.
    fn new(product: Product) -> Self {
        match product {
            Product::Bf16(isa) => {
                let (rows, columns, depth) = BF16_SHAPE;
                let (values, stride) = (vec![bf16::ONE; PANEL * depth], depth / 2 + 1);
                let mut right = vec![Line::ZERO; columns / PANEL * stride];
                for panel in right.chunks_mut(stride) {
                    kernel::pack_rows(isa, &values, depth, PANEL, depth, panel);
                }
                let left = vec![bf16::ONE; rows * depth];
                Self::Bf16 { isa, left, right, out: vec![0.0; rows * columns] }
            }
            Product::F32 => {
                let (rows, columns, depth) = F32_SHAPE;
                let (left, right) = (vec![1.0; rows * depth], vec![1.0; depth * columns]);
                Self::F32 { left, right, out: vec![0.0; rows * columns] }
            }
        }
    }

    /// Makes their product `times` times.
    fn multiply(&mut self, times: usize) {
        for _ in 0..times {
            match self {
                Self::Bf16 { isa, left, right, out } => {
                    let (rows, columns, depth) = BF16_SHAPE;
                    let right = Panels::new(right, depth / 2 + 1);
                    let mut block = Out::new(out, rows, columns, columns);
                    kernel::block(*isa, Left::rows(left, depth), right, depth, &mut block, Then::WRITE);
                }
                Self::F32 { left, right, out } => multiply_f32(left, right, out),
            }
            black_box(self.out());
        }
    }

    fn out(&self) -> &[f32] {
        match self {
            Self::Bf16 { out, .. } | Self::F32 { out, .. } => out,
        }
    }
}

/// `out = left right`, on this thread, all of [`F32_SHAPE`].
fn multiply_f32(left: &[f32], right: &[f32], out: &mut [f32]) {
    let (rows, columns, depth) = F32_SHAPE;
    assert_eq!((left.len(), right.len(), out.len()), (rows * depth, depth * columns, rows * columns));
    // SAFETY: the slices have the elements of the shapes, and `out` is borrowed mutably.
    unsafe {
        cpu::gemm(
            F32_SHAPE,
            Mat::rows(out.as_mut_ptr(), columns),
            false,
            Mat::rows(left.as_ptr(), depth),
            Mat::rows(right.as_ptr(), columns),
            1.0,
            false,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_multiply_ones_in_every_way_that_there_is() {
        let bf16 = Isa::all().iter().map(|isa| (Product::Bf16(*isa), BF16_SHAPE));
        for (product, (rows, columns, depth)) in bf16.chain([(Product::F32, F32_SHAPE)]) {
            let mut operands = Operands::new(product);
            operands.multiply(2);
            assert_eq!(operands.out(), vec![depth as f32; rows * columns]);
            assert_eq!(product.flops(), 2.0 * (rows * columns * depth) as f64);
        }
    }

    #[test]
    fn machine_reads_every_thread_of_the_pool() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        pool.install(|| {
            for dtype in [DType::F32, DType::BF16] {
                let mut machine = Machine::new(dtype);
                let reading = machine.read();
                assert_eq!(reading.rates.len(), 2, "{}", machine.work());
                assert!(reading.rates.iter().all(|rate| rate.is_finite() && *rate >= 0.0), "{reading:?}");
                if std::path::Path::new("/proc/thread-self/schedstat").exists() {
                    let later = machine.read();
                    assert_eq!((reading.waited.len(), later.waited.len()), (2, 2));
                    assert!(reading.waited.iter().zip(&later.waited).all(|(a, b)| a <= b), "{later:?}");
                }
            }
        });
    }

    #[test]
    fn work_names_the_products_of_the_dtype() {
        assert_eq!(Machine::new(DType::F32).work(), "gemm");
        assert_eq!(Machine::new(DType::BF16).work(), Isa::best().map_or("gemm", Isa::name));
    }

    #[test]
    fn meet_gives_up_on_a_thread_that_does_not_come() {
        assert!(!meet(&AtomicUsize::new(0), 2));
        assert!(meet(&AtomicUsize::new(1), 2));
    }
}

//! The canary's work: small products on every thread of the pool at the same time.

use super::{RateSource, Reading};
use crate::ops::bf16::kernel::{
    self, Bf16Matrix, BlockProduct, Epilogue, Left, OutputBlock, PanelRow, Panels,
};
use crate::ops::bf16::{Isa, PANEL};
use crate::ops::cpu::{self, Gemm, Mat, MatMut};
use candle_core::DType;
use half::bf16;
use std::hint::{black_box, spin_loop};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Approximate time for which a thread's products are timed: long compared with reading the clock and the start of
/// threads.
const TIMED: Duration = Duration::from_micros(80);

/// The fraction of that time for which a thread multiplies before, so that its core has left its sleep state and has
/// the clock for 512-bit vectors (which takes 20 microseconds on an Emerald Rapids).
const WARMUP_PART: usize = 2;

/// How long a thread waits for the others. On an idle machine all of them arrive within about 50 microseconds.
const PATIENCE: Duration = Duration::from_millis(1);

/// Bytes of a cache line.
const LINE: usize = 64;

/// Most products of a reading.
const MAX_ROUNDS: usize = 10_000;

/// Rows and columns of a product.
const SIDE: usize = 32;

/// Length of the sums of a bf16 product: 20 KB with the output.
const BF16_DEPTH: usize = 128;

/// The same for a kernel that converts both operands to f32: 28 KB with the converted values.
const WIDENED_DEPTH: usize = 64;

/// The same for an f32 product: 16 KB, and 6 KB that `gemm` packs. (27 KB and 9 KB filled a cache of 32 KB, and the
/// rate varied by a factor of 1.7 with the addresses.)
const F32_DEPTH: usize = 48;

/// This machine's CPU.
pub(super) struct CanaryMachine {
    product: CanaryProduct,
    /// Products of a reading on each thread.
    rounds: usize,
    /// The operands of each thread: the thread itself makes and keeps them, because a rate depends on addresses.
    operands: Vec<Mutex<Option<CanaryOperands>>>,
}

/// The product that a step runs.
#[derive(Clone, Copy)]
enum CanaryProduct {
    /// The bf16 kernels.
    Bf16(Isa),
    /// `gemm` in f32.
    F32,
}

/// The matrices of a thread.
enum CanaryOperands {
    Bf16 { isa: Isa, depth: usize, left: Aligned<bf16>, right: Vec<PanelRow>, out: Aligned<f32> },
    F32 { left: Aligned<f32>, right: Aligned<f32>, out: Aligned<f32> },
}

/// Values aligned to a cache line: vectors across two lines load at half the rate.
struct Aligned<T> {
    values: Vec<T>,
    range: Range<usize>,
}

/// A thread's part of a reading.
struct OfThread {
    rate: f64,
    started: Instant,
    ended: Instant,
    /// Whether all threads arrived before the products were timed.
    met: bool,
    waited: Option<f64>,
}

impl CanaryMachine {
    /// With the instructions that a step in `dtype` uses.
    pub(super) fn new(dtype: DType) -> Self {
        let product = match Isa::best() {
            Some(isa) if dtype == DType::BF16 => CanaryProduct::Bf16(isa),
            _ => CanaryProduct::F32,
        };
        Self { product, rounds: rounds(product), operands: Vec::new() }
    }

    /// The name of its work.
    pub(super) fn work(&self) -> &'static str {
        match self.product {
            CanaryProduct::Bf16(isa) => isa.name(),
            CanaryProduct::F32 => "gemm",
        }
    }
}

impl RateSource for CanaryMachine {
    fn read(&mut self) -> Reading {
        self.operands.resize_with(rayon::current_num_threads(), Mutex::default);
        let (this, ready, warm) = (&*self, AtomicUsize::new(0), AtomicUsize::new(0));
        let threads = rayon::broadcast(|thread| {
            let mut slot = this.operands[thread.index()].lock().unwrap_or_else(PoisonError::into_inner);
            let operands = slot.get_or_insert_with(|| CanaryOperands::new(this.product));
            let came = meet(&ready, thread.num_threads());
            operands.multiply(this.rounds.div_ceil(WARMUP_PART));
            let met = meet(&warm, thread.num_threads()) && came;
            let started = Instant::now();
            operands.multiply(this.rounds);
            let ended = Instant::now();
            let rate = this.rounds as f64 * this.product.flops() / (ended - started).as_secs_f64().max(1e-9);
            OfThread { rate, started, ended, met, waited: waited() }
        });
        let together = threads.iter().all(|thread| thread.met) && overlap(&threads);
        Reading {
            rates: threads.iter().map(|thread| if together { thread.rate } else { 0.0 }).collect(),
            waited: threads.iter().map(|thread| thread.waited).collect::<Option<_>>().unwrap_or_default(),
        }
    }
}

/// Waits until all threads have arrived; returns whether they did.
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

/// Whether all threads multiplied at the same time for at least nine tenths of the fastest one's time. Threads that
/// multiply one after another on one core are each faster than together, and would be taken for the fastest rate.
fn overlap(threads: &[OfThread]) -> bool {
    let (last_start, first_end) =
        (threads.iter().map(|thread| thread.started).max(), threads.iter().map(|thread| thread.ended).min());
    let (Some(last_start), Some(first_end)) = (last_start, first_end) else { return false };
    let shortest = threads.iter().map(|thread| thread.ended - thread.started).min().unwrap_or_default();
    10 * first_end.saturating_duration_since(last_start) >= 9 * shortest
}

/// Number of products that take about [`TIMED`].
fn rounds(product: CanaryProduct) -> usize {
    let mut operands = CanaryOperands::new(product);
    let mut one = || {
        let started = Instant::now();
        operands.multiply(1);
        started.elapsed().as_secs_f64()
    };
    let fastest = (0..64).map(|_| one()).fold(f64::INFINITY, f64::min).max(1e-8);
    ((TIMED.as_secs_f64() / fastest).ceil() as usize).clamp(1, MAX_ROUNDS)
}

/// Time that this thread was ready and waited for a core since it began, s: the second number of Linux's `schedstat`
/// (Documentation/scheduler/sched-stats.rst); `None` if the system has no such file.
fn waited() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(nanoseconds as f64 * 1e-9)
}

impl CanaryProduct {
    /// Length of the sums.
    fn depth(self) -> usize {
        match self {
            Self::Bf16(isa) if isa.name() == "avx512f" => WIDENED_DEPTH,
            Self::Bf16(_) => BF16_DEPTH,
            Self::F32 => F32_DEPTH,
        }
    }

    /// Floating-point operations of a product.
    fn flops(self) -> f64 {
        2.0 * (SIDE * SIDE * self.depth()) as f64
    }
}

impl CanaryOperands {
    fn new(product: CanaryProduct) -> Self {
        let (depth, out) = (product.depth(), Aligned::new(0.0, SIDE * SIDE));
        match product {
            CanaryProduct::Bf16(isa) => {
                let (values, stride) = (vec![bf16::ONE; PANEL * depth], depth / 2 + 1);
                let mut right = vec![PanelRow::ZERO; SIDE / PANEL * stride];
                for panel in right.chunks_mut(stride) {
                    let from = Bf16Matrix { values: &values, stride: depth, rows: PANEL, columns: depth };
                    kernel::pack_rows(isa, from, panel);
                }
                Self::Bf16 { isa, depth, left: Aligned::new(bf16::ONE, SIDE * depth), right, out }
            }
            CanaryProduct::F32 => {
                let (left, right) = (Aligned::new(1.0, SIDE * depth), Aligned::new(1.0, depth * SIDE));
                Self::F32 { left, right, out }
            }
        }
    }

    /// Computes the product `times` times.
    fn multiply(&mut self, times: usize) {
        for _ in 0..times {
            match self {
                Self::Bf16 { isa, depth, left, right, out } => {
                    let right = Panels::new(right, *depth / 2 + 1);
                    let mut block = OutputBlock::new(out.slice_mut(), SIDE, SIDE, SIDE);
                    let left = Left::rows(left.slice(), *depth);
                    let product = BlockProduct { left, right, depth: *depth, epilogue: Epilogue::WRITE };
                    kernel::multiply(*isa, product, &mut block);
                }
                Self::F32 { left, right, out } => multiply_f32(left.slice(), right.slice(), out.slice_mut()),
            }
            black_box(self.out());
        }
    }

    fn out(&self) -> &[f32] {
        match self {
            Self::Bf16 { out, .. } | Self::F32 { out, .. } => out.slice(),
        }
    }
}

impl<T: Copy> Aligned<T> {
    fn new(value: T, n: usize) -> Self {
        let values = vec![value; n + LINE / size_of::<T>()];
        let first = values.as_ptr().align_offset(LINE);
        Self { values, range: first..first + n }
    }

    fn slice(&self) -> &[T] {
        &self.values[self.range.clone()]
    }

    fn slice_mut(&mut self) -> &mut [T] {
        &mut self.values[self.range.clone()]
    }
}

/// `out [SIDE, SIDE] = left [SIDE, F32_DEPTH] right [F32_DEPTH, SIDE]`, on this thread.
fn multiply_f32(left: &[f32], right: &[f32], out: &mut [f32]) {
    assert_eq!((left.len(), right.len(), out.len()), (SIDE * F32_DEPTH, F32_DEPTH * SIDE, SIDE * SIDE));
    let (a, b) = (Mat::rows(left, F32_DEPTH), Mat::rows(right, SIDE));
    let product =
        Gemm { size: (SIDE, SIDE, F32_DEPTH), a, b, scale: 1.0, accumulate: false, parallel: false };
    // SAFETY: the slices have the elements of the shapes.
    unsafe { cpu::gemm(&product, MatMut::rows(out, SIDE)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_multiply_ones_in_every_way_that_there_is() {
        let bf16 = Isa::all().iter().map(|isa| CanaryProduct::Bf16(*isa));
        for product in bf16.chain([CanaryProduct::F32]) {
            let mut operands = CanaryOperands::new(product);
            operands.multiply(2);
            assert_eq!(operands.out(), [product.depth() as f32; SIDE * SIDE]);
            assert!(operands.out().as_ptr().addr().is_multiple_of(LINE));
            assert_eq!(product.flops(), 2.0 * (32 * 32 * product.depth()) as f64);
        }
    }

    #[test]
    fn machine_reads_every_thread_of_the_pool() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        pool.install(|| {
            for dtype in [DType::F32, DType::BF16] {
                let mut machine = CanaryMachine::new(dtype);
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
        assert_eq!(CanaryMachine::new(DType::F32).work(), "gemm");
        assert_eq!(CanaryMachine::new(DType::BF16).work(), Isa::best().map_or("gemm", Isa::name));
    }

    #[test]
    fn overlap_is_of_all_threads_and_most_of_the_shortest_time() {
        let begun = Instant::now();
        let overlapping = |times: &[(u64, u64)]| {
            let instant = |millis| begun + Duration::from_millis(millis);
            let thread = |&(started, ended): &(u64, u64)| OfThread {
                rate: 1.0,
                started: instant(started),
                ended: instant(ended),
                met: true,
                waited: None,
            };
            overlap(&times.iter().map(thread).collect::<Vec<_>>())
        };
        for (times, expected) in [
            (&[(0, 100), (1, 101), (0, 400)][..], true),
            (&[(0, 100), (10, 110)], true),
            (&[(0, 100), (11, 111)], false),
            // One after another.
            (&[(0, 100), (120, 220)], false),
            (&[(0, 100), (0, 100), (82, 102)], true),
            (&[(0, 100), (0, 100), (83, 103)], false),
        ] {
            assert_eq!(overlapping(times), expected, "{times:?}");
        }
    }

    #[test]
    fn meet_gives_up_on_a_thread_that_does_not_come() {
        assert!(!meet(&AtomicUsize::new(0), 2));
        assert!(meet(&AtomicUsize::new(1), 2));
    }
}

//! The product of a frozen weight in bf16, both directions, at shapes of Granite and SmolLM2, and the floor that it is held
//! against: loops that multiply registers and read no memory, on every thread.
//!
//!     cargo bench --bench product
//!     python benches/product/compare.py        the same beside torch's product, in one run
//!
//! Throughputs are floating-point operations. On a CPU without AVX-512 the product is `gemm`'s in f32, of a weight that
//! is widened block by block, and the floor is left out. AMX has no loop here.
//!
//! Each call lies between two readings of the canary (`gneiss::bench::Canary`) and is made again, up to three times, if the
//! machine was disturbed. A sample's time is the mean of its quiet calls, or of all of them if none was quiet; how many
//! calls were quiet is printed after each benchmark.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gneiss::bench::Canary;
use gneiss::ops::Linear;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Rows, input features, output features. The first three are those that LOG.md holds against oneDNN; then SmolLM2's
/// layers behind a batch of 8 examples and its head, then granite-3.3-2b's.
const SHAPES: [(usize, usize, usize); 10] = [
    (512, 2048, 2048),
    (512, 576, 1536),
    (4096, 2560, 8192),
    (367, 576, 960),
    (367, 576, 576),
    (367, 576, 3072),
    (367, 1536, 576),
    (16, 576, 49152),
    (1024, 2048, 16384),
    (1024, 8192, 2048),
];

/// Weights that a shape rotates over, so that none is in a cache because it was the last one; 400 MB at most.
fn weights(k: usize, n: usize) -> usize {
    (400_000_000 / (2 * k * n)).clamp(2, 8)
}

fn bf16(rows: usize, columns: usize) -> Tensor {
    let values = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu);
    values.and_then(|t| t.to_dtype(DType::BF16)).expect("memory for a matrix")
}

/// How often a call is made at the most, until it was quiet.
const TRIES: u64 = 4;

/// Times calls on a quiet machine.
struct QuietCalls {
    canary: Canary,
    quiet: u64,
    calls: u64,
}

impl QuietCalls {
    fn new() -> Self {
        Self { canary: Canary::new(DType::BF16), quiet: 0, calls: 0 }
    }

    /// What `times` calls take on a quiet machine: the mean of the quiet ones, or of all if none was.
    fn time(&mut self, times: u64, mut call: impl FnMut()) -> Duration {
        let (mut quiet, mut quiet_calls, mut all, mut calls) = (Duration::ZERO, 0, Duration::ZERO, 0);
        for _ in 0..times {
            for _ in 0..TRIES {
                let before = self.canary.read();
                let started = Instant::now();
                call();
                let time = started.elapsed();
                let after = self.canary.read();
                (all, calls) = (all + time, calls + 1);
                if self.canary.is_quiet(&before, &after, time.as_secs_f64()) {
                    (quiet, quiet_calls) = (quiet + time, quiet_calls + 1);
                    break;
                }
            }
        }
        (self.quiet, self.calls) = (self.quiet + quiet_calls, self.calls + calls);
        if quiet_calls > 0 { scaled(quiet, times, quiet_calls) } else { scaled(all, times, calls) }
    }

    /// Prints how many calls were quiet since the last time.
    fn print(&mut self, name: &str) {
        if self.calls > 0 {
            eprintln!("{name}: {} of {} calls were quiet", self.quiet, self.calls);
        }
        (self.quiet, self.calls) = (0, 0);
    }
}

/// The time of `times` calls, by that of `measured` calls.
fn scaled(time: Duration, times: u64, measured: u64) -> Duration {
    time.mul_f64(times as f64 / measured.max(1) as f64)
}

fn products(criterion: &mut Criterion) {
    let mut calls = QuietCalls::new();
    let mut group = criterion.benchmark_group("product");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(20);
    for (m, k, n) in SHAPES {
        let packed = |_| Linear::new(bf16(n, k), None).and_then(|l| l.pack(DType::F32)).expect("a layer");
        let layers: Vec<Linear> = (0..weights(k, n)).map(packed).collect();
        // As a run does that has the memory.
        layers.iter().for_each(Linear::pack_backward);
        let input = layers[0].gemm_dtype(DType::F32);
        let as_read = |t: Tensor| t.to_dtype(input).expect("a dtype that there is");
        let (x, dy) = (as_read(bf16(m, k)), as_read(bf16(m, n)));
        group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
        let mut next = 0;
        let mut layer = || {
            next = (next + 1) % layers.len();
            &layers[next]
        };
        let shape = format!("{m}x{k}x{n}");
        let id = |direction| BenchmarkId::new(direction, &shape);
        let mut forward = || drop(black_box(layer().forward(&x).expect("the product runs")));
        group.bench_function(id("forward"), |b| b.iter_custom(|times| calls.time(times, &mut forward)));
        calls.print(&format!("product/forward/{shape}"));
        let mut backward = || drop(black_box(layer().backward(&dy, 1.0).expect("the product runs")));
        group.bench_function(id("backward"), |b| b.iter_custom(|times| calls.time(times, &mut backward)));
        calls.print(&format!("product/backward/{shape}"));
    }
    group.finish();
}

fn floor(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("floor");
    let mut calls = QuietCalls::new();
    let (threads, times) = (rayon::current_num_threads(), 100_000);
    for (name, flops, multiply) in registers::kernels() {
        group.throughput(Throughput::Elements((threads * times) as u64 * flops));
        let every_thread = || {
            (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
                black_box(multiply(times));
            });
        };
        group.bench_function(name, |b| b.iter_custom(|rounds| calls.time(rounds, every_thread)));
        calls.print(&format!("floor/{name}"));
    }
    group.finish();
}

/// Products of registers, over and over: in bf16, and in f32, which is the faster of the two on some CPUs. Twelve sums are
/// more than either instruction takes cycles, and few enough that the compiler keeps all in registers.
mod registers {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    /// A loop of that many rounds.
    type Loop = fn(usize) -> f32;

    /// By name, those whose instruction the CPU has, with the floating-point operations of a round.
    #[cfg(target_arch = "x86_64")]
    pub fn kernels() -> Vec<(&'static str, u64, Loop)> {
        let mut all: Vec<(_, _, Loop)> = Vec::new();
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the instruction.
            all.push(("avx512f", 12 * 32, |times| unsafe { f32(times) }));
            if is_x86_feature_detected!("avx512bf16") {
                // SAFETY: the CPU has the instruction.
                all.push(("avx512_bf16", 12 * 64, |times| unsafe { bf16(times) }));
            }
        }
        all
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn kernels() -> Vec<(&'static str, u64, Loop)> {
        Vec::new()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16(times: usize) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 12];
        // SAFETY: both are 512 bits without invalid patterns.
        let (a, b): (__m512bh, __m512bh) =
            unsafe { std::mem::transmute([_mm512_set1_epi32(0x3f80_3f80); 2]) };
        // Opaque, so that the sums are not known beforehand; once, or the loop would go through memory.
        let (a, b) = std::hint::black_box((a, b));
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn f32(times: usize) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 12];
        let (a, b) = std::hint::black_box((_mm512_set1_ps(1.0), _mm512_set1_ps(1.0)));
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }
}

criterion_group!(benches, floor, products);
criterion_main!(benches);

//! Every op, forward and backward, at the shapes of a tuning step of SmolLM2-135M: 8 examples after 28 virtual
//! tokens.
//!
//!     cargo bench --bench ops                       all of them, on the device that `auto` chooses
//!     cargo bench --bench ops -- attention/forward  one of them
//!
//! Inputs rotate over a few buffers, so that no run finds its input in the cache, and the device is synchronised after each call.
//! criterion warms up, and reports the median and its spread. A throughput is in elements of the output; for `linear`,
//! `attention` and `experts` it is in floating-point operations.
//!
//! On the CPU each sample lies between two readings of the canary (`gneiss::bench::Canary`), and the number of quiet samples is
//! printed after each benchmark. No sample is left out: a sample has many calls of an op that takes microseconds.

use candle_core::{DType, Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use gneiss::Result;
use gneiss::batch::Example;
use gneiss::batch::{PackedBatch, Passes, PrefixGroup};
use gneiss::bench::Canary;
use gneiss::device::DeviceChoice;
use gneiss::ops::adamw::{AdamW, AdamWStep, Parameter};
use gneiss::ops::attention::{AttentionShape, GradTargets, Inputs, Qkv};
use gneiss::ops::conv::{ConvInputs, ConvWeights};
use gneiss::ops::embed::EmbedLookup;
use gneiss::ops::gated_norm::GatedNorm;
use gneiss::ops::rms_norm::{ResidualAdd, RmsNorm};
use gneiss::ops::rope::Rope;
use gneiss::ops::ssd::{SsdInputs, SsdShape, SsdWeights};
use gneiss::ops::{self, ExpertLinear, Linear, RopeTable, Routing, ScanPlan, ScanSegment, ScanStart};
use std::sync::LazyLock;
use std::time::Instant;

/// Rows, virtual tokens, hidden size, heads, key and value heads, head size, feed-forward size, vocabulary.
const T: usize = 388;
const P: usize = 28;
const C: usize = 576;
const H: usize = 9;
const K: usize = 3;
const D: usize = 64;
const F: usize = 1536;
const V: usize = 49152;

/// A Mamba2 layer: its inner width, heads, state size, taps and channels of the convolution.
const I: usize = 2 * C;
const M: usize = 18;
const N: usize = 128;
const W: usize = 4;
const X: usize = I + 2 * N;

/// Examples of the step; their targets are a label and the end of text.
const EXAMPLES: usize = 8;
/// Rows that predict a token of a target.
const TARGETS: usize = 2 * EXAMPLES;

/// Buffers over which the inputs rotate.
const BUFFERS: usize = 4;

static DEVICE: LazyLock<Device> = LazyLock::new(|| {
    gneiss::device::open(DeviceChoice::Auto).expect("`auto` takes a device that there is").device
});

/// The canary of the CPU; `None` on a GPU.
static CANARY: LazyLock<Option<Canary>> = LazyLock::new(|| DEVICE.is_cpu().then(|| Canary::new(DType::F32)));

/// The packed rows of the step.
static BATCH: LazyLock<PackedBatch> = LazyLock::new(|| {
    let rows = (T - P) / EXAMPLES;
    let example = |i: u32| Example { input: vec![100 + i; rows - 1], target: vec![i % 2, 2], line: 0 };
    let examples: Vec<Example> = (0..EXAMPLES as u32).map(example).collect();
    let batch = Passes::new(&[PrefixGroup::new(0..P as u32, &examples)], usize::MAX).prefix_pass;
    assert_eq!((batch.ids.len(), batch.prefix_rows, batch.labels.len()), (T, P, TARGETS));
    batch
});

/// The segments of the packed rows for a Mamba2 layer.
static SCAN: LazyLock<ScanPlan> = LazyLock::new(|| {
    let rows = (T - P) / EXAMPLES;
    let prefix = ScanSegment { rows: 0..P, start: ScanStart::Zero, end: None };
    let sequence =
        |i| ScanSegment { rows: P + i * rows..P + (i + 1) * rows, start: ScanStart::Segment(0), end: None };
    std::iter::once(prefix).chain((0..EXAMPLES).map(sequence)).collect::<Vec<_>>().into()
});

/// Normal values of variance 1.
fn randn(rows: usize, columns: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, columns), &DEVICE).expect("the device makes random values")
}

/// As many inputs as there are buffers.
fn rotated<I>(make: impl Fn() -> I) -> Vec<I> {
    (0..BUFFERS).map(|_| make()).collect()
}

/// The result of `f` for each input.
fn for_each_input<I, O>(inputs: &[I], f: impl Fn(&I) -> O) -> Vec<O> {
    inputs.iter().map(f).collect()
}

/// Counts the samples of a benchmark during which the machine was quiet, those of the warm-up too, and prints them when
/// it is dropped.
struct Samples {
    name: String,
    quiet: usize,
    all: usize,
}

impl Samples {
    fn new(op: &str, direction: &str) -> Self {
        Self { name: format!("{op}/{direction}"), quiet: 0, all: 0 }
    }

    fn watch(&mut self, sample: impl FnOnce()) {
        let Some(canary) = &*CANARY else { return sample() };
        let before = canary.read();
        let started = Instant::now();
        sample();
        let seconds = started.elapsed().as_secs_f64();
        self.quiet += usize::from(canary.is_quiet(&before, &canary.read(), seconds));
        self.all += 1;
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        if self.all > 0 {
            eprintln!("{}: {} of {} samples were quiet", self.name, self.quiet, self.all);
        }
    }
}

/// The benchmarks of one op.
struct Op<'a> {
    name: &'a str,
    group: BenchmarkGroup<'a, WallTime>,
    shape: String,
}

impl<'a> Op<'a> {
    fn new(c: &'a mut Criterion, name: &'a str, shape: &str) -> Self {
        let device = match &*DEVICE {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        };
        let shape = format!("{} {device} f32 {shape}", env!("CARGO_PKG_VERSION"));
        Self { name, group: c.benchmark_group(name), shape }
    }

    fn id(&mut self, direction: &str, work: usize) -> BenchmarkId {
        self.group.throughput(Throughput::Elements(work as u64));
        BenchmarkId::new(direction, &self.shape)
    }

    /// An op that does not change its input.
    fn measure<I, O>(&mut self, direction: &str, work: usize, inputs: &[I], op: impl Fn(&I) -> Result<O>) {
        let id = self.id(direction, work);
        let mut next = inputs.iter().cycle();
        let mut samples = Samples::new(self.name, direction);
        self.group.bench_function(id, |b| {
            samples.watch(|| {
                b.iter(|| {
                    let out = op(next.next().expect("there are inputs")).expect("the op runs");
                    DEVICE.synchronize().expect("the device waits");
                    out
                })
            });
        });
    }

    /// An op that owns its input and may change it in place; each call gets a copy.
    fn measure_owned<O>(
        &mut self,
        direction: &str,
        work: usize,
        inputs: &[Tensor],
        op: impl Fn(Tensor) -> Result<O>,
    ) {
        let id = self.id(direction, work);
        let mut next = inputs.iter().cycle();
        let mut samples = Samples::new(self.name, direction);
        self.group.bench_function(id, |b| {
            let copy = || next.next().expect("there are inputs").copy().expect("a tensor can be copied");
            let run = |input| {
                let out = op(input).expect("the op runs");
                DEVICE.synchronize().expect("the device waits");
                out
            };
            samples.watch(|| b.iter_batched(copy, run, BatchSize::LargeInput));
        });
    }
}

fn adamw(c: &mut Criterion) {
    let mut op = Op::new(c, "adamw", &format!("P={P} C={C}"));
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let inputs = rotated(|| (Parameter::new(&randn(P, C)).expect("a parameter of a tensor"), randn(P, C)));
    let step = AdamWStep { step: 10, learning_rate: 0.01, max_grad_norm: 0.5 };
    op.measure("forward", P * C, &inputs, |(parameter, gradient)| adamw.forward(parameter, gradient, step));
}

fn attention(c: &mut Criterion) {
    let mut op = Op::new(c, "attention", &format!("T={T} P={P} H={H} K={K} D={D}"));
    let shape = AttentionShape { heads: H, kv_heads: K, head_dim: D, scale: 0.125 };
    let visible = BATCH.segments.iter().map(|s| {
        let (n, prefix) = (s.queries.len(), s.prefix.as_ref().map_or(0, |p| p.len()));
        n * (prefix + s.first) + n * (n + 1) / 2
    });
    // Two products forward and five backward, of D multiplications and additions a score.
    let product = 2 * D * H * visible.sum::<usize>();
    let inputs = rotated(|| (Qkv::Fused(randn(T, (H + 2 * K) * D)), randn(T, H * D)));
    fn attention_inputs(qkv: &Qkv) -> Inputs<'_> {
        Inputs { segments: &BATCH.segments, qkv, prefix: None }
    }
    op.measure("forward", 2 * product, &inputs, |(qkv, _)| shape.forward(attention_inputs(qkv)));
    let attended = for_each_input(&inputs, |(qkv, dout)| {
        (qkv.clone(), dout.clone(), shape.forward(attention_inputs(qkv)).expect("the op runs").saved())
    });
    op.measure("backward", 5 * product, &attended, |(qkv, dout, saved)| {
        shape.backward(attention_inputs(qkv), saved, dout, GradTargets::All)
    });
}

fn conv(c: &mut Criterion) {
    let mut op = Op::new(c, "conv", &format!("T={T} X={X} W={W}"));
    let bias = Tensor::zeros(X, DType::F32, &DEVICE).expect("the device makes zeros");
    let weights = ConvWeights { weight: randn(X, W), bias };
    let inputs = rotated(|| (randn(T, X), randn(T, X)));
    fn of<'a>((x, _): &'a (Tensor, Tensor)) -> ConvInputs<'a> {
        ConvInputs { x, plan: &SCAN, tails: None }
    }
    op.measure("forward", T * X, &inputs, |input| ops::conv::forward(of(input), &weights, DType::F32));
    op.measure("backward", T * X, &inputs, |input| {
        ops::conv::backward((&input.1, None), of(input), &weights)
    });
}

fn cross_entropy(c: &mut Criterion) {
    let mut op = Op::new(c, "cross_entropy", &format!("rows={TARGETS} V={V}"));
    let labels = (&BATCH.labels).into();
    let softmax = ops::cross_entropy::Softmax { vocab: V, scale: 1.0 };
    let inputs = rotated(|| randn(TARGETS, V));
    op.measure("forward", TARGETS * V, &inputs, |z| ops::cross_entropy::forward(z, labels, softmax));
    let losses = ops::cross_entropy::forward(&inputs[0], labels, softmax).expect("the op runs");
    op.measure_owned("backward", TARGETS * V, &inputs, |z| {
        ops::cross_entropy::backward(z, labels, softmax, &losses, &0.1.into())
    });
}

fn distillation(c: &mut Criterion) {
    let mut op = Op::new(c, "distillation", &format!("rows={TARGETS} V={V}"));
    let (softmax, teacher) = (ops::cross_entropy::Softmax { vocab: V, scale: 1.0 }, randn(TARGETS, V));
    let inputs = rotated(|| randn(TARGETS, V));
    op.measure("forward", TARGETS * V, &inputs, |z| ops::distillation::forward(z, &teacher, softmax));
    let divergences = ops::distillation::forward(&inputs[0], &teacher, softmax).expect("the op runs");
    op.measure_owned("backward", TARGETS * V, &inputs, |z| {
        ops::distillation::backward(z, &teacher, softmax, &divergences, &0.1.into())
    });
}

fn embed(c: &mut Criterion) {
    let mut op = Op::new(c, "embed", &format!("T={T} P={P} C={C} V={V}"));
    let (embedding, lookup) = (randn(V, C), EmbedLookup { ids: (&BATCH.ids).into(), multiplier: 12.0 });
    let prompts = rotated(|| randn(P, C));
    op.measure("forward", T * C, &prompts, |p| ops::embed::forward(&embedding, p, &lookup));
    let gradients = rotated(|| randn(T, C));
    op.measure("backward", P * C, &gradients, |dx| ops::embed::backward(dx, P, &lookup));
}

fn gated_norm(c: &mut Criterion) {
    let mut op = Op::new(c, "gated_norm", &format!("T={T} I={I}"));
    let weight = Tensor::ones(I, DType::F32, &DEVICE).expect("the device makes ones");
    let norm = GatedNorm { weight, groups: 1, eps: 1e-5 };
    let inputs = rotated(|| (randn(T, I), randn(T, I)));
    op.measure("forward", T * I, &inputs, |(y, z)| norm.forward(y, z, y.dtype()));
    let saved = for_each_input(&inputs, |(y, z)| {
        let rstd = norm.forward(y, z, y.dtype()).expect("the op runs").rstd;
        (randn(T, I), y.clone(), z.clone(), rstd)
    });
    op.measure("backward", 2 * T * I, &saved, |(dn, y, z, rstd)| norm.backward(dn, y, z, rstd));
}

/// A layer's experts with their routing, at the sizes of granite-3.1-1b-a400m but for the hidden size; the weights rotate too.
fn experts(c: &mut Criterion) {
    const EXPERTS: usize = 32;
    const PER_TOKEN: usize = 8;
    const SIZE: usize = 512;
    let mut op = Op::new(c, "experts", &format!("T={T} C={C} E={EXPERTS} k={PER_TOKEN} F={SIZE}"));
    let work = 2 * T * PER_TOKEN * 3 * C * SIZE;
    let matrices = |n, k| {
        let all = Linear::new(randn(EXPERTS * n, k), None).expect("a layer of a weight");
        ExpertLinear::new(all, EXPERTS).expect("experts of one size")
    };
    let layer = || [matrices(2 * SIZE, C), matrices(C, SIZE)];
    let inputs = rotated(|| (layer(), randn(T, C), randn(T, EXPERTS)));
    let forward = |[gate_up, down]: &[ExpertLinear; 2], u: &Tensor, logits: &Tensor| {
        let routing = Routing::new(logits, PER_TOKEN)?;
        let (out, h) = ops::experts::forward(u, &routing, [gate_up, down], DType::F32)?;
        Result::Ok((routing, out, h))
    };
    op.measure("forward", work, &inputs, |(layer, u, logits)| forward(layer, u, logits));
    let saved = for_each_input(&inputs, |(layer, u, logits)| {
        let (routing, _, h) = forward(layer, u, logits).expect("the op runs");
        (layer.clone(), randn(T, C), routing, h)
    });
    op.measure("backward", work, &saved, |([gate_up, down], dout, routing, h)| {
        ops::experts::backward(dout, h, routing, [gate_up, down], 1.0)
    });
}

/// Gate and up, the largest matrix of a decoder layer; the weights rotate too, like those of the layers.
fn linear(c: &mut Criterion) {
    let mut op = Op::new(c, "linear", &format!("T={T} in={C} out={}", 2 * F));
    let work = 2 * T * C * 2 * F;
    let layer = || Linear::new(randn(2 * F, C), None).expect("a layer of a weight");
    let inputs = rotated(|| (layer(), randn(T, C), randn(T, 2 * F)));
    op.measure("forward", work, &inputs, |(layer, x, _)| layer.forward(x));
    op.measure("backward", work, &inputs, |(layer, _, dy)| layer.backward(dy, 1.0));
}

fn rms_norm(c: &mut Criterion) {
    let mut op = Op::new(c, "rms_norm", &format!("T={T} C={C}"));
    let weight = Tensor::ones(C, DType::F32, &DEVICE).expect("the device makes ones");
    let norm = RmsNorm { weight, eps: 1e-5 };
    let inputs = rotated(|| (randn(T, C), randn(T, C)));
    op.measure("forward", T * C, &inputs, |(x, delta)| {
        norm.forward(x, Some(ResidualAdd { delta, multiplier: 0.22 }), x.dtype())
    });
    let saved = for_each_input(&inputs, |(x, dy)| {
        let normed = norm.forward(x, None, x.dtype()).expect("the op runs");
        (dy.clone(), normed.residual, normed.rstd, randn(T, C))
    });
    op.measure("backward", T * C, &saved, |(dy, r, rstd, dresidual)| {
        norm.backward(dy, r, rstd, Some(dresidual))
    });
}

/// Queries and keys inside the rows of queries, keys and values.
fn rope(c: &mut Criterion) {
    let mut op = Op::new(c, "rope", &format!("T={T} heads={} D={D}", H + K));
    let rope = Rope::new(10_000.0);
    let table = RopeTable::new(&rope, D, 512, DType::F32, &DEVICE).expect("a table of angles");
    let inputs = rotated(|| randn(T, (H + 2 * K) * D));
    let (work, positions) = (T * (H + K) * D, (&BATCH.position_ids).into());
    op.measure_owned("forward", work, &inputs, |x| table.forward(x, H + K, positions, DType::F32));
    op.measure_owned("backward", work, &inputs, |dy| table.backward(dy, H + K, positions, DType::F32));
}

/// The target rows of the residual stream.
fn rows(c: &mut Criterion) {
    let mut op = Op::new(c, "rows", &format!("T={T} C={C} targets={TARGETS}"));
    let targets = (&BATCH.target_rows).into();
    let inputs = rotated(|| (randn(T, C), randn(TARGETS, C)));
    op.measure("forward", TARGETS * C, &inputs, |(x, _)| ops::rows::forward(x, targets));
    op.measure("backward", T * C, &inputs, |(_, dy)| ops::rows::backward(dy, targets, T));
}

/// The prefix, and the sequences that go on from its state.
fn ssd(c: &mut Criterion) {
    let mut op = Op::new(c, "ssd", &format!("T={T} I={I} M={M} N={N}"));
    let shape = SsdShape { heads: M, head_dim: I / M, state: N, groups: 1 };
    let vector = |value| Tensor::full(value, M, &DEVICE).expect("the device makes a vector");
    let weights = SsdWeights {
        a: vector(-1f32),
        d: vector(1.0),
        dt_bias: vector(-2.0),
        dt_limit: (0.0, f64::INFINITY),
    };
    let inputs = rotated(|| (randn(T, X), randn(T, M), randn(T, I)));
    fn of<'a>((xbc, dt, _): &'a (Tensor, Tensor, Tensor)) -> SsdInputs<'a> {
        SsdInputs { xbc, dt, plan: &SCAN, states: None }
    }
    op.measure("forward", T * I, &inputs, |input| ops::ssd::forward(of(input), &shape, &weights));
    op.measure("backward", T * X, &inputs, |input| {
        ops::ssd::backward((&input.2, None), of(input), &shape, &weights)
    });
}

fn swiglu(c: &mut Criterion) {
    let mut op = Op::new(c, "swiglu", &format!("T={T} F={F}"));
    let inputs = rotated(|| (randn(T, 2 * F), randn(T, F)));
    op.measure("forward", T * F, &inputs, |(gate_up, _)| ops::swiglu::forward(gate_up));
    op.measure("backward", 2 * T * F, &inputs, |(gate_up, da)| ops::swiglu::backward(da, gate_up));
}

criterion_group!(
    all, adamw, attention, conv, cross_entropy, distillation, embed, experts, gated_norm, linear, rms_norm,
    rope, rows, ssd, swiglu
);
criterion_main!(all);

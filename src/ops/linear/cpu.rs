//! The layer on the CPU: by products of bf16, by those of few rows in f32, or by `gemm` in f32 or f64 with weights that are widened if
//! they are f16 or bf16.

use super::{GroupedLinear, Linear, bf16};
use crate::Result;
use crate::ops::backend::few_rows::FewRows;
use crate::ops::cpu::{
    self, Disjoint, Gemm, Mat, MatMut, Real, UninitBuffer, View, check_same_dtype, with_real,
};
use candle_core::{DType, Tensor};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Output features of a half-precision weight that are widened at a time: 128 rows of 2,048 are 1 MB of f32, which stays in
/// the second-level cache of one core.
const WIDENED_ROWS: usize = 128;

pub(super) fn forward(layers: GroupedLinear, x: &Tensor, out: DType) -> Result<Tensor> {
    if let Some(y) = bf16::try_forward(layers, x, out)? {
        return Ok(y);
    }
    layers.first().tensor_weight("linear", x)?;
    check_same_dtype("linear", x, out)?;
    with_real!("linear", x.dtype(), T => gemm_forward::<T>(layers, x))
}

fn gemm_forward<T: Real>(layers: GroupedLinear, x: &Tensor) -> Result<Tensor> {
    let ((n, k), m) = (layers.first().dims()?, x.dims2()?.0);
    let view = View::<T>::new("linear", x)?;
    let mut out = UninitBuffer::<T>::new(m * n);
    layers.for_each_layer((&view, k), (out.as_slice(), n), |layer, part, out| {
        gemm_forward_into::<T>(layer, layer.tensor_weight("linear", x)?, part, out)
    })?;
    // SAFETY: every layer wrote its rows, which are all rows.
    unsafe { out.into_tensor((m, n)) }
}

/// Writes every element of `out`, the layer's output for `x`.
fn gemm_forward_into<T: Real>(
    layer: &Linear,
    weight: &Tensor,
    x: &[T],
    out: &mut [MaybeUninit<T>],
) -> Result<()> {
    let (n, k) = weight.dims2()?;
    let m = out.len() / n.max(1);
    let bias = layer.bias.as_ref().map(|b| b.to_dtype(T::DTYPE)).transpose()?;
    let bias = bias.as_ref().map(|b| View::<T>::new("linear", b)).transpose()?;
    let weight = GemmWeight::<T>::new(weight)?;
    if let Some(bias) = &bias {
        let bias: &[T] = bias;
        cpu::par_rows(
            out,
            n,
            #[inline(always)]
            |_, rows, _| {
                for row in rows.chunks_exact_mut(n) {
                    row.iter_mut().zip(bias).for_each(|(y, &b)| _ = y.write(b));
                }
            },
        );
    }
    let accumulate = bias.is_some();
    if let GemmWeight::Full(w) = &weight
        && let (Some(x), Some(w)) = (T::as_f32(x), T::as_f32(w))
        && let Some(product) = FewRows::forward(x, w, (m, n, k))
        && let Some(y) = T::as_f32_output(out)
    {
        // SAFETY: with a bias `out` is initialised.
        unsafe { product.write(1.0, y, accumulate) };
        return Ok(());
    }
    let y = Disjoint::new(out);
    let product = |block: Range<usize>, w: &[T], parallel| {
        let (a, b) = (Mat::rows(x, k), Mat::rows(w, k).transposed());
        let size = (m, block.len(), k);
        // SAFETY: the operands have the elements of the shapes, blocks are disjoint columns of `out`, and with a bias `out` is
        // initialised.
        unsafe {
            let y = MatMut::from_raw(y.element(block.start), n);
            cpu::gemm(&Gemm { size, a, b, scale: T::one(), accumulate, parallel }, y);
        }
    };
    match &weight {
        GemmWeight::Full(w) => product(0..n, w, true),
        GemmWeight::Half(w) => cpu::par_tasks(n.div_ceil(WIDENED_ROWS), &|i| {
            let block = i * WIDENED_ROWS..((i + 1) * WIDENED_ROWS).min(n);
            product(block.clone(), &w.widen::<T>(block.start * k..block.end * k), false);
        }),
    }
    Ok(())
}

pub(super) fn backward(layers: GroupedLinear, dy: &Tensor, scale: f64) -> Result<Tensor> {
    const OP: &str = "linear backward";
    if let Some(dx) = bf16::try_backward(layers, dy, scale)? {
        return Ok(dx);
    }
    layers.first().tensor_weight(OP, dy)?;
    with_real!(OP, dy.dtype(), T => gemm_backward::<T>(layers, dy, T::nearest(scale)))
}

fn gemm_backward<T: Real>(layers: GroupedLinear, dy: &Tensor, scale: T) -> Result<Tensor> {
    const OP: &str = "linear backward";
    let ((n, k), m) = (layers.first().dims()?, dy.dims2()?.0);
    let view = View::<T>::new(OP, dy)?;
    let mut dx = UninitBuffer::<T>::new(m * k);
    layers.for_each_layer((&view, n), (dx.as_slice(), k), |layer, part, dx| {
        gemm_backward_into::<T>(layer.tensor_weight(OP, dy)?, part, scale, dx)
    })?;
    // SAFETY: every layer wrote its rows, which are all rows.
    unsafe { dx.into_tensor((m, k)) }
}

/// Writes every element of `dx`, the gradient of the input.
fn gemm_backward_into<T: Real>(weight: &Tensor, dy: &[T], scale: T, dx: &mut [MaybeUninit<T>]) -> Result<()> {
    let (n, k) = weight.dims2()?;
    let m = dx.len() / k.max(1);
    let weight = GemmWeight::<T>::new(weight)?;
    if let GemmWeight::Full(w) = &weight
        && let (Some(dy), Some(w)) = (T::as_f32(dy), T::as_f32(w))
        && let Some(product) = FewRows::backward(dy, w, (m, n, k))
        && let Some(dx) = T::as_f32_output(dx)
    {
        // SAFETY: the product replaces `dx`.
        unsafe { product.write(scale.as_f64() as f32, dx, false) };
        return Ok(());
    }
    let (dy, dx) = (Mat::rows(dy, n), Disjoint::new(dx));
    let product = |block: Range<usize>, w: &[T]| {
        let (size, a, b) = ((m, k, block.len()), dy.skip_columns(block.start), Mat::rows(w, k));
        let product = Gemm { size, a, b, scale, accumulate: block.start > 0, parallel: true };
        // SAFETY: the operands have the elements of the shapes; `block` are columns of dy. The first product writes every
        // element, and the others run after it.
        unsafe { cpu::gemm(&product, MatMut::from_raw(dx.element(0), k)) };
    };
    match &weight {
        GemmWeight::Full(w) => product(0..n, w),
        GemmWeight::Half(w) => {
            for start in (0..n.max(1)).step_by(4 * WIDENED_ROWS) {
                let block = start..(start + 4 * WIDENED_ROWS).min(n);
                product(block.clone(), &w.widen_parallel::<T>(block.start * k..block.end * k));
            }
        }
    }
    Ok(())
}

/// A weight as `gemm` reads it.
enum GemmWeight<'a, T> {
    Full(View<'a, T>),
    Half(HalfWeight<'a>),
}

/// A weight in half precision.
enum HalfWeight<'a> {
    F16(View<'a, half::f16>),
    Bf16(View<'a, half::bf16>),
}

impl<'a, T: Real> GemmWeight<'a, T> {
    fn new(weight: &'a Tensor) -> Result<Self> {
        Ok(match weight.dtype() {
            DType::F16 => Self::Half(HalfWeight::F16(View::new("linear", weight)?)),
            DType::BF16 => Self::Half(HalfWeight::Bf16(View::new("linear", weight)?)),
            _ => Self::Full(View::new("linear", weight)?),
        })
    }
}

impl HalfWeight<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    /// The values of `range` in `T`.
    fn widen<T: Real>(&self, range: Range<usize>) -> Vec<T> {
        assert!(range.end <= self.len(), "{range:?} of {} values", self.len());
        let mut out = UninitBuffer::<T>::new(range.len());
        self.widen_into(range.start, out.as_slice());
        // SAFETY: the weight has the values of the range, so that every element was written.
        unsafe { out.into_vec() }
    }

    /// As [`HalfWeight::widen`], on all threads.
    fn widen_parallel<T: Real>(&self, range: Range<usize>) -> Vec<T> {
        assert!(range.end <= self.len(), "{range:?} of {} values", self.len());
        let mut out = UninitBuffer::<T>::new(range.len());
        cpu::par_rows(
            out.as_slice(),
            1024,
            #[inline(always)]
            |first, part, _| self.widen_into(range.start + first * 1024, part),
        );
        // SAFETY: as in `widen`.
        unsafe { out.into_vec() }
    }

    fn widen_into<T: Real>(&self, start: usize, out: &mut [MaybeUninit<T>]) {
        cpu::simd(
            #[inline(always)]
            |_| match self {
                Self::F16(w) => widen_slice(&w[start..], out, half::f16::to_f64),
                Self::Bf16(w) => widen_slice(&w[start..], out, half::bf16::to_f64),
            },
        );
    }
}

#[inline(always)]
fn widen_slice<W: Copy, T: Real>(from: &[W], out: &mut [MaybeUninit<T>], to_f64: impl Fn(W) -> f64) {
    out.iter_mut().zip(from).for_each(|(y, &x)| _ = y.write(T::nearest(to_f64(x))));
}

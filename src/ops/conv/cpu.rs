//! The convolution on the CPU, in f32 or f64; input and output may be bf16.

use super::source::{AddedRow, RowSource, added_rows};
use super::{ConvGradients, ConvInputs, ConvWeights};
use crate::Result;
use crate::ops::ScanSegment;
use crate::ops::cpu::{
    self, Fma, PART, Real, StorageFloat, StoredSlice, StoredView, UninitBuffer, View, with_real, with_storage,
};
use candle_core::{DType, Tensor, WithDType};
use std::mem::MaybeUninit;
use std::ops::Range;

pub(super) fn forward(inputs: ConvInputs, conv: &ConvWeights, out: DType) -> Result<Tensor> {
    with_storage!("conv", conv.weight.dtype(), out, T, O => {
        with_taps::<T, _>("conv", inputs, conv, forward_rows::<T, O>)
    })
}

pub(super) fn backward(
    (dy, dends): (&Tensor, Option<&Tensor>),
    inputs: ConvInputs,
    conv: &ConvWeights,
) -> Result<ConvGradients> {
    const OP: &str = "conv backward";
    with_real!(OP, conv.weight.dtype(), T => {
        let (dy, dends) = (View::<T>::new(OP, dy)?, dends.map(|d| View::<T>::new(OP, d)).transpose()?);
        let states = inputs.tails.map(|tails| tails.dims()[0]);
        with_taps::<T, _>(OP, inputs, conv, |conv| backward_rows(conv, (&dy, dends.as_deref()), states))
    })
}

pub(super) fn ends(inputs: ConvInputs, taps: usize) -> Result<Tensor> {
    match inputs.x.dtype() {
        DType::BF16 => copy_ends::<half::bf16>(inputs, taps),
        DType::F64 => copy_ends::<f64>(inputs, taps),
        _ => copy_ends::<f32>(inputs, taps),
    }
}

fn copy_ends<S: WithDType>(inputs: ConvInputs, taps: usize) -> Result<Tensor> {
    let x = View::<S>::new("conv ends", inputs.x)?;
    let tails = inputs.tails.map(|tails| View::<S>::new("conv ends", tails)).transpose()?;
    let (n, channels) = (inputs.plan.ends(), inputs.x.dims()[1]);
    let len = (taps - 1) * channels;
    let mut out = vec![S::zero(); n * len];
    for (s, segment) in inputs.plan.iter().enumerate() {
        let Some(end) = segment.end else { continue };
        let rows = out[end * len..][..len].chunks_exact_mut(channels);
        for (row, source) in rows.zip(RowSource::tail(inputs.plan, s, taps)) {
            match (source, &tails) {
                (RowSource::Row(t), _) => row.copy_from_slice(&x[t * channels..][..channels]),
                (RowSource::Tail(state, i), Some(tails)) => {
                    row.copy_from_slice(&tails[state * len + i * channels..][..channels]);
                }
                _ => {}
            }
        }
    }
    cpu::tensor(out, (n, taps - 1, channels))
}

/// Inputs and weights as slices.
struct ConvSlices<'a, T> {
    segments: &'a [ScanSegment],
    channels: usize,
    taps: usize,
    x: StoredSlice<'a, T>,
    tails: Option<StoredSlice<'a, T>>,
    /// [W, X], transposed.
    weight: Vec<T>,
    bias: &'a [T],
}

fn with_taps<T: Real, R>(
    op: &'static str,
    inputs: ConvInputs,
    conv: &ConvWeights,
    f: impl FnOnce(&ConvSlices<T>) -> Result<R>,
) -> Result<R> {
    let x = StoredView::new(op, inputs.x)?;
    let tails = inputs.tails.map(|tails| StoredView::new(op, tails)).transpose()?;
    let (weight, bias) = (View::<T>::new(op, &conv.weight)?, View::<T>::new(op, &conv.bias)?);
    let (channels, taps) = conv.weight.dims2()?;
    let mut transposed = vec![T::zero(); channels * taps];
    for (channel, taps_of) in weight.chunks_exact(taps).enumerate() {
        taps_of.iter().enumerate().for_each(|(tap, &w)| transposed[tap * channels + channel] = w);
    }
    f(&ConvSlices {
        segments: inputs.plan,
        channels,
        taps,
        x: x.as_slice(),
        tails: tails.as_ref().map(StoredView::as_slice),
        weight: transposed,
        bias: &bias,
    })
}

impl<T: Real> ConvSlices<'_, T> {
    /// The weights of the rows `d` before.
    #[inline(always)]
    fn tap(&self, d: usize, part: Range<usize>) -> &[T] {
        &self.weight[(self.taps - 1 - d) * self.channels..][part]
    }

    /// Elements of a row; `None` for zeros.
    fn row(&self, source: RowSource, part: Range<usize>) -> Option<StoredSlice<'_, T>> {
        let (values, row) = match (source, self.tails) {
            (RowSource::Row(row), _) => (self.x, row),
            (RowSource::Tail(state, row), Some(tails)) => (tails, state * (self.taps - 1) + row),
            _ => return None,
        };
        Some(values.range(row * self.channels + part.start..row * self.channels + part.end))
    }

    /// The segment of a row.
    fn segment_of(&self, row: usize) -> usize {
        self.segments.partition_point(|segment| segment.rows.end <= row)
    }

    /// Writes v of a row and a range of channels to `v`.
    #[inline(always)]
    fn preactivation(&self, (segment, row): (usize, usize), part: Range<usize>, v: &mut [T], fma: Fma) {
        v.copy_from_slice(&self.bias[part.clone()]);
        let position = (row - self.segments[segment].rows.start) as isize;
        for d in 0..self.taps {
            let source = RowSource::new(self.segments, segment, position - d as isize, self.taps);
            let weights = self.tap(d, part.clone());
            match self.row(source, part.clone()) {
                None => {}
                Some(StoredSlice::Computed(x)) => {
                    for ((v, &w), &x) in v.iter_mut().zip(weights).zip(x) {
                        *v = fma.mul_add(w, x, *v);
                    }
                }
                Some(StoredSlice::Bf16(x)) => {
                    for ((v, &w), &x) in v.iter_mut().zip(weights).zip(x) {
                        *v = fma.mul_add(w, T::widened(x), *v);
                    }
                }
            }
        }
    }
}

/// Ranges of up to [`PART`] channels.
fn parts(channels: usize) -> impl Iterator<Item = Range<usize>> {
    (0..channels).step_by(PART).map(move |first| first..(first + PART).min(channels))
}

fn forward_rows<T: Real, O: StorageFloat<T>>(conv: &ConvSlices<T>) -> Result<Tensor> {
    let channels = conv.channels;
    let rows = conv.segments.last().map_or(0, |segment| segment.rows.end);
    let mut out = UninitBuffer::<O>::new(rows * channels);
    cpu::par_rows(
        out.as_slice(),
        channels,
        #[inline(always)]
        |first, rows, fma| {
            let mut v = [T::zero(); PART];
            for (i, y) in rows.chunks_exact_mut(channels).enumerate() {
                let segment = conv.segment_of(first + i);
                for part in parts(channels) {
                    let v = &mut v[..part.len()];
                    conv.preactivation((segment, first + i), part.clone(), v, fma);
                    v.iter_mut().for_each(|v| *v = *v * cpu::sigmoid(*v, fma));
                    O::store_slice(v, &mut y[part]);
                }
            }
        },
    );
    // SAFETY: every row was written.
    unsafe { out.into_tensor((rows, channels)) }
}

/// The gradients that convolutions of rows are sums of.
struct ConvGradientSums<'a, T> {
    conv: &'a ConvSlices<'a, T>,
    /// [T, X].
    dv: &'a [T],
    /// [n, W - 1, X].
    dends: &'a [T],
    added: Vec<(RowSource, AddedRow)>,
}

impl<T: Real> ConvGradientSums<'_, T> {
    /// Adds what other segments and ends give to a row.
    #[inline(always)]
    fn add(&self, source: RowSource, out: &mut [T], fma: Fma) {
        let (channels, first) = (self.conv.channels, self.added.partition_point(|(to, _)| *to < source));
        for (_, added) in self.added[first..].iter().take_while(|(to, _)| *to == source) {
            match *added {
                AddedRow::Gradient { row, d } => self.add_row(row, d, out, fma),
                AddedRow::End(row) => {
                    out.iter_mut().zip(&self.dends[row * channels..][..channels]).for_each(|(y, &x)| *y += x);
                }
            }
        }
    }

    /// Adds `weight[W-1-d] * dv` of a row.
    #[inline(always)]
    fn add_row(&self, row: usize, d: usize, out: &mut [T], fma: Fma) {
        let (channels, weights) = (self.conv.channels, self.conv.tap(d, 0..self.conv.channels));
        for ((y, &w), &dv) in out.iter_mut().zip(weights).zip(&self.dv[row * channels..][..channels]) {
            *y = fma.mul_add(w, dv, *y);
        }
    }
}

fn backward_rows<T: Real>(
    conv: &ConvSlices<T>,
    (dy, dends): (&[T], Option<&[T]>),
    states: Option<usize>,
) -> Result<ConvGradients> {
    let (channels, taps) = (conv.channels, conv.taps);
    let rows = dy.len() / channels.max(1);
    let dv = preactivation_gradients(conv, dy);
    let added = added_rows(conv.segments, taps, dends.is_some());
    let sums = ConvGradientSums { conv, dv: &dv, dends: dends.unwrap_or_default(), added };
    let mut dx = UninitBuffer::<T>::new(rows * channels);
    cpu::par_rows(
        dx.as_slice(),
        channels,
        #[inline(always)]
        |first, rows, fma| {
            for (i, dx) in rows.chunks_exact_mut(channels).enumerate() {
                let row = first + i;
                dx.fill(MaybeUninit::new(T::zero()));
                // SAFETY: the row was filled.
                let dx = unsafe { cpu::assume_init(dx) };
                let end = conv.segments[conv.segment_of(row)].rows.end;
                // A closure here may not be inlined, and would be compiled for baseline SSE2.
                for d in 0..taps.min(end - row) {
                    sums.add_row(row + d, d, dx, fma);
                }
                sums.add(RowSource::Row(row), dx, fma);
            }
        },
    );
    // SAFETY: every row was written.
    let dx = unsafe { dx.into_tensor((rows, channels))? };
    let Some(states) = states else { return Ok(ConvGradients { x: dx, tails: None }) };
    let mut dtails = vec![T::zero(); states * (taps - 1) * channels];
    for (i, dtail) in dtails.chunks_exact_mut(channels.max(1)).enumerate() {
        cpu::simd(
            #[inline(always)]
            |fma| sums.add(RowSource::Tail(i / (taps - 1), i % (taps - 1)), dtail, fma),
        );
    }
    Ok(ConvGradients { x: dx, tails: Some(cpu::tensor(dtails, (states, taps - 1, channels))?) })
}

/// `dv = dy silu'(v)` [T, X].
fn preactivation_gradients<T: Real>(conv: &ConvSlices<T>, dy: &[T]) -> Vec<T> {
    let channels = conv.channels;
    let mut dv = UninitBuffer::<T>::new(dy.len());
    cpu::par_rows(
        dv.as_slice(),
        channels,
        #[inline(always)]
        |first, rows, fma| {
            let mut v = [T::zero(); PART];
            for (i, dv) in rows.chunks_exact_mut(channels).enumerate() {
                let segment = conv.segment_of(first + i);
                for part in parts(channels) {
                    let v = &mut v[..part.len()];
                    conv.preactivation((segment, first + i), part.clone(), v, fma);
                    let dy = &dy[(first + i) * channels..][part.clone()];
                    for ((dv, &v), &dy) in dv[part].iter_mut().zip(&*v).zip(dy) {
                        let s = cpu::sigmoid(v, fma);
                        dv.write(dy * s * fma.mul_add(v, T::one() - s, T::one()));
                    }
                }
            }
        },
    );
    // SAFETY: every row was written.
    unsafe { dv.into_vec() }
}

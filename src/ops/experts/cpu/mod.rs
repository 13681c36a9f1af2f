//! Experts on the CPU: in f32 or f64, with matrices of any dtype that `linear` multiplies.

pub(super) mod activation;

use super::Routing;
use super::routing::SortedPairs;
use crate::Result;
use crate::ops::cpu::{self, Real, UninitBuffer, View, with_real};
use crate::ops::linear::{GroupedLinear, Linear};
use candle_core::{DType, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

pub(super) fn routing(logits: &Tensor, per_token: usize) -> Result<Routing> {
    with_real!("routing", logits.dtype(), T => choose::<T>(logits, per_token))
}

fn choose<T: Real>(logits: &Tensor, k: usize) -> Result<Routing> {
    let (t, experts) = logits.dims2()?;
    let view = View::<T>::new("routing", logits)?;
    let logits: &[T] = &view;
    let (mut chosen, mut weights) = (vec![0; t * k], vec![T::zero(); t * k]);
    let rows = cpu::rows_per_task(experts);
    chosen
        .par_chunks_mut(rows * k)
        .zip(weights.par_chunks_mut(rows * k))
        .zip(logits.par_chunks(rows * experts))
        .for_each(|((chosen, weights), logits)| {
            let outputs = chosen.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
            for ((chosen, weights), logits) in outputs.zip(logits.chunks_exact(experts)) {
                choose_row(logits, chosen, weights);
            }
        });
    let sorted = sort_pairs(&chosen, (t, k), experts)?;
    let (weights, chosen) = (cpu::tensor(weights, (t, k))?, cpu::tensor(chosen, (t, k))?);
    Ok(Routing { weights, chosen, sorted, experts, dtype: T::DTYPE })
}

/// Writes the experts with the largest logits, as many as `chosen` has room for, and the softmax over their logits.
fn choose_row<T: Real>(logits: &[T], chosen: &mut [u32], weights: &mut [T]) {
    // As `torch.topk`: NaN is the largest.
    let is_larger = |a: T, b: T| a > b || (a.is_nan() && !b.is_nan());
    let (k, mut count) = (chosen.len(), 0);
    for (expert, &logit) in (0..).zip(logits) {
        // Insertion into the sorted logits so far, after those that are equal.
        let Some(place) = (0..k).find(|&j| j >= count || is_larger(logit, weights[j])) else { continue };
        let end = count.min(k - 1);
        weights.copy_within(place..end, place + 1);
        chosen.copy_within(place..end, place + 1);
        (weights[place], chosen[place]) = (logit, expert);
        count = (count + 1).min(k);
    }
    let (largest, mut sum) = (weights[0], T::zero());
    for weight in &mut *weights {
        *weight = (*weight - largest).exp();
        sum += *weight;
    }
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// Counting sort of the pairs by expert; `chosen` are the experts of `t` rows, `k` each.
fn sort_pairs(chosen: &[u32], (t, k): (usize, usize), experts: usize) -> Result<SortedPairs> {
    let mut offsets = vec![0u32; experts + 1];
    chosen.iter().for_each(|&expert| offsets[expert as usize + 1] += 1);
    for expert in 0..experts {
        offsets[expert + 1] += offsets[expert];
    }
    let (mut next, mut order, mut place) = (offsets.clone(), vec![0u32; t * k], vec![0u32; t * k]);
    for ((pair, &expert), place) in (0u32..).zip(chosen).zip(&mut place) {
        let next = &mut next[expert as usize];
        order[*next as usize] = pair;
        *place = *next;
        *next += 1;
    }
    Ok(SortedPairs {
        order: cpu::tensor(order, t * k)?,
        place: cpu::tensor(place, (t, k))?,
        offsets: cpu::tensor(offsets, experts + 1)?,
        tiles: None,
    })
}

pub(super) fn routing_backward(dweights: &Tensor, routing: &Routing) -> Result<Tensor> {
    with_real!("routing backward", routing.dtype, T => logits_gradient::<T>(dweights, routing))
}

fn logits_gradient<T: Real>(dweights: &Tensor, routing: &Routing) -> Result<Tensor> {
    const OP: &str = "routing backward";
    let (weights, dweights) = (View::<T>::new(OP, &routing.weights)?, View::<T>::new(OP, dweights)?);
    let (chosen, place) =
        (View::<u32>::new(OP, &routing.chosen)?, View::<u32>::new(OP, &routing.sorted.place)?);
    let (t, k, experts) = (routing.rows(), routing.per_token(), routing.experts);
    let mut dlogits = vec![T::zero(); t * experts];
    let pairs = chosen.chunks_exact(k).zip(place.chunks_exact(k)).zip(weights.chunks_exact(k));
    for (row, ((chosen, place), weights)) in dlogits.chunks_exact_mut(experts).zip(pairs) {
        let mean: T = weights.iter().zip(place).map(|(&p, &s)| p * dweights[s as usize]).sum();
        for ((&expert, &s), &p) in chosen.iter().zip(place).zip(weights) {
            row[expert as usize] = p * (dweights[s as usize] - mean);
        }
    }
    cpu::tensor(dlogits, (t, experts))
}

pub(super) fn gather(x: &Tensor, routing: &Routing) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 => gather_rows::<f16>(x, routing),
        DType::BF16 => gather_rows::<bf16>(x, routing),
        dtype => with_real!("experts gather", dtype, T => gather_rows::<T>(x, routing)),
    }
}

fn gather_rows<T: WithDType + num_traits::Float>(x: &Tensor, routing: &Routing) -> Result<Tensor> {
    const OP: &str = "experts gather";
    let (s, c, k) = (routing.pairs(), x.dims2()?.1, routing.per_token());
    let (x, order) = (View::<T>::new(OP, x)?, View::<u32>::new(OP, &routing.sorted.order)?);
    let (x, order): (&[T], &[u32]) = (&x, &order);
    let mut out = UninitBuffer::<T>::new(s * c);
    cpu::par_rows(
        out.as_slice(),
        c,
        #[inline(always)]
        |first, rows, _| {
            for (row, &pair) in rows.chunks_exact_mut(c.max(1)).zip(&order[first..]) {
                let from = &x[pair as usize / k * c..][..c];
                row.iter_mut().zip(from).for_each(|(y, &x)| _ = y.write(x));
            }
        },
    );
    // SAFETY: there is a pair for each of the S rows, so that every row was written.
    unsafe { out.into_tensor((s, c)) }
}

pub(super) fn combine(y: &Tensor, routing: &Routing) -> Result<Tensor> {
    with_real!("experts combine", y.dtype(), T => combine_rows::<T>(y, routing))
}

fn combine_rows<T: Real>(y: &Tensor, routing: &Routing) -> Result<Tensor> {
    const OP: &str = "experts combine";
    let (t, c, k) = (routing.rows(), y.dims2()?.1, routing.per_token());
    let (y, place) = (View::<T>::new(OP, y)?, View::<u32>::new(OP, &routing.sorted.place)?);
    let (y, place): (&[T], &[u32]) = (&y, &place);
    let mut out = UninitBuffer::<T>::new(t * c);
    cpu::par_rows(
        out.as_slice(),
        c,
        #[inline(always)]
        |first, rows, _| {
            let source = |place: u32| &y[place as usize * c..][..c];
            for (row, place) in rows.chunks_exact_mut(c.max(1)).zip(place[first * k..].chunks_exact(k)) {
                row.iter_mut().zip(source(place[0])).for_each(|(sum, &y)| _ = sum.write(y));
                // SAFETY: every element was written from the first pair.
                let row = unsafe { cpu::assume_init(row) };
                for &place in &place[1..] {
                    row.iter_mut().zip(source(place)).for_each(|(sum, &y)| *sum += y);
                }
            }
        },
    );
    // SAFETY: there are k places for each of the T rows, so that every row was written.
    unsafe { out.into_tensor((t, c)) }
}

pub(super) fn forward(experts: &[Linear], x: &Tensor, routing: &Routing, out: DType) -> Result<Tensor> {
    GroupedLinear::new(experts, &offsets("experts", routing)?)?.forward_to(x, out)
}

pub(super) fn backward(experts: &[Linear], dy: &Tensor, routing: &Routing, scale: f64) -> Result<Tensor> {
    GroupedLinear::new(experts, &offsets("experts backward", routing)?)?.backward(dy, scale)
}

fn offsets(op: &'static str, routing: &Routing) -> Result<Vec<usize>> {
    let offsets = View::<u32>::new(op, &routing.sorted.offsets)?;
    Ok(offsets.iter().map(|&offset| offset as usize).collect())
}

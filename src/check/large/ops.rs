//! The cases of each op except attention and experts.

use super::shapes::{Batch, Shape};
use super::{CHUNK, Large};
use crate::Result;
use crate::check::ResultKind::{Gradient, Value};
use crate::ops::adamw::{AdamW, AdamWStep, Parameter};
use crate::ops::cross_entropy::{self as losses, Softmax};
use crate::ops::distillation as divergence;
use crate::ops::embed::{self as embedding, EmbedLookup};
use crate::ops::rms_norm::{ResidualAdd, RmsNorm};
use crate::ops::rope::Rope;
use crate::ops::{Indices, Linear, RopeTable, autograd, rows as taken, swiglu as gated};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Rows whose logits are computed at once on a GPU.
const HEAD_ROWS: usize = 512;

/// Positions of a rotary table.
const POSITIONS: usize = 512;

/// Estimated memory of a case with this many values, inputs and results together: values are made in f32, and each has
/// its expected value next to it; `width` columns are compared [`CHUNK`] rows at a time, with the copies that autograd
/// keeps.
fn bytes(values: usize, width: usize) -> usize {
    16 * values + 40 * CHUNK * width
}

fn slice_rows(t: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    Ok(t.narrow(0, rows.start, rows.len())?)
}

fn to_f32(t: &Tensor) -> Result<Tensor> {
    Ok(t.to_dtype(DType::F32)?)
}

pub(super) fn embed(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, c, v, n) = (batch.rows(), shape.hidden, shape.vocab, batch.virtual_tokens);
    let name = format!("[{t}, {c}], {v} tokens, {n} virtual");
    large.case(&name, bytes(v * c + 2 * t * c, c), |large, case| {
        let table = large.random((v, c), 1.0)?;
        let prompts = large.random_in((n, c), 1.0, DType::F32)?;
        let lookup = EmbedLookup { ids: (&batch.packed.ids).into(), multiplier: 12.0 };
        let ours = large.run(|| embedding::forward(&table, &prompts, &lookup))?;
        let exact = embedding::reference(&to_f32(&table)?, &prompts, &lookup)?;
        let naive = embedding::reference(&table, &prompts.to_dtype(table.dtype())?, &lookup)?;
        large.compare_rows((case, "x", Value), &ours, |rows| {
            Ok((slice_rows(&exact, &rows)?, Some(slice_rows(&naive, &rows)?)))
        })?;
        let dx = large.random((t, c), 1.0)?;
        let ours = large.run(|| embedding::backward(&dx, n, &lookup))?;
        // One prompt in the first rows: each row of it occurs once.
        let exact = (to_f32(&dx.narrow(0, 0, n)?)? * 12.0)?;
        large.compare((case, "dprompts", Gradient), &ours, &exact)
    })
}

pub(super) fn linear(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (c, f, d) = (shape.hidden, shape.feed_forward, shape.head_dim);
    let (q, kv) = (shape.heads * d, 2 * shape.kv_heads * d);
    let t = batch.rows();
    for (name, rows, n, k) in [
        ("qkv", t, q + kv, c),
        ("o", t, c, q),
        ("gate_up", t, 2 * f, c),
        ("down", t, c, f),
        ("head", batch.packed.labels.len().min(HEAD_ROWS), shape.vocab, c),
    ] {
        let name = format!("{name}, [{rows}, {k}] x [{n}, {k}]ᵀ");
        large.case(&name, bytes(n * k + 2 * rows * (n + k), n + k), |large, case| {
            let weight = large.random((n, k), 0.02)?;
            let (x, dy) = (large.random((rows, k), 1.0)?, large.random((rows, n), 1.0)?);
            let layer = Linear::new(weight.clone(), None)?;
            let exact = to_f32(&weight)?;
            let ours = large.run(|| layer.forward_to(&x, x.dtype()))?;
            large.compare_rows((case, "y", Value), &ours, |rows| {
                let x = slice_rows(&x, &rows)?;
                Ok((to_f32(&x)?.matmul(&exact.t()?)?, Some(x.matmul(&weight.t()?)?)))
            })?;
            let ours = large.run(|| layer.backward(&dy, 0.22))?;
            large.compare_rows((case, "dx", Gradient), &ours, |rows| {
                let dy = slice_rows(&dy, &rows)?;
                Ok(((to_f32(&dy)?.matmul(&exact)? * 0.22)?, Some((dy.matmul(&weight)? * 0.22)?)))
            })
        })?;
    }
    Ok(())
}

pub(super) fn rms_norm(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, c) = (batch.rows(), shape.hidden);
    for add in [false, true] {
        let name = format!("[{t}, {c}]{}", if add { ", added" } else { "" });
        large.case(&name, bytes(6 * t * c, c), |large, case| norm_case(large, case, (t, c), add))?;
    }
    Ok(())
}

fn norm_case(large: &mut Large, case: &str, (t, c): (usize, usize), add: bool) -> Result<()> {
    let (x, delta) = (large.random((t, c), 3.0)?, large.random((t, c), 2.0)?);
    let (weight, dy) = (large.random(c, 1.0)?, large.random((t, c), 1.0)?);
    let exact = RmsNorm { weight: to_f32(&weight)?, eps: 1e-5 };
    let norm = RmsNorm { weight, eps: 1e-5 };
    let dtype = large.target.dtype;
    let ours = large
        .run(|| norm.forward(&x, add.then_some(ResidualAdd { delta: &delta, multiplier: 0.22 }), dtype))?;
    if add {
        large.compare_rows((case, "residual", Value), &ours.residual, |rows| {
            let (x, delta) = (slice_rows(&x, &rows)?, slice_rows(&delta, &rows)?);
            let naive = (&x + (&delta * 0.22)?)?;
            Ok(((to_f32(&x)? + (to_f32(&delta)? * 0.22)?)?, Some(naive)))
        })?;
    }
    // The norm is of the rounded residual stream, which was just compared.
    let residual = ours.residual;
    large.compare_rows((case, "normed", Value), &ours.normed, |rows| {
        let r = slice_rows(&residual, &rows)?;
        Ok((exact.reference(&to_f32(&r)?, None)?.normed, Some(norm.reference(&r, None)?.normed)))
    })?;
    large.compare_rows((case, "rstd", Value), &ours.rstd, |rows| {
        Ok((exact.reference(&to_f32(&slice_rows(&residual, &rows)?)?, None)?.rstd, None))
    })?;
    let dresidual = add.then_some(&x);
    let found = large.run(|| norm.backward(&dy, &residual, &ours.rstd, dresidual))?;
    large.compare_rows((case, "dx", Gradient), &found, |rows| {
        let (r, dy) = (slice_rows(&residual, &rows)?, slice_rows(&dy, &rows)?);
        let dresidual = dresidual.map(|x| slice_rows(x, &rows)).transpose()?;
        let of = |norm: &RmsNorm, r: &Tensor, dy: &Tensor, dresidual: Option<Tensor>| -> Result<Tensor> {
            let through = autograd(&[r], dy, |v| Ok(norm.reference(v[0].as_tensor(), None)?.normed))?;
            Ok(match dresidual {
                Some(dresidual) => (dresidual + &through[0])?,
                None => through[0].clone(),
            })
        };
        let expected = of(&exact, &to_f32(&r)?, &to_f32(&dy)?, dresidual.as_ref().map(to_f32).transpose()?)?;
        Ok((expected, Some(of(&norm, &r, &dy, dresidual)?)))
    })
}

pub(super) fn rope(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, d) = (batch.rows(), shape.head_dim);
    let (turned, all) = (shape.heads + shape.kv_heads, shape.heads + 2 * shape.kv_heads);
    let name = format!("{t} rows, {turned} of {all} heads of {d}");
    large.case(&name, bytes(3 * t * all * d, all * d), |large, case| {
        let x = large.random((t, all * d), 1.0)?;
        let table = RopeTable::new(&Rope::new(1e7), d, POSITIONS, DType::F32, large.target.device)?;
        let positions = &batch.packed.position_ids;
        for (what, sign) in [("y", 1.0), ("dx", -1.0)] {
            let ours = large.run(|| match sign > 0.0 {
                true => table.forward(x.force_contiguous()?, turned, positions.into(), x.dtype()),
                false => table.backward(x.force_contiguous()?, turned, positions.into(), x.dtype()),
            })?;
            large.compare_rows((case, what, Value), &ours, |rows| {
                let x = slice_rows(&x, &rows)?;
                let expected = table.reference(&to_f32(&x)?, turned, positions.view(rows.clone()), sign)?;
                Ok((expected, Some(table.reference(&x, turned, positions.view(rows), sign)?)))
            })?;
        }
        Ok(())
    })
}

pub(super) fn swiglu(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, f) = (batch.rows(), shape.feed_forward);
    large.case(&format!("[{t}, {f}]"), bytes(6 * t * f, 2 * f), |large, case| {
        let (x, da) = (large.random((t, 2 * f), 4.0)?, large.random((t, f), 1.0)?);
        let ours = large.run(|| gated::forward(&x))?;
        large.compare_rows((case, "a", Value), &ours, |rows| {
            let x = slice_rows(&x, &rows)?;
            Ok((gated::reference(&to_f32(&x)?)?, Some(gated::reference(&x)?)))
        })?;
        drop(ours);
        let ours = large.run(|| gated::backward(&da, &x))?;
        large.compare_rows((case, "dgate_up", Gradient), &ours, |rows| {
            let (x, da) = (slice_rows(&x, &rows)?, slice_rows(&da, &rows)?);
            let of = |x: &Tensor, da: &Tensor| -> Result<Tensor> {
                Ok(autograd(&[x], da, |v| gated::reference(v[0].as_tensor()))?.remove(0))
            };
            Ok((of(&to_f32(&x)?, &to_f32(&da)?)?, Some(of(&x, &da)?)))
        })
    })
}

pub(super) fn cross_entropy(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (rows, vocab) = (batch.packed.labels.len().min(HEAD_ROWS), shape.vocab);
    let (scale, dloss) = (1.0 / shape.logits_scaling, 0.7);
    let softmax = Softmax { vocab, scale };
    large.case(&format!("[{rows}, {vocab}]"), bytes(6 * rows * vocab, 0), |large, case| {
        // A loss near 0 is a difference of logits of some units.
        large.unit = 1.0;
        let logits = large.random((rows, vocab), 9.0 / scale)?;
        let labels = Indices::from((0..rows).map(|i| (i * 31 % vocab) as u32).collect::<Vec<_>>());
        let ours = large.run(|| losses::forward(&logits, (&labels).into(), softmax))?;
        // By hand: candle's gradient of its log_sum_exp is off by 5e-4 in f32.
        let z = (to_f32(&logits)? * scale)?;
        let most = z.max_keepdim(1)?;
        let lse = (z.broadcast_sub(&most)?.exp()?.sum_keepdim(1)?.log()? + most)?;
        let of_label = labels.to_device(logits.device())?.unsqueeze(1)?;
        let nll = (&lse - z.gather(&of_label, 1)?)?.squeeze(1)?;
        large.compare((case, "nll", Value), &to_f32(&ours.nll)?, &nll)?;
        large.compare((case, "lse", Value), &to_f32(&ours.lse)?, &lse.squeeze(1)?)?;
        let p = z.broadcast_sub(&lse)?.exp()?;
        let minus_one = (of_label.to_dtype(DType::F32)?.ones_like()? * -1.0)?;
        let expected = (p.scatter_add(&of_label, &minus_one, 1)? * (scale * dloss))?;
        let ours = large.run(|| {
            losses::backward(logits.force_contiguous()?, (&labels).into(), softmax, &ours, &dloss.into())
        })?;
        // A gradient is a difference of probabilities.
        large.unit = scale * dloss;
        large.compare((case, "dlogits", Gradient), &ours, &expected)
    })
}

pub(super) fn distillation(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (rows, vocab) = (batch.packed.labels.len().min(HEAD_ROWS), shape.vocab);
    let (scale, dloss) = (1.0 / shape.logits_scaling, 0.7);
    let softmax = Softmax { vocab, scale };
    large.case(&format!("[{rows}, {vocab}]"), bytes(9 * rows * vocab, 0), |large, case| {
        // A divergence near 0 is a sum of differences of logits of some units.
        large.unit = 1.0;
        let (student, teacher) =
            (large.random((rows, vocab), 3.0 / scale)?, large.random((rows, vocab), 3.0 / scale)?);
        let ours = large.run(|| divergence::forward(&student, &teacher, softmax))?;
        let log_softmax = |logits: &Tensor| -> Result<Tensor> {
            let z = (to_f32(logits)? * scale)?;
            let z = z.broadcast_sub(&z.max_keepdim(1)?)?;
            Ok(z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?)?)
        };
        let (log_q, log_p) = (log_softmax(&student)?, log_softmax(&teacher)?);
        let (q, p) = (log_q.exp()?, log_p.exp()?);
        let kl = (&p * (log_p - log_q)?)?.sum(1)?;
        large.compare((case, "kl", Value), &to_f32(&ours.kl)?, &kl)?;
        let expected = ((q - p)? * (scale * dloss))?;
        let ours = large.run(|| {
            divergence::backward(student.force_contiguous()?, &teacher, softmax, &ours, &dloss.into())
        })?;
        // A gradient is a difference of probabilities.
        large.unit = scale * dloss;
        large.compare((case, "dstudent", Gradient), &ours, &expected)
    })
}

pub(super) fn rows(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, c, targets) = (batch.rows(), shape.hidden, &batch.packed.target_rows);
    let n = targets.len();
    large.case(&format!("{n} of [{t}, {c}]"), bytes(4 * t * c, c), |large, case| {
        let (x, dy) = (large.random((t, c), 1.0)?, large.random((n, c), 1.0)?);
        let numbers = targets.to_device(x.device())?;
        let ours = large.run(|| taken::forward(&x, targets.into()))?;
        large.compare((case, "y", Value), &ours, &to_f32(&x)?.index_select(&numbers, 0)?)?;
        let expected = to_f32(&x)?.zeros_like()?.index_add(&numbers, &to_f32(&dy)?, 0)?;
        let ours = large.run(|| taken::backward(&dy, targets.into(), t))?;
        large.compare((case, "dx", Gradient), &ours, &expected)?;
        let expected = (to_f32(&x)? + expected)?;
        let ours = large.run(|| taken::add(x.copy()?, &dy, targets.into()))?;
        large.compare((case, "x + dy", Value), &ours, &expected)
    })
}

pub(super) fn adamw(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (n, c) = (batch.virtual_tokens, shape.hidden);
    let adamw = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-7, weight_decay: 0.03 };
    large.case(&format!("[{n}, {c}]"), bytes(10 * n * c, 0), |large, case| {
        let value = large.random_in((n, c), 1.0, DType::F32)?;
        let (mut ours, mut expected) = (Parameter::new(&value)?, Parameter::new(&value)?);
        for step in 1..=3 {
            let gradient = large.random_in((n, c), 0.3, DType::F32)?;
            let step = AdamWStep { step, learning_rate: 0.01, max_grad_norm: 0.5 };
            ours = large.run(|| Ok(adamw.forward(&ours, &gradient, step)?.parameter))?;
            expected = adamw.reference(&expected, &gradient, step)?;
        }
        large.compare((case, "value", Value), &ours.value, &expected.value)?;
        large.compare((case, "m", Value), &ours.m, &expected.m)?;
        large.compare((case, "v", Value), &ours.v, &expected.v)
    })
}

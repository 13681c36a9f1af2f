//! The cases of each op except rope, attention, experts and those of Mamba2 layers.

use super::{CheckTarget, Checks, Comparison, Input, attention, experts, mamba2, rope};
use crate::Result;
use crate::ops::adamw::{AdamW, AdamWStep, Parameter};
use crate::ops::backend::{Route, route};
use crate::ops::cross_entropy::{self, LossWeights, Softmax};
use crate::ops::distillation;
use crate::ops::embed::{self, EmbedLookup};
use crate::ops::rms_norm::{ResidualAdd, RmsNorm};
use crate::ops::{Indices, Linear, autograd, rows, swiglu};
use candle_core::{DType, Device, Tensor};

/// Names of the ops that [`ops`] checks.
pub const OPS: [&str; 14] = [
    "embed", "linear", "rms_norm", "rope", "rows", "attention", "swiglu", "experts", "conv", "ssd",
    "gated_norm", "cross_entropy", "distillation", "adamw",
];

/// Compares the op of this name with the CPU at odd and at usual shapes.
///
/// # Errors
/// Returns an error if the name is not in [`OPS`] or a device operation fails.
pub fn ops(target: &CheckTarget, name: &str) -> Result<Vec<Comparison>> {
    let Some(op) = OPS.into_iter().find(|op| *op == name) else {
        return Err(crate::Error::Invalid(format!("expected one of {OPS:?}, found {name}")));
    };
    let mut checks = Checks::new(target, op);
    match op {
        "embed" => embed(&mut checks)?,
        "linear" => linear(&mut checks)?,
        "rms_norm" => rms_norm(&mut checks)?,
        "rope" => rope::check(&mut checks)?,
        "rows" => rows(&mut checks)?,
        "attention" => attention::check(&mut checks)?,
        "swiglu" => swiglu(&mut checks)?,
        "experts" => experts::check(&mut checks)?,
        "conv" => mamba2::conv(&mut checks)?,
        "ssd" => mamba2::ssd(&mut checks)?,
        "gated_norm" => mamba2::gated_norm(&mut checks)?,
        "cross_entropy" => cross_entropy(&mut checks)?,
        "distillation" => distillation(&mut checks)?,
        _ => adamw(&mut checks)?,
    }
    Ok(checks.finish())
}

fn embed(checks: &mut Checks) -> Result<()> {
    for (t, c, vocab, n) in
        [(1, 4, 3, 1), (5, 123, 17, 6), (123, 5, 17, 6), (40, 576, 9, 11), (3, 2048, 5, 2)]
    {
        checks.case(format!("[{t}, {c}], {vocab} tokens, {n} virtual"));
        let table = checks.random((vocab, c), 1.0)?;
        let prompts = checks.random_in((n, c), 1.0, DType::F32)?;
        let id = |row: usize| match row.checked_sub(vocab) {
            None => row as u32,
            Some(j) => embed::virtual_id(j as u32),
        };
        let ids = Indices::from((0..t).map(|i| id((i * 7 + vocab) % (vocab + n))).collect::<Vec<_>>());
        let lookup = EmbedLookup { ids: (&ids).into(), multiplier: 12.0 };
        let exact = embed::forward(&table.exact, &prompts.exact, &lookup)?;
        let ours = checks.run(|| embed::forward(&table.device, &prompts.device, &lookup))?;
        let naive = embed::reference(&table.cpu, &prompts.cpu.to_dtype(checks.dtype())?, &lookup)?;
        checks.value("x", &ours, &exact, &naive)?;
        let dx = checks.random((t, c), 1.0)?;
        let exact = embed::backward(&dx.exact, n, &lookup)?;
        let ours = checks.run(|| embed::backward(&dx.device, n, &lookup))?;
        let rounded = exact.to_dtype(checks.dtype())?;
        checks.gradient("dprompts", &ours, &exact, &rounded)?;
    }
    Ok(())
}

fn linear(checks: &mut Checks) -> Result<()> {
    for (t, n, k) in [(1, 1, 1), (5, 123, 31), (123, 300, 64), (64, 256, 512)] {
        checks.case(format!("[{t}, {k}] x [{n}, {k}]ᵀ"));
        let (weight, bias) = (checks.random((n, k), 0.1)?, checks.random(n, 1.0)?);
        let (x, dy) = (checks.random((t, k), 1.0)?, checks.random((t, n), 1.0)?);
        let layer = |of: fn(&Input) -> &Tensor| Linear::new(of(&weight).clone(), Some(of(&bias).clone()));
        let (exact, naive, device) = (layer(|i| &i.exact)?, layer(|i| &i.cpu)?, layer(|i| &i.device)?);
        let ours = checks.run(|| device.forward(&x.device))?;
        checks.value("y", &ours, &exact.forward(&x.exact)?, &naive.reference(&x.cpu)?)?;
        let ours = checks.run(|| device.backward(&dy.device, 0.22))?;
        let naive = (dy.cpu.matmul(&weight.cpu)? * 0.22)?;
        checks.gradient("dx", &ours, &exact.backward(&dy.exact, 0.22)?, &naive)?;
    }
    Ok(())
}

fn rms_norm(checks: &mut Checks) -> Result<()> {
    // A row of one element has a gradient near 0, the difference of two terms of some units.
    checks.unit = 1.0;
    for (t, c) in [(1, 1), (5, 123), (123, 5), (7, 576), (3, 2048), (2, 4100), (2, 10_000)] {
        for add in [false, true] {
            checks.case(format!("[{t}, {c}]{}", if add { ", added" } else { "" }));
            let (x, delta) = (checks.random((t, c), 3.0)?, checks.random((t, c), 2.0)?);
            let (weight, dy) = (checks.random(c, 1.0)?, checks.random((t, c), 1.0)?);
            let norm = |w: &Tensor| RmsNorm { weight: w.clone(), eps: 1e-5 };
            let (exact_norm, naive_norm) = (norm(&weight.exact), norm(&weight.cpu));
            let device_norm = norm(&weight.device);
            let with = |delta| add.then_some(ResidualAdd { delta, multiplier: 0.22 });
            let ours = checks.run(|| device_norm.forward(&x.device, with(&delta.device), checks.dtype()))?;
            // The norm is of the rounded residual stream, as the kernel keeps it.
            let residual = checks.input(&match add {
                true => exact_norm
                    .forward(&x.exact, with(&delta.exact), x.exact.dtype())?
                    .residual
                    .to_dtype(checks.dtype())?,
                false => x.cpu.clone(),
            })?;
            let naive = naive_norm.reference(&x.cpu, with(&delta.cpu))?;
            let summed = exact_norm.forward(&x.exact, with(&delta.exact), x.exact.dtype())?.residual;
            checks.value("residual", &ours.residual, &summed, &naive.residual)?;
            let exact = exact_norm.forward(&residual.exact, None, x.exact.dtype())?;
            let naive = naive_norm.reference(&residual.cpu, None)?;
            checks.value("normed", &ours.normed, &exact.normed, &naive.normed)?;
            checks.value("rstd", &ours.rstd, &exact.rstd, &naive.normed)?;
            let rstd = checks.input(&exact.rstd.to_dtype(DType::F32)?)?;
            let dresidual = |i: &Tensor| add.then_some(i.clone());
            let exact =
                exact_norm.backward(&dy.exact, &residual.exact, &rstd.exact, dresidual(&x.exact).as_ref())?;
            let ours = checks.run(|| {
                device_norm.backward(
                    &dy.device,
                    &residual.device,
                    &rstd.device,
                    dresidual(&x.device).as_ref(),
                )
            })?;
            let through = autograd(&[&residual.cpu], &dy.cpu, |v| {
                Ok(naive_norm.reference(v[0].as_tensor(), None)?.normed)
            })?;
            let naive = if add { (&x.cpu + &through[0])? } else { through[0].clone() };
            checks.gradient("dx", &ours, &exact, &naive)?;
        }
    }
    Ok(())
}

fn rows(checks: &mut Checks) -> Result<()> {
    for (t, c, every, from) in
        [(1, 1, 1, 0), (5, 123, 2, 1), (123, 5, 3, 2), (40, 576, 40, 39), (3, 2056, 1, 0), (4, 24, 9, 9)]
    {
        let numbers = Indices::from((from..t as u32).step_by(every).collect::<Vec<_>>());
        checks.case(format!("{} of [{t}, {c}]", numbers.len()));
        let (x, dy) = (checks.random((t, c), 1.0)?, checks.random((numbers.len(), c), 1.0)?);
        let numbers = || (&numbers).into();
        let (exact, naive) = (rows::forward(&x.exact, numbers())?, rows::reference(&x.cpu, numbers())?);
        let ours = checks.run(|| rows::forward(&x.device, numbers()))?;
        checks.value("y", &ours, &exact, &naive)?;
        let (exact, naive) =
            (rows::backward(&dy.exact, numbers(), t)?, rows::backward(&dy.cpu, numbers(), t)?);
        let ours = checks.run(|| rows::backward(&dy.device, numbers(), t))?;
        checks.gradient("dx", &ours, &exact, &naive)?;
        let sum = |x: &Tensor, dy| rows::add(x.copy()?, dy, numbers());
        let (exact, naive) = (sum(&x.exact, &dy.exact)?, sum(&x.cpu, &dy.cpu)?);
        let ours = checks.run(|| sum(&x.device, &dy.device))?;
        checks.value("x + dy", &ours, &exact, &naive)?;
        // Columns in the middle, or all.
        let (column, columns) = if c < 8 { (0, c) } else { (c / 8 * 4, c / 2) };
        let leading = checks.random_in((t.div_ceil(2), columns), 1.0, DType::F32)?;
        let sum = |x: &Tensor, leading| rows::add_leading(x.copy()?, leading, column);
        let (exact, naive) = (sum(&x.exact, &leading.exact)?, sum(&x.cpu, &leading.cpu)?);
        let ours = checks.run(|| sum(&x.device, &leading.device))?;
        checks.value("x + leading", &ours, &exact, &naive)?;
    }
    Ok(())
}

fn swiglu(checks: &mut Checks) -> Result<()> {
    for (t, f) in [(1, 1), (5, 123), (123, 56), (3, 4096)] {
        checks.case(format!("[{t}, {f}]"));
        let (x, da) = (checks.random((t, 2 * f), 4.0)?, checks.random((t, f), 1.0)?);
        let ours = checks.run(|| swiglu::forward(&x.device))?;
        checks.value("a", &ours, &swiglu::forward(&x.exact)?, &swiglu::reference(&x.cpu)?)?;
        let ours = checks.run(|| swiglu::backward(&da.device, &x.device))?;
        let naive = autograd(&[&x.cpu], &da.cpu, |v| swiglu::reference(v[0].as_tensor()))?;
        checks.gradient("dgate_up", &ours, &swiglu::backward(&da.exact, &x.exact)?, &naive[0])?;
    }
    Ok(())
}

fn cross_entropy(checks: &mut Checks) -> Result<()> {
    // A loss near 0 is a difference of logits of some units, a gradient near 0 one of probabilities.
    checks.unit = 1.0;
    for (rows, vocab, width) in [
        (1, 2, 2),
        (5, 123, 123),
        (5, 123, 128),
        (3, 1, 64),
        (4, 77, 83),
        (19, 1000, 1000),
        (1, 49_155, 49_155),
        (2, 49_155, 49_216),
    ] {
        checks.case(format!("[{rows}, {vocab} in {width}]"));
        let softmax = Softmax { vocab, scale: 0.5 };
        // The padding columns after the vocabulary have values as large as the others.
        let logits = checks.random((rows, width), 9.0)?;
        let labels = Indices::from((0..rows).map(|i| (i * 31 % vocab) as u32).collect::<Vec<_>>());
        let exact = cross_entropy::forward(&logits.exact, (&labels).into(), softmax)?;
        let ours = checks.run(|| cross_entropy::forward(&logits.device, (&labels).into(), softmax))?;
        // Losses are f32 in every dtype: the logits were rounded before.
        let f32s = |t: &Tensor| t.to_dtype(DType::F32);
        checks.value("nll", &ours.nll, &exact.nll, &f32s(&exact.nll)?)?;
        checks.value("lse", &ours.lse, &exact.lse, &f32s(&exact.lse)?)?;
        let dloss = loss_weights(checks, rows)?;
        let naive = autograd(&[&logits.exact], &dloss.exact, |v| {
            cross_entropy::reference(v[0].as_tensor(), (&labels).into(), softmax)
        })?;
        let naive = naive[0].to_dtype(checks.dtype())?;
        let weights = LossWeights::PerRow(dloss.exact);
        let exact =
            cross_entropy::backward(logits.exact.copy()?, (&labels).into(), softmax, &exact, &weights)?;
        let losses = ours;
        let gradient = |dloss: LossWeights| {
            checks.run(|| {
                cross_entropy::backward(logits.device.copy()?, (&labels).into(), softmax, &losses, &dloss)
            })
        };
        let (ours, uniform) = (gradient(LossWeights::PerRow(dloss.device))?, gradient(0.7.into())?);
        checks.gradient("dlogits", &ours, &exact, &naive)?;
        first_row_is_that_of_one_weight(checks, &ours, &uniform)?;
        padding_is_zero(checks, "padding of dlogits", &ours, vocab)?;
    }
    Ok(())
}

/// What the losses of `rows` rows count, 0.7 in the first; f32 values, which the CPU takes in f64 as it takes all losses.
fn loss_weights(checks: &Checks, rows: usize) -> Result<Input> {
    let weights: Vec<f32> = (0..rows).map(|row| 0.7 / (1 + row % 4) as f32).collect();
    let mut input = checks.input(&Tensor::from_vec(weights, rows, &Device::Cpu)?)?;
    if checks.run(|| Ok(route(&input.device)))? == Route::Cpu {
        input.device = input.exact.clone();
    }
    Ok(input)
}

/// The first row of `per_row`, whose weight is 0.7, is bit for bit that of a gradient with this weight in all rows.
fn first_row_is_that_of_one_weight(checks: &mut Checks, per_row: &Tensor, uniform: &Tensor) -> Result<()> {
    let [ours, expected] = [per_row, uniform].map(|gradient| gradient.narrow(0, 0, 1));
    let expected = expected?.to_device(&Device::Cpu)?;
    let exact = expected.to_dtype(DType::F64)?;
    checks.value("row of a weight of its own", &ours?, &exact, &expected)
}

/// The gradient of logits has zeros in the columns after the vocabulary.
fn padding_is_zero(checks: &mut Checks, what: &'static str, dlogits: &Tensor, vocab: usize) -> Result<()> {
    let width = dlogits.dims2()?.1;
    if width == vocab {
        return Ok(());
    }
    let padding = dlogits.narrow(1, vocab, width - vocab)?;
    let zeros = padding.zeros_like()?.to_device(&Device::Cpu)?;
    checks.value(what, &padding, &zeros.to_dtype(DType::F64)?, &zeros)
}

fn distillation(checks: &mut Checks) -> Result<()> {
    // A divergence near 0 is a sum of differences of logits of some units, a gradient near 0 a difference of probabilities.
    checks.unit = 1.0;
    for (rows, vocab, width) in [
        (1, 2, 2),
        (5, 123, 123),
        (5, 123, 128),
        (3, 1, 64),
        (4, 77, 83),
        (19, 1000, 1000),
        (1, 49_155, 49_216),
    ] {
        checks.case(format!("[{rows}, {vocab} in {width}]"));
        let softmax = Softmax { vocab, scale: 0.5 };
        let (student, teacher) = (checks.random((rows, width), 9.0)?, checks.random((rows, width), 9.0)?);
        let exact = distillation::forward(&student.exact, &teacher.exact, softmax)?;
        let ours = checks.run(|| distillation::forward(&student.device, &teacher.device, softmax))?;
        // Divergences are f32 in every dtype: the logits were rounded before.
        for (what, ours, exact) in [
            ("kl", &ours.kl, &exact.kl),
            ("student's lse", &ours.student_lse, &exact.student_lse),
            ("teacher's lse", &ours.teacher_lse, &exact.teacher_lse),
        ] {
            checks.value(what, ours, exact, &exact.to_dtype(DType::F32)?)?;
        }
        let dloss = loss_weights(checks, rows)?;
        let naive = autograd(&[&student.exact], &dloss.exact, |v| {
            distillation::reference(v[0].as_tensor(), &teacher.exact, softmax)
        })?;
        let naive = naive[0].to_dtype(checks.dtype())?;
        let weights = LossWeights::PerRow(dloss.exact);
        let exact = distillation::backward(student.exact.copy()?, &teacher.exact, softmax, &exact, &weights)?;
        let divergences = ours;
        let gradient = |dloss: LossWeights| {
            checks.run(|| {
                let student = student.device.copy()?;
                distillation::backward(student, &teacher.device, softmax, &divergences, &dloss)
            })
        };
        let (ours, uniform) = (gradient(LossWeights::PerRow(dloss.device))?, gradient(0.7.into())?);
        checks.gradient("dstudent", &ours, &exact, &naive)?;
        first_row_is_that_of_one_weight(checks, &ours, &uniform)?;
        padding_is_zero(checks, "padding of dstudent", &ours, vocab)?;
        // The student learned all: a divergence of exactly 0.
        let same = checks.run(|| distillation::forward(&teacher.device, &teacher.device.copy()?, softmax))?;
        let zeros = same.kl.zeros_like()?.to_device(&Device::Cpu)?;
        checks.value("kl of equal logits", &same.kl, &zeros.to_dtype(DType::F64)?, &zeros)?;
    }
    Ok(())
}

fn adamw(checks: &mut Checks) -> Result<()> {
    let adamw = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-7, weight_decay: 0.03 };
    for (n, c) in [(1, 1), (5, 123), (100, 600), (25, 4096)] {
        for max_grad_norm in [0.0, 0.5] {
            checks.case(format!("[{n}, {c}], norm limit {max_grad_norm}"));
            let value = checks.random_in((n, c), 1.0, DType::F32)?;
            let mut exact = Parameter::new(&value.exact)?;
            let mut ours = Parameter::new(&value.device)?;
            for step in 1..=3 {
                let gradient = checks.random_in((n, c), 0.3, DType::F32)?;
                let step = AdamWStep { step, learning_rate: 0.01, max_grad_norm };
                let expected = adamw.forward(&exact, &gradient.exact, step)?;
                let found = checks.run(|| adamw.forward(&ours, &gradient.device, step))?;
                (exact, ours) = (expected.parameter, found.parameter);
                let number = |x: f64| Tensor::new(x, &Device::Cpu);
                for (what, ours, exact) in [
                    ("gradient norm", found.grad_norm, expected.grad_norm),
                    ("value norm", found.value_norm, expected.value_norm),
                ] {
                    let (ours, exact) = (number(ours.value()?)?, number(exact.value()?)?);
                    checks.value(what, &ours, &exact, &exact.to_dtype(DType::F32)?)?;
                }
            }
            for (what, ours, exact) in
                [("value", &ours.value, &exact.value), ("m", &ours.m, &exact.m), ("v", &ours.v, &exact.v)]
            {
                checks.value(what, ours, exact, &exact.to_dtype(DType::F32)?)?;
            }
        }
    }
    Ok(())
}

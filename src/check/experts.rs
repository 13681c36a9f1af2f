//! The cases of experts. The choice is a step function of the logits; both sides have the same rounded ones.

use super::{Checks, Input, ResultKind};
use crate::Result;
use crate::ops::experts::{activation_backward, activation_forward};
use crate::ops::{ExpertLinear, Linear, Routing};
use candle_core::{DType, Device, Tensor};

/// Rows, experts, experts of a row, hidden size, size of an expert: odd ones; experts without a row, and with more rows than a
/// tile of a product; more pairs than a block sorts; more choices than a warp has lanes; more columns than a tile, and
/// more values of a sum than all stages, of the tensor cores' products.
const SHAPES: [[usize; 5]; 8] = [
    [1, 1, 1, 1, 1],
    [5, 7, 3, 123, 31],
    [123, 32, 8, 40, 24],
    [4, 128, 10, 200, 24],
    [270, 3, 2, 48, 24],
    [3, 40, 37, 16, 8],
    [70, 2, 1, 24, 136],
    [150, 2, 1, 200, 72],
];

pub(super) fn check(checks: &mut Checks) -> Result<()> {
    // A gradient of the logits is a difference of terms of some units.
    checks.unit = 1.0;
    for shape @ [t, experts, per_token, c, f] in SHAPES {
        for tied in [false, true] {
            let name = format!("[{t}, {c}], {per_token} of {experts} experts of {f}");
            checks.case(if tied { format!("{name}, equal logits") } else { name });
            let mut logits = checks.random((t, experts), 1.5)?;
            if tied {
                logits =
                    checks.input(&logits.cpu.to_dtype(DType::F32)?.round()?.to_dtype(checks.dtype())?)?;
            }
            let exact = Routing::new(&logits.exact, per_token)?;
            let ours = checks.run(|| Routing::new(&logits.device, per_token))?;
            compare(checks, "weights", ResultKind::Value, ours.weights(), exact.weights())?;
            let wrong = differences(ours.chosen(), exact.chosen())?;
            let none = wrong.zeros_like()?;
            checks.value("chosen", &wrong, &none, &none)?;
            rows(checks, (&ours, &exact), c)?;
            if !tied {
                products(checks, (&ours, &exact), shape)?;
                activation(checks, (&ours, &exact), f)?;
            }
        }
    }
    Ok(())
}

/// Compares with `exact`, of which plain ops lose only its rounding.
fn compare(
    checks: &mut Checks,
    what: &'static str,
    kind: ResultKind,
    ours: &Tensor,
    exact: &Tensor,
) -> Result<()> {
    checks.compare((what, kind), ours, exact, &exact.to_dtype(checks.dtype())?)
}

/// 1 for each number that differs, 0 for others.
fn differences(ours: &Tensor, exact: &Tensor) -> Result<Tensor> {
    Ok(ours.to_device(&Device::Cpu)?.ne(exact)?.to_dtype(DType::F64)?)
}

fn rows(checks: &mut Checks, (ours, exact): (&Routing, &Routing), c: usize) -> Result<()> {
    let (x, y) = (checks.random((exact.rows(), c), 1.0)?, checks.random((exact.pairs(), c), 1.0)?);
    let gathered = checks.run(|| ours.gather(&x.device))?;
    compare(checks, "gathered", ResultKind::Value, &gathered, &exact.gather(&x.exact)?)?;
    let sum = checks.run(|| ours.combine(&y.device))?;
    compare(checks, "sum", ResultKind::Value, &sum, &exact.combine(&y.exact)?)?;
    let dweights = checks.random_in(exact.pairs(), 1.0, DType::F32)?;
    let dlogits = checks.run(|| ours.backward(&dweights.device))?;
    compare(checks, "dlogits", ResultKind::Gradient, &dlogits, &exact.backward(&dweights.exact)?)
}

fn products(
    checks: &mut Checks,
    (ours, exact): (&Routing, &Routing),
    [_, experts, _, c, f]: [usize; 5],
) -> Result<()> {
    let (n, k) = (2 * f, c);
    let weight = checks.random((experts * n, k), 0.1)?;
    let (x, dy) = (checks.random((exact.pairs(), k), 1.0)?, checks.random((exact.pairs(), n), 1.0)?);
    let layer =
        |of: fn(&Input) -> &Tensor| ExpertLinear::new(Linear::new(of(&weight).clone(), None)?, experts);
    let (exact_layer, device_layer) = (layer(|i| &i.exact)?, layer(|i| &i.device)?);
    let y = checks.run(|| device_layer.forward_to(&x.device, ours, x.device.dtype()))?;
    let expected = exact_layer.forward_to(&x.exact, exact, DType::F64)?;
    compare(checks, "y", ResultKind::Value, &y, &expected)?;
    let dx = checks.run(|| device_layer.backward(&dy.device, ours, 0.22))?;
    compare(checks, "dx", ResultKind::Gradient, &dx, &exact_layer.backward(&dy.exact, exact, 0.22)?)
}

fn activation(checks: &mut Checks, (ours, exact): (&Routing, &Routing), f: usize) -> Result<()> {
    let pairs = exact.pairs();
    let (h, da) = (checks.random((pairs, 2 * f), 4.0)?, checks.random((pairs, f), 1.0)?);
    let a = checks.run(|| activation_forward(&h.device, ours))?;
    compare(checks, "a", ResultKind::Value, &a, &activation_forward(&h.exact, exact)?)?;
    let (dh, dweights) = checks.run(|| activation_backward(&da.device, &h.device, ours))?;
    let expected = activation_backward(&da.exact, &h.exact, exact)?;
    compare(checks, "dh", ResultKind::Gradient, &dh, &expected.0)?;
    compare(checks, "dweights", ResultKind::Gradient, &dweights, &expected.1)
}

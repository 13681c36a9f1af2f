//! The cases of the ops of Mamba2 layers. The kernels compute in f32 from the inputs' exact values, so that a result may err by its
//! rounding alone.

use super::{Checks, Input, ResultKind};
use crate::Result;
use crate::ops::conv::{self, ConvInputs, ConvWeights};
use crate::ops::gated_norm::GatedNorm;
use crate::ops::ssd::{self, SsdInputs, SsdShape, SsdWeights};
use crate::ops::{ScanPlan, ScanStart};
use candle_core::{DType, Device, Tensor};

/// Batches, each with the number of given states.
fn plans() -> Vec<(&'static str, ScanPlan, usize)> {
    use ScanStart::{Segment, State, Zero};
    let plan = ScanPlan::with_lengths;
    let prefixes = [(1, Zero), (2, Zero), (21, Zero), (5, Segment(0)), (1, Segment(1)), (4, Segment(2))];
    let sequences = [(17, Segment(2)), (1, Segment(2)), (8, Segment(2))];
    vec![
        ("one row", plan(&[(1, Zero)], &[]), 0),
        ("prefixes in the batch", plan(&[&prefixes[..], &sequences].concat(), &[2]), 0),
        (
            "prefixes of another pass",
            plan(
                &[
                    (2, State(1)),
                    (9, State(0)),
                    (1, Segment(1)),
                    (6, Segment(0)),
                    (0, Segment(2)),
                    (0, State(1)),
                ],
                &[4, 0, 3, 5],
            ),
            3,
        ),
        ("a row each", plan(&[(1, State(2)), (1, State(0)), (1, State(1))], &[0, 1, 2]), 3),
    ]
}

fn rows(plan: &ScanPlan) -> usize {
    plan.last().map_or(0, |segment| segment.rows.end)
}

impl Checks<'_> {
    /// As [`Checks::compare`], where plain ops are the exact result, rounded.
    fn compare_rounded(
        &mut self,
        what: &'static str,
        kind: ResultKind,
        ours: &Tensor,
        exact: &Tensor,
    ) -> Result<()> {
        let rounded = exact.to_dtype(self.dtype())?;
        self.compare((what, kind), ours, exact, &rounded)
    }

    /// Compares results that both sides have, or neither.
    fn compare_optional(
        &mut self,
        what: &'static str,
        kind: ResultKind,
        ours: Option<&Tensor>,
        exact: Option<&Tensor>,
    ) -> Result<()> {
        match (ours, exact) {
            (Some(ours), Some(exact)) => self.compare_rounded(what, kind, ours, exact),
            (None, None) => Ok(()),
            _ => Err(crate::Error::Invalid(format!("{what}: one side has none"))),
        }
    }
}

pub(super) fn conv(checks: &mut Checks) -> Result<()> {
    for (name, plan, states) in plans() {
        for (channels, taps) in [(1, 4), (45, 4), (64, 2), (8, 1)] {
            checks.case(format!("{name}, {channels} channels, {taps} taps"));
            let (t, end_rows) = (rows(&plan), taps - 1);
            let x = checks.random((t, channels), 1.0)?;
            let tails = checks.random((states, end_rows, channels), 1.0)?;
            let dy = checks.random((t, channels), 1.0)?;
            let dends = checks.random_in((plan.ends(), end_rows, channels), 1.0, DType::F32)?;
            let weight = checks.random_in((channels, taps), 0.4, DType::F32)?;
            let bias = checks.random_in(channels, 1.0, DType::F32)?;
            let weights = |side: fn(&Input) -> &Tensor| ConvWeights {
                weight: side(&weight).clone(),
                bias: side(&bias).clone(),
            };
            let has_tails = states > 0;
            let ours = ConvInputs { x: &x.device, plan: &plan, tails: has_tails.then_some(&tails.device) };
            let exact = ConvInputs { x: &x.exact, plan: &plan, tails: has_tails.then_some(&tails.exact) };
            let (device_weights, exact_weights) = (weights(|i| &i.device), weights(|i| &i.exact));
            let y = checks.run(|| conv::forward(ours, &device_weights, checks.dtype()))?;
            let expected = conv::forward(exact, &exact_weights, DType::F64)?;
            checks.compare_rounded("y", ResultKind::Value, &y, &expected)?;
            let ends = checks.run(|| conv::ends(ours, taps))?;
            let expected = conv::ends(exact, taps)?;
            checks.compare_optional("ends", ResultKind::Value, ends.as_ref(), expected.as_ref())?;
            for has_dends in [false, true] {
                let given = |dends| (has_dends && plan.ends() > 0).then_some(dends);
                let gradients = checks
                    .run(|| conv::backward((&dy.device, given(&dends.device)), ours, &device_weights))?;
                let expected = conv::backward((&dy.exact, given(&dends.exact)), exact, &exact_weights)?;
                checks.compare_rounded("dx", ResultKind::Gradient, &gradients.x, &expected.x)?;
                let (ours, exact) = (gradients.tails.as_ref(), expected.tails.as_ref());
                checks.compare_optional("dtails", ResultKind::Gradient, ours, exact)?;
            }
        }
    }
    Ok(())
}

pub(super) fn gated_norm(checks: &mut Checks) -> Result<()> {
    // A row of one element has a gradient near 0, the difference of two terms of some units.
    checks.unit = 1.0;
    for (t, width, groups) in [(1, 1, 1), (5, 123, 1), (7, 80, 2), (3, 2400, 4), (2, 4096, 1), (0, 8, 1)] {
        checks.case(format!("[{t}, {width}] in {groups} groups"));
        let (y, z) = (checks.random((t, width), 1.0)?, checks.random((t, width), 2.0)?);
        let (weight, dn) = (checks.random_in(width, 1.0, DType::F32)?, checks.random((t, width), 1.0)?);
        let norm = |weight: &Tensor| GatedNorm { weight: weight.clone(), groups, eps: 1e-5 };
        let (device, exact_norm) = (norm(&weight.device), norm(&weight.exact));
        let ours = checks.run(|| device.forward(&y.device, &z.device, checks.dtype()))?;
        let exact = exact_norm.forward(&y.exact, &z.exact, DType::F64)?;
        checks.compare_rounded("normed", ResultKind::Value, &ours.normed, &exact.normed)?;
        checks.compare_rounded("rstd", ResultKind::Value, &ours.rstd, &exact.rstd)?;
        let rstd = checks.input(&exact.rstd.to_dtype(DType::F32)?)?;
        let exact = exact_norm.backward(&dn.exact, &y.exact, &z.exact, &rstd.exact)?;
        let ours = checks.run(|| device.backward(&dn.device, &y.device, &z.device, &rstd.device))?;
        checks.compare_rounded("dy", ResultKind::Gradient, &ours.y, &exact.y)?;
        checks.compare_rounded("dz", ResultKind::Gradient, &ours.z, &exact.z)?;
    }
    Ok(())
}

/// `n` values from `low` to `high`, in f32.
fn spread(checks: &Checks, n: usize, (low, high): (f64, f64), f: fn(f64) -> f64) -> Result<Input> {
    let value = |i: usize| f(low + (high - low) * (i as f64 + 0.5) / n as f64) as f32;
    checks.input(&Tensor::from_vec((0..n).map(value).collect::<Vec<_>>(), n, &Device::Cpu)?)
}

pub(super) fn ssd(checks: &mut Checks) -> Result<()> {
    let shape = |heads, head_dim, state, groups| SsdShape { heads, head_dim, state, groups };
    let shapes = [shape(3, 5, 7, 1), shape(4, 40, 33, 2), shape(2, 70, 16, 1), shape(5, 64, 64, 1)];
    for (name, plan, states) in plans() {
        for shape in shapes {
            let limits = if shape.groups > 1 { (0.05, 0.9) } else { (0.0, f64::INFINITY) };
            let SsdShape { heads, head_dim, state, groups } = shape;
            checks.case(format!("{name}, {heads} heads of {head_dim}, state {state}, {groups} groups"));
            ssd_case(checks, (&plan, states), shape, limits)?;
        }
    }
    Ok(())
}

fn ssd_case(
    checks: &mut Checks,
    (plan, states): (&ScanPlan, usize),
    shape: SsdShape,
    dt_limit: (f64, f64),
) -> Result<()> {
    let (t, heads, inner) = (rows(plan), shape.heads, shape.inner());
    let (a, d) =
        (spread(checks, heads, (-2.0, 2.0), |x| -x.exp())?, spread(checks, heads, (0.8, 1.2), |x| x)?);
    let dt_bias = spread(checks, heads, (1.0, -3.0), |x| x)?;
    let weights = |side: fn(&Input) -> &Tensor| SsdWeights {
        a: side(&a).clone(),
        d: side(&d).clone(),
        dt_bias: side(&dt_bias).clone(),
        dt_limit,
    };
    let (device_weights, exact_weights) = (weights(|i| &i.device), weights(|i| &i.exact));
    let xbc = checks.random((t, shape.width()), 1.0)?;
    let dt = checks.random_in((t, heads), 1.0, DType::F32)?;
    let given = checks.random_in((states, inner, shape.state), 1.0, DType::F32)?;
    let dy = checks.random((t, inner), 1.0)?;
    let dends = checks.random_in((plan.ends(), inner, shape.state), 1.0, DType::F32)?;
    let has_states = states > 0;
    let ours =
        SsdInputs { xbc: &xbc.device, dt: &dt.device, plan, states: has_states.then_some(&given.device) };
    let exact =
        SsdInputs { xbc: &xbc.exact, dt: &dt.exact, plan, states: has_states.then_some(&given.exact) };
    let output = checks.run(|| ssd::forward(ours, &shape, &device_weights))?;
    let expected = ssd::forward(exact, &shape, &exact_weights)?;
    checks.compare_rounded("y", ResultKind::Value, &output.y, &expected.y)?;
    checks.compare_optional("ends", ResultKind::Value, output.ends.as_ref(), expected.ends.as_ref())?;
    for has_dends in [false, true] {
        let given = |dends| (has_dends && plan.ends() > 0).then_some(dends);
        let gradients = checks
            .run(|| ssd::backward((&dy.device, given(&dends.device)), ours, &shape, &device_weights))?;
        let expected = ssd::backward((&dy.exact, given(&dends.exact)), exact, &shape, &exact_weights)?;
        let parts = [(0, inner, "dx"), (inner, shape.width() - inner, "dB and dC")];
        for (first, columns, what) in parts {
            let (ours, exact) =
                (gradients.xbc.narrow(1, first, columns)?, expected.xbc.narrow(1, first, columns)?);
            checks.compare_rounded(what, ResultKind::Gradient, &ours, &exact)?;
        }
        checks.compare_rounded("dr", ResultKind::Gradient, &gradients.dt, &expected.dt)?;
        let (ours, exact) = (gradients.states.as_ref(), expected.states.as_ref());
        checks.compare_optional("dstates", ResultKind::Gradient, ours, exact)?;
    }
    Ok(())
}

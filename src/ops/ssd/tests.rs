use super::plan::{CHUNK, ChunkPlan};
use super::*;
use crate::ops::{autograd, testing::*};
use candle_core::DType;

const NO_LIMIT: (f64, f64) = (0.0, f64::INFINITY);

/// Weights that remember for many rows: decays from e^-0.002 to e^-8 a row.
fn weights(shape: &SsdShape, dt_limit: (f64, f64), dtype: DType) -> Result<SsdWeights> {
    let uniform = |seed, low: f64, high: f64| -> Result<Tensor> {
        let x = randn(seed, shape.heads, DType::F64)?;
        // A smooth map of normal values into the range.
        let x = ((x * 1.5)?.tanh()? * ((high - low) / 2.0))?;
        Ok((x + (high + low) / 2.0)?.to_dtype(dtype)?)
    };
    Ok(SsdWeights {
        a: uniform(1, -2.0, 2.0)?.exp()?.neg()?,
        d: ((randn(2, shape.heads, dtype)? * 0.2)? + 1.0)?,
        dt_bias: uniform(3, -3.0, 1.0)?,
        dt_limit,
    })
}

/// Plans with the number of their given states.
fn plans() -> Vec<(ScanPlan, usize)> {
    use ScanStart::{Segment, State, Zero};
    vec![
        (ScanPlan::with_lengths(&[(1, Zero)], &[]), 0),
        (ScanPlan::with_lengths(&[(70, Zero), (3, Zero)], &[1, 0]), 0),
        // A prefix of 1 row, of 2 rows and of more than a chunk; sequences of 1 row to several chunks.
        (
            ScanPlan::with_lengths(
                &[
                    (1, Zero),
                    (2, Zero),
                    (67, Zero),
                    (5, Segment(0)),
                    (1, Segment(1)),
                    (4, Segment(2)),
                    (140, Segment(2)),
                    (1, Segment(2)),
                    (64, Segment(2)),
                ],
                &[],
            ),
            0,
        ),
        // From given states; a chain of segments; one without rows.
        (
            ScanPlan::with_lengths(
                &[
                    (2, State(1)),
                    (65, State(0)),
                    (1, Segment(1)),
                    (6, Segment(0)),
                    (0, Segment(2)),
                    (0, State(1)),
                ],
                &[4, 0, 3, 5],
            ),
            2,
        ),
        // One row each, as in generation.
        (ScanPlan::with_lengths(&[(1, State(2)), (1, State(0)), (1, State(1))], &[0, 1, 2]), 3),
    ]
}

fn shapes() -> [SsdShape; 4] {
    let shape = |heads, head_dim, state, groups| SsdShape { heads, head_dim, state, groups };
    [shape(3, 5, 7, 1), shape(4, 8, 16, 2), shape(8, 2, 5, 4), shape(6, 100, 3, 1)]
}

/// The inputs of a test.
struct Case {
    shape: SsdShape,
    weights: SsdWeights,
    xbc: Tensor,
    dt: Tensor,
    states: Tensor,
    given: usize,
}

impl Case {
    fn new(shape: SsdShape, plan: &ScanPlan, given: usize, dtype: DType) -> Result<Self> {
        let rows = plan.last().map_or(0, |segment| segment.rows.end);
        Ok(Self {
            shape,
            weights: weights(&shape, NO_LIMIT, dtype)?,
            xbc: randn(4, (rows, shape.width()), dtype)?,
            dt: randn(5, (rows, shape.heads), dtype)?,
            states: randn(6, (given.max(1), shape.inner(), shape.state), dtype)?,
            given,
        })
    }

    fn inputs<'a>(&'a self, plan: &'a ScanPlan) -> SsdInputs<'a> {
        SsdInputs { xbc: &self.xbc, dt: &self.dt, plan, states: (self.given > 0).then_some(&self.states) }
    }
}

/// y and the ends, a row for each of their rows, so that one gradient is of both.
fn joined(output: SsdOutput) -> Result<Tensor> {
    Ok(match output.ends {
        Some(ends) => {
            let width = output.y.dims()[1];
            Tensor::cat(&[output.y, ends.transpose(1, 2)?.reshape(((), width))?], 0)?
        }
        None => output.y,
    })
}

fn assert_agrees(case: &Case, plan: &ScanPlan, tolerance: Tolerance) -> Result<()> {
    let (inputs, SsdShape { state, .. }) = (case.inputs(plan), case.shape);
    let (rows, inner) = (case.xbc.dims()[0], case.shape.inner());
    let (ours, expected) =
        (forward(inputs, &case.shape, &case.weights)?, reference(inputs, &case.shape, &case.weights)?);
    assert_eq!(ours.ends.is_some(), plan.ends() > 0);
    assert_close("y and ends", &joined(ours)?, &joined(expected)?, tolerance);
    let gradient = randn(7, (rows + plan.ends() * state, inner), case.dt.dtype())?;
    let dy = gradient.narrow(0, 0, rows)?.contiguous()?;
    let dends = gradient.narrow(0, rows, plan.ends() * state)?;
    let dends = dends.reshape((plan.ends(), state, inner))?.transpose(1, 2)?.contiguous()?;
    let expected = autograd(&[&case.xbc, &case.dt, &case.states], &gradient, |v| {
        let states = inputs.states.map(|_| v[2].as_tensor());
        let inputs = SsdInputs { xbc: v[0].as_tensor(), dt: v[1].as_tensor(), plan, states };
        joined(reference(inputs, &case.shape, &case.weights)?)
    })?;
    let ours = backward((&dy, (plan.ends() > 0).then_some(&dends)), inputs, &case.shape, &case.weights)?;
    assert_close("dxbc", &ours.xbc, &expected[0], tolerance);
    assert_close("dr", &ours.dt, &expected[1], tolerance);
    assert!(max_abs(&ours.xbc)? > 0.0);
    assert_eq!(ours.states.is_some(), inputs.states.is_some());
    if let Some(dstates) = &ours.states {
        assert_close("dstates", dstates, &expected[2], tolerance);
    }
    Ok(())
}

#[test]
fn forward_and_backward_agree_with_the_recurrence() -> Result<()> {
    for (plan, states) in plans() {
        for shape in shapes() {
            assert_agrees(
                &Case::new(shape, &plan, states, DType::F64)?,
                &plan,
                Tolerance { absolute: 1e-10, relative: 1e-10 },
            )?;
        }
    }
    Ok(())
}

#[test]
fn forward_and_backward_in_f32_agree_with_the_recurrence() -> Result<()> {
    for (plan, states) in plans() {
        for shape in [shapes()[1], shapes()[3]] {
            assert_agrees(
                &Case::new(shape, &plan, states, DType::F32)?,
                &plan,
                Tolerance { absolute: 5e-4, relative: 2e-4 },
            )?;
        }
    }
    Ok(())
}

#[test]
fn clamped_steps_have_no_gradient() -> Result<()> {
    let (plan, states) = plans().swap_remove(3);
    let mut case = Case::new(shapes()[1], &plan, states, DType::F64)?;
    case.weights.dt_limit = (0.05, 0.9);
    case.dt = (case.dt * 3.0)?;
    assert_agrees(&case, &plan, Tolerance { absolute: 1e-10, relative: 1e-10 })?;
    let rows = case.xbc.dims()[0];
    let dy = randn(8, (rows, case.shape.inner()), DType::F64)?;
    let dr = backward((&dy, None), case.inputs(&plan), &case.shape, &case.weights)?.dt;
    let zeros = dr.flatten_all()?.to_vec1::<f64>()?.iter().filter(|x| **x == 0.0).count();
    assert!(zeros > rows && zeros < rows * case.shape.heads, "{zeros} steps are clamped");
    Ok(())
}

/// Steps so long that nothing is left of a row after the next, and steps above 20.
#[test]
fn long_steps_do_not_overflow() -> Result<()> {
    let plan = ScanPlan::with_lengths(&[(130, ScanStart::Zero), (3, ScanStart::Segment(0))], &[1]);
    let mut case = Case::new(shapes()[0], &plan, 0, DType::F32)?;
    case.dt = (case.dt * 40.0)?;
    let inputs = case.inputs(&plan);
    let (ours, expected) =
        (forward(inputs, &case.shape, &case.weights)?, reference(inputs, &case.shape, &case.weights)?);
    assert_close("y", &ours.y, &expected.y, Tolerance { absolute: 1e-2, relative: 1e-4 });
    let dy = randn(8, (133, case.shape.inner()), DType::F32)?;
    let gradients = backward((&dy, None), inputs, &case.shape, &case.weights)?;
    assert!(max_abs(&gradients.xbc)?.is_finite() && max_abs(&gradients.dt)?.is_finite());
    Ok(())
}

#[test]
fn a_sequence_cut_in_two_passes_has_the_same_rows_and_gradients() -> Result<()> {
    const ROWS: usize = 135;
    let tolerance = Tolerance { absolute: 1e-10, relative: 1e-10 };
    let whole = ScanPlan::with_lengths(&[(ROWS, ScanStart::Zero)], &[0]);
    for shape in [shapes()[0], shapes()[1]] {
        let case = Case::new(shape, &whole, 0, DType::F64)?;
        let output = forward(case.inputs(&whole), &shape, &case.weights)?;
        let dy = randn(8, (ROWS, shape.inner()), DType::F64)?;
        let dends = randn(9, (1, shape.inner(), shape.state), DType::F64)?;
        let expected = backward((&dy, Some(&dends)), case.inputs(&whole), &shape, &case.weights)?;
        for cut in [1, 2, 63, 64, 65, 100, 134] {
            let part = |t: &Tensor, first: bool| -> Result<Tensor> {
                let (start, len) = if first { (0, cut) } else { (cut, ROWS - cut) };
                Ok(t.narrow(0, start, len)?.contiguous()?)
            };
            let plans = [
                ScanPlan::with_lengths(&[(cut, ScanStart::Zero)], &[0]),
                ScanPlan::with_lengths(&[(ROWS - cut, ScanStart::State(0))], &[0]),
            ];
            let (xbc, dt) = (part(&case.xbc, true)?, part(&case.dt, true)?);
            let first = SsdInputs { xbc: &xbc, dt: &dt, plan: &plans[0], states: None };
            let before = forward(first, &shape, &case.weights)?;
            let (xbc, dt) = (part(&case.xbc, false)?, part(&case.dt, false)?);
            let second = SsdInputs { xbc: &xbc, dt: &dt, plan: &plans[1], states: before.ends.as_ref() };
            let after = forward(second, &shape, &case.weights)?;
            assert_close("rows", &Tensor::cat(&[before.y, after.y], 0)?, &output.y, tolerance);
            let (Some(ours), Some(ends)) = (&after.ends, &output.ends) else { panic!("end states") };
            assert_close("end", ours, ends, tolerance);
            let after = backward((&part(&dy, false)?, Some(&dends)), second, &shape, &case.weights)?;
            let before = backward((&part(&dy, true)?, after.states.as_ref()), first, &shape, &case.weights)?;
            assert_close("dxbc", &Tensor::cat(&[before.xbc, after.xbc], 0)?, &expected.xbc, tolerance);
            assert_close("dr", &Tensor::cat(&[before.dt, after.dt], 0)?, &expected.dt, tolerance);
        }
    }
    Ok(())
}

/// A prefix that is computed once gives every sequence the rows, and gets the sum of the gradients, of one that is repeated for each.
#[test]
fn a_shared_prefix_equals_the_prefix_repeated() -> Result<()> {
    let tolerance = Tolerance { absolute: 1e-10, relative: 1e-10 };
    let lens = [3, 80, 1, 20, 64, 64, 64, 64, 10];
    let rows: usize = lens.iter().sum();
    for (prefix, shape) in [(1, shapes()[0]), (2, shapes()[1]), (67, shapes()[2]), (130, shapes()[0])] {
        let mut shared = vec![(prefix, ScanStart::Zero)];
        shared.extend(lens.map(|len| (len, ScanStart::Segment(0))));
        let shared = ScanPlan::with_lengths(&shared, &[]);
        let case = Case::new(shape, &shared, 0, DType::F64)?;
        let dy = randn(8, (prefix + rows, shape.inner()), DType::F64)?;
        let y = forward(case.inputs(&shared), &shape, &case.weights)?.y;
        let gradients = backward((&dy, None), case.inputs(&shared), &shape, &case.weights)?;
        let mut sums = [gradients.xbc.narrow(0, 0, prefix)?, gradients.dt.narrow(0, 0, prefix)?];
        let mut first = prefix;
        for (i, len) in lens.into_iter().enumerate() {
            let alone = ScanPlan::with_lengths(&[(prefix + len, ScanStart::Zero)], &[]);
            let rows = |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, prefix)?, t.narrow(0, first, len)?], 0);
            let (xbc, dt, mut dy) = (rows(&case.xbc)?, rows(&case.dt)?, rows(&dy)?);
            if i > 0 {
                // The gradient of the prefix's own rows counts once.
                let zeros = Tensor::zeros((prefix, shape.inner()), DType::F64, dy.device())?;
                dy = Tensor::cat(&[zeros, dy.narrow(0, prefix, len)?], 0)?;
            }
            let inputs = SsdInputs { xbc: &xbc, dt: &dt, plan: &alone, states: None };
            let expected = forward(inputs, &shape, &case.weights)?.y;
            assert_close("rows", &y.narrow(0, first, len)?, &expected.narrow(0, prefix, len)?, tolerance);
            let expected = backward((&dy, None), inputs, &shape, &case.weights)?;
            for ((ours, expected), sum) in
                [(&gradients.xbc, &expected.xbc), (&gradients.dt, &expected.dt)].into_iter().zip(&mut sums)
            {
                assert_close(
                    "gradients",
                    &ours.narrow(0, first, len)?,
                    &expected.narrow(0, prefix, len)?,
                    tolerance,
                );
                *sum = (&*sum - expected.narrow(0, 0, prefix)?)?;
            }
            first += len;
        }
        for sum in &sums {
            assert!(max_abs(sum)? < 1e-9, "gradients of the prefix differ by {}", max_abs(sum)?);
        }
    }
    Ok(())
}

#[test]
fn inputs_in_bf16_are_computed_in_f32_and_y_is_rounded() -> Result<()> {
    for (plan, states) in plans() {
        let mut case = Case::new(shapes()[1], &plan, states, DType::F32)?;
        let bf16s = case.xbc.to_dtype(DType::BF16)?;
        case.xbc = bf16s.to_dtype(DType::F32)?;
        let inputs32 = case.inputs(&plan);
        let inputs = SsdInputs { xbc: &bf16s, ..inputs32 };
        let (ours, expected) =
            (forward(inputs, &case.shape, &case.weights)?, forward(inputs32, &case.shape, &case.weights)?);
        let rounded = expected.y.to_dtype(DType::BF16)?.to_vec2::<half::bf16>()?;
        assert_eq!(ours.y.to_vec2::<half::bf16>()?, rounded);
        if let (Some(ours), Some(expected)) = (ours.ends, expected.ends) {
            assert_eq!(ours.to_vec3::<f32>()?, expected.to_vec3::<f32>()?);
        }
        let dy = randn(8, expected.y.shape(), DType::F32)?;
        let (ours, expected) = (
            backward((&dy, None), inputs, &case.shape, &case.weights)?,
            backward((&dy, None), inputs32, &case.shape, &case.weights)?,
        );
        assert_eq!(ours.xbc.to_vec2::<f32>()?, expected.xbc.to_vec2::<f32>()?);
        assert_eq!(ours.dt.to_vec2::<f32>()?, expected.dt.to_vec2::<f32>()?);
    }
    Ok(())
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let (plan, states) = plans().swap_remove(2);
    let case = Case::new(shapes()[3], &plan, states, DType::F32)?;
    let dy = randn(8, (case.xbc.dims()[0], case.shape.inner()), DType::F32)?;
    let run = |threads: usize| -> Result<[Vec<Vec<f32>>; 3]> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(|| {
            let y = forward(case.inputs(&plan), &case.shape, &case.weights)?.y;
            let gradients = backward((&dy, None), case.inputs(&plan), &case.shape, &case.weights)?;
            Ok([y.to_vec2()?, gradients.xbc.to_vec2()?, gradients.dt.to_vec2()?])
        })
    };
    let expected = run(1)?;
    assert!([2, 3, 5].into_iter().all(|threads| run(threads).is_ok_and(|found| found == expected)));
    Ok(())
}

#[test]
fn forward_refuses_inputs_that_do_not_match() -> Result<()> {
    let good = ScanPlan::with_lengths(&[(3, ScanStart::State(0))], &[0]);
    let case = Case::new(shapes()[0], &good, 1, DType::F32)?;
    let refuses = |plan: &ScanPlan| forward(case.inputs(plan), &case.shape, &case.weights).is_err();
    assert!(!refuses(&good));
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::State(1))], &[])));
    assert!(refuses(&ScanPlan::with_lengths(&[(2, ScanStart::Zero)], &[])));
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::Segment(0))], &[])));
    let end = |rows, end| ScanSegment { rows, start: ScanStart::Zero, end };
    assert!(refuses(&vec![end(0..2, Some(0)), end(2..3, Some(0))].into()));
    assert!(refuses(&vec![end(0..3, Some(1))].into()));
    assert!(refuses(&vec![end(0..2, None), end(1..3, None)].into()));
    let other = SsdShape { groups: 2, ..case.shape };
    assert!(forward(case.inputs(&good), &other, &case.weights).is_err());
    Ok(())
}

#[test]
fn chunks_do_not_cross_the_borders_of_segments() {
    for (plan, _) in plans() {
        let ChunkPlan { chunks, blocks, runs, levels, .. } = plan.chunks();
        let mut next = 0;
        for chunk in chunks {
            assert_eq!(chunk.rows.start, next);
            assert!(!chunk.rows.is_empty() && chunk.rows.len() <= CHUNK);
            assert!(plan.iter().any(|s| s.rows.start <= next && chunk.rows.end <= s.rows.end));
            next = chunk.rows.end;
        }
        let in_blocks: Vec<usize> = blocks.iter().flat_map(|block| block.chunks.clone()).collect();
        assert_eq!(in_blocks, (0..chunks.len()).collect::<Vec<_>>());
        let in_runs: Vec<usize> = runs.iter().flat_map(|run| run.blocks.clone()).collect();
        assert_eq!(in_runs, (0..blocks.len()).collect::<Vec<_>>());
        let mut in_levels = levels.concat();
        in_levels.sort_unstable();
        assert_eq!(in_levels, (0..runs.len()).collect::<Vec<_>>());
    }
    let shared = ScanPlan::with_lengths(
        &[(70, ScanStart::Zero), (5, ScanStart::Segment(0)), (6, ScanStart::Segment(0))],
        &[],
    );
    let plan = shared.chunks();
    assert_eq!((plan.blocks.len(), plan.runs.len(), plan.levels.len()), (3, 2, 2));
    assert_eq!(plan.blocks[2].rows, 70..81);
}

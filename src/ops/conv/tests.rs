use super::*;
use crate::ops::{ScanStart, autograd, testing::*};

fn weights(channels: usize, taps: usize, dtype: DType) -> Result<ConvWeights> {
    Ok(ConvWeights { weight: (randn(1, (channels, taps), dtype)? * 0.4)?, bias: randn(2, channels, dtype)? })
}

/// Prefixes of 1, 2 and 9 rows, a sequence after each, a sequence of one row, one after a sequence of two rows, one without rows.
fn plans() -> Vec<(ScanPlan, usize)> {
    use ScanStart::{Segment, State, Zero};
    vec![
        (ScanPlan::with_lengths(&[(1, Zero)], &[]), 0),
        (ScanPlan::with_lengths(&[(7, Zero), (3, Zero)], &[1, 0]), 0),
        (
            ScanPlan::with_lengths(
                &[
                    (1, Zero),
                    (2, Zero),
                    (9, Zero),
                    (5, Segment(0)),
                    (1, Segment(1)),
                    (4, Segment(2)),
                    (2, Segment(2)),
                ],
                &[],
            ),
            0,
        ),
        (
            ScanPlan::with_lengths(
                &[(2, State(1)), (1, State(0)), (1, Segment(1)), (6, Segment(0)), (0, Segment(2))],
                &[4, 0, 3],
            ),
            2,
        ),
        (ScanPlan::with_lengths(&[(1, State(2)), (1, State(0)), (1, State(1))], &[0, 1, 2]), 3),
    ]
}

#[test]
fn forward_ends_and_backward_agree_with_the_reference() -> Result<()> {
    for (plan, states) in plans() {
        for (channels, taps) in [(1, 4), (19, 4), (600, 3), (5, 1), (8, 2)] {
            for dtype in [DType::F32, DType::F64] {
                check(&plan, states, (channels, taps), dtype)?;
            }
        }
    }
    Ok(())
}

fn check(plan: &ScanPlan, states: usize, (channels, taps): (usize, usize), dtype: DType) -> Result<()> {
    let (conv, tolerance) = (weights(channels, taps, dtype)?, Tolerance::for_dtype(dtype));
    let rows = plan.last().map_or(0, |segment| segment.rows.end);
    let x = randn(3, (rows, channels), dtype)?;
    let tails = randn(4, (states.max(1), taps - 1, channels), dtype)?;
    let given = (states > 0).then_some(&tails);
    let inputs = ConvInputs { x: &x, plan, tails: given };
    let (y, ends) = reference(inputs, &conv)?;
    assert_close("conv", &forward(inputs, &conv, dtype)?, &y, tolerance);
    let our_ends = super::ends(inputs, taps)?;
    assert_eq!(our_ends.is_some(), ends.is_some());
    if let (Some(ours), Some(expected)) = (&our_ends, &ends) {
        assert_close("ends", ours, expected, tolerance);
    }
    // y and ends as one matrix: one gradient of both.
    let joined = |inputs: ConvInputs| -> Result<Tensor> {
        let (y, ends) = reference(inputs, &conv)?;
        Ok(match ends {
            Some(ends) => Tensor::cat(&[y, ends.reshape(((), channels))?], 0)?,
            None => y,
        })
    };
    let end_rows = plan.ends() * (taps - 1);
    let gradient = randn(5, (rows + end_rows, channels), dtype)?;
    let dy = gradient.narrow(0, 0, rows)?.contiguous()?;
    let dends = gradient.narrow(0, rows, end_rows)?.reshape((plan.ends(), taps - 1, channels))?;
    let expected = autograd(&[&x, &tails], &gradient, |v| {
        let tails = given.map(|_| v[1].as_tensor());
        joined(ConvInputs { x: v[0].as_tensor(), plan, tails })
    })?;
    let ours = backward((&dy, (plan.ends() > 0).then_some(&dends)), inputs, &conv)?;
    assert_close("dx", &ours.x, &expected[0], tolerance);
    assert_eq!(ours.tails.is_some(), given.is_some());
    if let Some(dtails) = &ours.tails {
        assert_close("dtails", dtails, &expected[1], tolerance);
    }
    Ok(())
}

#[test]
fn inputs_in_bf16_are_computed_in_f32_and_the_output_is_rounded() -> Result<()> {
    for (plan, states) in plans() {
        let (conv, rows) = (weights(45, 4, DType::F32)?, plan.last().map_or(0, |s| s.rows.end));
        let (x, tails) = (randn(3, (rows, 45), DType::BF16)?, randn(4, (states.max(1), 3, 45), DType::BF16)?);
        let (x32, tails32) = (x.to_dtype(DType::F32)?, tails.to_dtype(DType::F32)?);
        let given = |tails| (states > 0).then_some(tails);
        let inputs = ConvInputs { x: &x, plan: &plan, tails: given(&tails) };
        let inputs32 = ConvInputs { x: &x32, plan: &plan, tails: given(&tails32) };
        let (ours, expected) = (forward(inputs, &conv, DType::BF16)?, forward(inputs32, &conv, DType::F32)?);
        let rounded = expected.to_dtype(DType::BF16)?.to_vec2::<half::bf16>()?;
        assert_eq!(ours.to_vec2::<half::bf16>()?, rounded);
        if let (Some(ours), Some(expected)) = (ends(inputs, 4)?, ends(inputs32, 4)?) {
            assert_eq!(ours.dtype(), DType::BF16);
            assert_eq!(ours.to_dtype(DType::F32)?.to_vec3::<f32>()?, expected.to_vec3::<f32>()?);
        }
        let dy = randn(5, (rows, 45), DType::F32)?;
        let (ours, expected) =
            (backward((&dy, None), inputs, &conv)?, backward((&dy, None), inputs32, &conv)?);
        assert_eq!(ours.x.to_vec2::<f32>()?, expected.x.to_vec2::<f32>()?);
        assert_eq!(ours.x.dtype(), DType::F32);
    }
    Ok(())
}

#[test]
fn a_sequence_cut_in_two_passes_has_the_same_rows_and_gradients() -> Result<()> {
    let conv = weights(11, 4, DType::F64)?;
    let (x, dy) = (randn(3, (9, 11), DType::F64)?, randn(4, (9, 11), DType::F64)?);
    let whole = ScanPlan::with_lengths(&[(9, ScanStart::Zero)], &[]);
    let inputs = ConvInputs { x: &x, plan: &whole, tails: None };
    let y = forward(inputs, &conv, DType::F64)?;
    let dx = backward((&dy, None), inputs, &conv)?.x;
    for cut in 1..9 {
        let part = |t: &Tensor, first: bool| -> Result<Tensor> {
            let (start, len) = if first { (0, cut) } else { (cut, 9 - cut) };
            Ok(t.narrow(0, start, len)?.contiguous()?)
        };
        let plans = [
            ScanPlan::with_lengths(&[(cut, ScanStart::Zero)], &[0]),
            ScanPlan::with_lengths(&[(9 - cut, ScanStart::State(0))], &[]),
        ];
        let (x1, x2) = (part(&x, true)?, part(&x, false)?);
        let first = ConvInputs { x: &x1, plan: &plans[0], tails: None };
        let tails = ends(first, 4)?;
        let second = ConvInputs { x: &x2, plan: &plans[1], tails: tails.as_ref() };
        let rows =
            Tensor::cat(&[forward(first, &conv, DType::F64)?, forward(second, &conv, DType::F64)?], 0)?;
        assert_close("rows", &rows, &y, Tolerance::F64);
        let after = backward((&part(&dy, false)?, None), second, &conv)?;
        let before = backward((&part(&dy, true)?, after.tails.as_ref()), first, &conv)?;
        assert_close("gradients", &Tensor::cat(&[before.x, after.x], 0)?, &dx, Tolerance::F64);
    }
    Ok(())
}

#[test]
fn forward_refuses_inputs_that_do_not_match() -> Result<()> {
    let (conv, x) = (weights(5, 4, DType::F32)?, randn(1, (3, 5), DType::F32)?);
    let tails = randn(1, (1, 3, 5), DType::F32)?;
    let refuses =
        |plan: &ScanPlan, tails| forward(ConvInputs { x: &x, plan, tails }, &conv, DType::F32).is_err();
    assert!(!refuses(&ScanPlan::with_lengths(&[(3, ScanStart::State(0))], &[]), Some(&tails)));
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::State(1))], &[]), Some(&tails)));
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::State(0))], &[]), None));
    assert!(refuses(&ScanPlan::with_lengths(&[(2, ScanStart::Zero)], &[]), None));
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::Segment(0))], &[]), None));
    let other = tails.to_dtype(DType::BF16)?;
    assert!(refuses(&ScanPlan::with_lengths(&[(3, ScanStart::State(0))], &[]), Some(&other)));
    Ok(())
}

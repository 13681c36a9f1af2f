use super::*;
use crate::ops::{autograd, testing::*};
use candle_core::{DType, Device};

const SHAPES: [(usize, usize, usize); 6] =
    [(1, 2, 2), (5, 123, 123), (5, 123, 128), (3, 2, 64), (1, 1, 1), (123, 5000, 5000)];

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (rows, vocab, width) in SHAPES {
        let softmax = Softmax { vocab, scale: 0.125 };
        for dtype in [DType::F32, DType::F64] {
            let [student, teacher] = [1, 2].map(|seed| randn(seed, (rows, width), dtype));
            let (student, teacher) = ((student? * 9.0)?, (teacher? * 9.0)?);
            let divergences = forward(&student, &teacher, softmax)?;
            let f64s = [&student.to_dtype(DType::F64)?, &teacher.to_dtype(DType::F64)?];
            let expected = reference(f64s[0], f64s[1], softmax)?;
            let tolerance = Tolerance { absolute: 1e-7, ..Tolerance::for_dtype(dtype) };
            assert_close("kl", &divergences.kl, &expected, tolerance);
            let dy = (expected.ones_like()? * 0.7)?;
            let d = autograd(&f64s[..1], &dy, |v| reference(v[0].as_tensor(), f64s[1], softmax))?;
            let ours = backward(student.copy()?, &teacher, softmax, &divergences, &0.7.into())?;
            let tolerance = Tolerance { absolute: 1e-8, ..Tolerance::for_dtype(dtype) };
            assert_close("dstudent", &ours, &d[0], tolerance);
            assert!(vocab == 1 || max_abs(&ours)? > 0.0);
        }
    }
    Ok(())
}

/// A row with a weight of its own has bit for bit the gradient of a batch in which all rows have this weight.
#[test]
fn backward_weighs_each_row_by_itself() -> Result<()> {
    let (softmax, weights) = (Softmax { vocab: 123, scale: 0.125 }, [0.7, 1.0 / 3.0, 0.01]);
    let (student, teacher) = (randn(1, (3, 128), DType::F32)?, randn(2, (3, 128), DType::F32)?);
    let divergences = forward(&student, &teacher, softmax)?;
    let per_row = LossWeights::PerRow(Tensor::new(&weights, &Device::Cpu)?);
    let gradient =
        |weights: &LossWeights| backward(student.copy()?, &teacher, softmax, &divergences, weights);
    let ours = gradient(&per_row)?.to_vec2::<f32>()?;
    for (row, weight) in weights.into_iter().enumerate() {
        assert_eq!(ours[row], gradient(&weight.into())?.to_vec2::<f32>()?[row], "row {row}");
    }
    let error = gradient(&per_row.rows(1..2)?).unwrap_err().to_string();
    assert_eq!(error, "distillation backward: expected the loss weights of 3 rows, found [1]");
    Ok(())
}

#[test]
fn backward_agrees_with_finite_differences() -> Result<()> {
    let (rows, vocab, width) = (3, 7, 9);
    let softmax = Softmax { vocab, scale: 0.4 };
    let (student, teacher) = (randn(1, (rows, width), DType::F64)?, randn(2, (rows, width), DType::F64)?);
    let loss = |student: &Tensor| -> Result<f64> {
        Ok(0.3 * forward(student, &teacher, softmax)?.kl.sum_all()?.to_scalar::<f64>()?)
    };
    let divergences = forward(&student, &teacher, softmax)?;
    let gradient =
        backward(student.copy()?, &teacher, softmax, &divergences, &0.3.into())?.to_vec2::<f64>()?;
    let values = student.to_vec2::<f64>()?;
    for row in 0..rows {
        for column in 0..width {
            let moved = |by: f64| {
                let mut values = values.clone();
                values[row][column] += by;
                loss(&Tensor::new(values, &Device::Cpu)?)
            };
            let numeric = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
            assert!((gradient[row][column] - numeric).abs() < 1e-9, "{row}, {column}");
        }
    }
    Ok(())
}

#[test]
fn forward_of_equal_logits_is_exactly_zero() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let logits = (randn(1, (5, 5000), dtype)? * 20.0)?;
        let softmax = Softmax { vocab: 4990, scale: 0.3 };
        let divergences = forward(&logits, &logits.copy()?, softmax)?;
        assert_eq!(divergences.kl.to_vec1::<f64>()?, [0.0; 5]);
        let gradient = backward(logits.copy()?, &logits, softmax, &divergences, &1.0.into())?;
        assert_eq!(max_abs(&gradient)?, 0.0);
    }
    Ok(())
}

/// A divergence of 1e-8 is a difference of numbers near 10 in the plain formula, which in f32 is rounding alone.
#[test]
fn forward_keeps_a_small_divergence() -> Result<()> {
    let student = (randn(1, (4, 5000), DType::F32)? * 4.0)?;
    let teacher = (&student + (randn(2, (4, 5000), DType::F32)? * 1e-4)?)?;
    let softmax = Softmax { vocab: 5000, scale: 1.0 };
    let exact = reference(&student.to_dtype(DType::F64)?, &teacher.to_dtype(DType::F64)?, softmax)?;
    assert!(max_abs(&exact)? < 1e-8);
    let ours = forward(&student, &teacher, softmax)?.kl;
    assert_close("kl", &ours, &exact, Tolerance { absolute: 0.0, relative: 0.02 });
    Ok(())
}

#[test]
fn forward_does_not_overflow_for_large_logits() -> Result<()> {
    let student = Tensor::new(&[[3e4f32, -3e4, 0.0]], &Device::Cpu)?;
    let teacher = Tensor::new(&[[-3e4f32, 3e4, 0.0]], &Device::Cpu)?;
    let kl = forward(&student, &teacher, Softmax { vocab: 3, scale: 1.0 })?.kl;
    assert_eq!(kl.to_vec1::<f64>()?, [6e4]);
    Ok(())
}

#[test]
fn forward_refuses_logits_of_other_shapes() -> Result<()> {
    let (student, softmax) = (randn(1, (2, 6), DType::F32)?, Softmax { vocab: 5, scale: 1.0 });
    let error = forward(&student, &randn(1, (2, 7), DType::F32)?, softmax).unwrap_err();
    let expected =
        "distillation: expected logits of the teacher as the student's, [2, 6] F32, found [2, 7] F32";
    assert_eq!(error.to_string(), expected);
    let error = forward(&student, &student, Softmax { vocab: 7, ..softmax }).unwrap_err();
    assert_eq!(error.to_string(), "distillation: expected logits of a vocabulary of 7, found [2, 6]");
    Ok(())
}

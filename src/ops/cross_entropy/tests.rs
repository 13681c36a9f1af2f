use super::*;
use crate::ops::{Indices, autograd, testing::*};
use candle_core::DType;

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (rows, vocab, width) in [(1, 2, 2), (5, 123, 123), (5, 123, 128), (3, 2, 64), (123, 5000, 5000)] {
        let softmax = Softmax { vocab, scale: 0.125 };
        for dtype in [DType::F32, DType::F64] {
            let logits = (randn(1, (rows, width), dtype)? * 9.0)?;
            let labels = Indices::from((0..rows as u32).map(|i| (i * 31) % vocab as u32).collect::<Vec<_>>());
            let labels: IndexView = (&labels).into();
            let losses = forward(&logits, labels, softmax)?;
            let expected = reference(&logits, labels, softmax)?;
            assert_close("nll", &losses.nll, &expected, Tolerance::for_dtype(dtype));
            let dy = (expected.ones_like()? * 0.7)?;
            // In f64: candle's own log_sum_exp gradient is off by 5e-4 in f32.
            let f64s = [&logits.to_dtype(DType::F64)?];
            let d =
                autograd(&f64s, &dy.to_dtype(DType::F64)?, |v| reference(v[0].as_tensor(), labels, softmax))?;
            let ours = backward(logits.copy()?, labels, softmax, &losses, &0.7.into())?;
            let tolerance = Tolerance { absolute: 1e-8, ..Tolerance::for_dtype(dtype) };
            assert_close("dlogits", &ours, &d[0], tolerance);
            assert!(max_abs(&ours)? > 0.0);
        }
    }
    Ok(())
}

/// A row with a weight of its own has bit for bit the gradient of a batch in which all rows have this weight.
#[test]
fn backward_weighs_each_row_by_itself() -> Result<()> {
    let (softmax, weights) = (Softmax { vocab: 123, scale: 0.125 }, [0.7, 1.0 / 3.0, 0.01, 0.7, 2.5]);
    let labels = Indices::from(vec![1, 5, 0, 122, 9]);
    let labels: IndexView = (&labels).into();
    for dtype in [DType::F32, DType::F64] {
        let logits = (randn(1, (5, 128), dtype)? * 9.0)?;
        let losses = forward(&logits, labels, softmax)?;
        let per_row = LossWeights::PerRow(Tensor::new(&weights, &candle_core::Device::Cpu)?);
        let gradient = |weights: &LossWeights| backward(logits.copy()?, labels, softmax, &losses, weights);
        let ours = gradient(&per_row)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        for (row, weight) in weights.into_iter().enumerate() {
            let uniform = gradient(&weight.into())?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            assert_eq!(ours[row], uniform[row], "row {row}");
        }
        let error = gradient(&per_row.rows(1..4)?).unwrap_err().to_string();
        assert_eq!(error, "cross_entropy backward: expected the loss weights of 5 rows, found [3]");
    }
    Ok(())
}

#[test]
fn forward_does_not_overflow_for_large_logits() -> Result<()> {
    let logits = Tensor::new(&[[3e4f32, -3e4, 0.0]], &candle_core::Device::Cpu)?;
    let losses = forward(&logits, (&Indices::from(vec![1])).into(), Softmax { vocab: 3, scale: 1.0 })?;
    assert_eq!(losses.nll.to_vec1::<f64>()?, [6e4]);
    Ok(())
}

#[test]
fn forward_refuses_a_label_beyond_the_vocabulary() -> Result<()> {
    let labels = Indices::from(vec![1, 5]);
    let error = forward(&randn(1, (2, 6), DType::F32)?, (&labels).into(), Softmax { vocab: 5, scale: 1.0 })
        .unwrap_err();
    assert_eq!(error.to_string(), "cross_entropy: expected 2 labels under 5, found 2 labels, one is 5");
    Ok(())
}

#[test]
fn forward_refuses_rows_narrower_than_the_vocabulary() -> Result<()> {
    let labels = Indices::from(vec![1]);
    let softmax = Softmax { vocab: 7, scale: 1.0 };
    let error = forward(&randn(1, (1, 6), DType::F32)?, (&labels).into(), softmax).unwrap_err();
    assert_eq!(error.to_string(), "cross_entropy: expected logits of a vocabulary of 7, found [1, 6]");
    Ok(())
}

use super::*;
use crate::ops::{Indices, autograd, testing::*};
use candle_core::{DType, Device};

/// Every third row of `t`, from the second on.
fn some(t: usize) -> Indices {
    (0..t as u32).filter(|row| t == 1 || row % 3 == 1).collect::<Vec<_>>().into()
}

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, c) in [(1, 1), (5, 123), (123, 5), (64, 576)] {
        for dtype in [DType::F32, DType::F64] {
            let (x, rows) = (randn(1, (t, c), dtype)?, some(t));
            let dy = randn(2, (rows.len(), c), dtype)?;
            let y = forward(&x, (&rows).into())?;
            assert_close("rows", &y, &reference(&x, (&rows).into())?, Tolerance::for_dtype(dtype));
            let expected = autograd(&[&x], &dy, |v| reference(v[0].as_tensor(), (&rows).into()))?;
            let dx = backward(&dy, (&rows).into(), t)?;
            assert_close("rows backward", &dx, &expected[0], Tolerance::for_dtype(dtype));
            assert!(max_abs(&dx)? > 0.0);
            let sum = add(x.clone(), &dy, (&rows).into())?;
            assert_close("rows add", &sum, &(&x + &expected[0])?, Tolerance::for_dtype(dtype));
        }
    }
    Ok(())
}

#[test]
fn add_leading_changes_the_first_rows_only() -> Result<()> {
    let x = Tensor::new(&[[1f32, 2., 3., 4.], [5., 6., 7., 8.], [9., 10., 11., 12.]], &Device::Cpu)?;
    let leading = Tensor::new(&[[100f32, 200.], [300., 400.]], &Device::Cpu)?;
    let sum =
        |column| -> Result<Vec<Vec<f32>>> { Ok(add_leading(x.clone(), &leading, column)?.to_vec2::<f32>()?) };
    let last = [9., 10., 11., 12.];
    assert_eq!(sum(0)?, [[101., 202., 3., 4.], [305., 406., 7., 8.], last]);
    assert_eq!(sum(1)?, [[1., 102., 203., 4.], [5., 306., 407., 8.], last]);
    assert_eq!(sum(2)?, [[1., 2., 103., 204.], [5., 6., 307., 408.], last]);
    assert!(add_leading(x.clone(), &leading, 3).is_err());
    let none = leading.narrow(1, 0, 0)?;
    assert_eq!(add_leading(x.clone(), &none, 4)?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn ops_of_no_rows_return_no_rows_and_zeros() -> Result<()> {
    let (x, none) = (randn(1, (3, 4), DType::F32)?, Indices::default());
    let y = forward(&x, (&none).into())?;
    assert_eq!(y.dims(), [0, 4]);
    assert_eq!(max_abs(&backward(&y, (&none).into(), 3)?)?, 0.0);
    assert_eq!(add(x.clone(), &y, (&none).into())?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn ops_refuse_numbers_out_of_order_or_range() -> Result<()> {
    let x = randn(1, (3, 4), DType::F32)?;
    for (numbers, found) in [(vec![1, 1], "1 before 1"), (vec![2, 0], "2 before 0"), (vec![0, 3], "3")] {
        let error = forward(&x, (&Indices::from(numbers)).into()).unwrap_err();
        let expected = format!("rows: expected ascending row numbers under 3, found {found}");
        assert_eq!(error.to_string(), expected);
    }
    let one = Indices::from(vec![1]);
    assert!(backward(&x, (&one).into(), 3).is_err(), "three gradients for one row");
    assert!(add(x.clone(), &randn(2, (1, 4), DType::F64)?, (&one).into()).is_err());
    Ok(())
}

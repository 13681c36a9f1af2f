use super::*;
use crate::ops::{Indices, autograd, testing::*};
use candle_core::DType;

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for (t, c) in [(1, 4), (5, 123), (123, 5)] {
        let (e, p) = (randn(1, (17, c), DType::F32)?, randn(2, (6, c), DType::F32)?);
        let id = |i: u32| if i % 23 < 17 { i % 23 } else { virtual_id(i % 23 - 17) };
        let ids = Indices::from((0..t as u32).map(|i| id(i * 7 + 20)).collect::<Vec<_>>());
        let lookup = EmbedLookup { ids: (&ids).into(), multiplier: 12.0 };
        let y = forward(&e, &p, &lookup)?;
        assert_close("embed", &y, &reference(&e, &p, &lookup)?, Tolerance::F32);
        let dy = randn(3, (t, c), DType::F32)?;
        let expected = autograd(&[&p], &dy, |v| reference(&e, v[0].as_tensor(), &lookup))?;
        let dp = backward(&dy, 6, &lookup)?;
        assert_close("embed backward", &dp, &expected[0], Tolerance::F32);
        assert!(max_abs(&dp)? > 0.0);
    }
    Ok(())
}

#[test]
fn forward_widens_half_precision_weights() -> Result<()> {
    let p = randn(2, (2, 8), DType::F32)?;
    for dtype in [DType::F16, DType::BF16] {
        let e = randn(1, (9, 8), DType::F32)?.to_dtype(dtype)?;
        let ids = Indices::from(vec![0, virtual_id(1), 8]);
        let lookup = EmbedLookup { ids: (&ids).into(), multiplier: 3.0 };
        assert_close("embed", &forward(&e, &p, &lookup)?, &reference(&e, &p, &lookup)?, Tolerance::F32);
    }
    Ok(())
}

#[test]
fn forward_refuses_an_id_out_of_range() -> Result<()> {
    let (e, p) = (randn(1, (3, 4), DType::F32)?, randn(2, (2, 4), DType::F32)?);
    // 3 and 4 are beyond the embedding, and no virtual tokens.
    for (id, expected) in [
        (3, "embed: expected token ids under 3, found 3"),
        (4, "embed: expected token ids under 3, found 4"),
        (5, "embed: expected token ids under 3, found 5"),
        (virtual_id(2), "embed: expected virtual tokens under 2, found 2"),
        (u32::MAX, "embed: expected virtual tokens under 2, found 2147483647"),
    ] {
        let ids = Indices::from(vec![0, virtual_id(1), id]);
        let error = forward(&e, &p, &EmbedLookup { ids: (&ids).into(), multiplier: 1.0 }).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    Ok(())
}

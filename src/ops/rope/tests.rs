use super::*;
use crate::ops::{Indices, autograd, testing::*};
use half::bf16;

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    let llama3 = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 16,
    };
    for (t, heads, d, extra) in [(1, 1, 2, 0), (5, 3, 10, 7), (123, 4, 64, 64)] {
        for (dtype, scaling) in
            [(DType::F32, RopeScaling::Default), (DType::F64, RopeScaling::Llama3(llama3))]
        {
            let table = RopeTable::new(&Rope { theta: 1e4, scaling }, d, 200, dtype, &Device::Cpu)?;
            let x = randn(1, (t, heads * d + extra), dtype)?;
            let positions = Indices::from((0..t as u32).map(|i| (i * 37) % 200).collect::<Vec<_>>());
            let positions = IndexView::from(&positions);
            let expected = table.reference(&x, heads, positions, 1.0)?;
            let dy = randn(2, x.dims2()?, dtype)?;
            let dx =
                autograd(&[&x], &dy, |v| table.reference(v[0].as_tensor(), heads, positions, 1.0))?.remove(0);
            let y = table.forward(x.copy()?, heads, positions, dtype)?;
            assert_close("rope", &y, &expected, Tolerance::for_dtype(dtype));
            let ours = table.backward(dy.copy()?, heads, positions, dtype)?;
            assert_close("rope backward", &ours, &dx, Tolerance::for_dtype(dtype));
        }
    }
    Ok(())
}

#[test]
fn forward_and_backward_to_bf16_are_those_to_f32_rounded() -> Result<()> {
    let table = RopeTable::new(&Rope::new(1e4), 10, 60, DType::F32, &Device::Cpu)?;
    let positions = Indices::from((0..50).collect::<Vec<u32>>());
    let positions = IndexView::from(&positions);
    for rotate in [RopeTable::forward, RopeTable::backward] {
        let x = randn(1, (50, 3 * 10 + 7), DType::F32)?;
        let x = x.to_dtype(DType::BF16)?;
        let x_f32 = x.to_dtype(DType::F32)?;
        let values = |t: Tensor| t.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<bf16>();
        let expected = values(rotate(&table, x_f32.copy()?, 3, positions, DType::F32)?)?;
        assert_eq!(values(rotate(&table, x_f32, 3, positions, DType::BF16)?)?, expected);
        assert_eq!(values(rotate(&table, x, 3, positions, DType::BF16)?)?, expected);
    }
    assert!(table.forward(randn(1, (50, 30), DType::F32)?, 3, positions, DType::F64).is_err());
    Ok(())
}

#[test]
fn forward_refuses_a_position_beyond_the_table() -> Result<()> {
    let rope = Rope::new(1e4);
    let table = RopeTable::new(&rope, 4, 8, DType::F32, &Device::Cpu)?;
    let error = table
        .forward(randn(1, (1, 4), DType::F32)?, 1, (&Indices::from(vec![8])).into(), DType::F32)
        .unwrap_err();
    assert!(error.to_string().contains("positions under 8, found [1, 4], positions under 9"), "{error}");
    Ok(())
}

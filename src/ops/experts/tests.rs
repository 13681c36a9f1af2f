use super::routing::SortedPairs;
use super::*;
use crate::ops::gpu::emulated::emulate;
use crate::ops::{Linear, autograd, testing::*};
use candle_core::{DType, Device};

/// A layer's experts, and a router without a matrix: its logits are given.
struct Block {
    gate_up: ExpertLinear,
    down: ExpertLinear,
    per_token: usize,
}

/// What a layer saves for its backward pass.
struct Saved {
    routing: Routing,
    h: Tensor,
}

impl Block {
    fn new([experts, per_token, c, f]: [usize; 4], dtype: DType) -> Result<Self> {
        let act = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let layer = |seed, n: usize, k: usize| -> Result<ExpertLinear> {
            let weight = (randn(seed, (experts * n, k), act)? / (k as f64).sqrt())?.to_dtype(dtype)?;
            ExpertLinear::new(Linear::new(weight, None)?.pack(act)?, experts)
        };
        Ok(Self { gate_up: layer(1, 2 * f, c)?, down: layer(2, c, f)?, per_token })
    }

    fn forward(&self, u: &Tensor, logits: &Tensor, stored: DType) -> Result<(Tensor, Saved)> {
        let routing = Routing::new(logits, self.per_token)?;
        let (out, h) = super::forward(u, &routing, [&self.gate_up, &self.down], stored)?;
        Ok((out, Saved { routing, h }))
    }

    /// Gradients of the input and of the logits.
    fn backward(&self, dout: &Tensor, Saved { routing, h }: &Saved) -> Result<[Tensor; 2]> {
        let (du, dlogits) = super::backward(dout, h, routing, [&self.gate_up, &self.down], 1.0)?;
        Ok([du, dlogits])
    }
}

/// E, k, C, F.
const SHAPES: [[usize; 4]; 5] =
    [[1, 1, 3, 1], [4, 4, 16, 8], [7, 2, 33, 21], [32, 8, 64, 48], [5, 1, 20, 700]];

#[test]
fn forward_and_backward_agree_with_the_reference() -> Result<()> {
    for shape @ [experts, per_token, c, _] in SHAPES {
        for (t, dtype) in [(1, DType::F64), (29, DType::F32), (29, DType::F64)] {
            let block = Block::new(shape, dtype)?;
            let (u, dout) = (randn(3, (t, c), dtype)?, randn(4, (t, c), dtype)?);
            let logits = (randn(5, (t, experts), dtype)? * 2.0)?;
            let f = |v: &[candle_core::Var]| {
                reference(v[0].as_tensor(), v[1].as_tensor(), [&block.gate_up, &block.down], per_token)
            };
            let expected = autograd(&[&u, &logits], &dout, f)?;
            let (out, saved) = block.forward(&u, &logits, dtype)?;
            let [du, dlogits] = block.backward(&dout, &saved)?;
            let (half, _) =
                super::backward(&dout, &saved.h, &saved.routing, [&block.gate_up, &block.down], 0.5)?;
            assert_close("half", &(half * 2.0)?, &du, Tolerance::for_dtype(dtype));
            let tolerance = Tolerance::for_dtype(dtype);
            let y = reference(&u, &logits, [&block.gate_up, &block.down], per_token)?;
            assert_close("experts", &out, &y, tolerance);
            assert_close("experts backward", &du, &expected[0], tolerance);
            assert_close("routing backward", &dlogits, &expected[1], tolerance);
            assert!(max_abs(&du)? > 0.0 && (per_token == 1 || max_abs(&dlogits)? > 0.0));
        }
    }
    Ok(())
}

/// Weights in half precision that are widened, or multiplied in bf16, packed or not: the products round inputs to bf16.
#[test]
fn forward_and_backward_with_half_precision_weights_agree_with_f32() -> Result<()> {
    for shape @ [experts, _, c, _] in SHAPES {
        for dtype in [DType::F16, DType::BF16] {
            let t = 41;
            let block = Block::new(shape, dtype)?;
            let widened = |layer: &ExpertLinear| {
                ExpertLinear::new(
                    layer.projection().converted(DType::F32, DType::F32, &Device::Cpu)?,
                    experts,
                )
            };
            let (gate_up, down) = (widened(&block.gate_up)?, widened(&block.down)?);
            let exact = Block { gate_up, down, per_token: block.per_token };
            let (u, dout) = (randn(3, (t, c), DType::F32)?, randn(4, (t, c), DType::F32)?);
            let logits = (randn(5, (t, experts), DType::F32)? * 2.0)?;
            let (out, saved) = block.forward(&u, &logits, DType::F32)?;
            let (expected, exact_saved) = exact.forward(&u, &logits, DType::F32)?;
            let tolerance = match block.gate_up.projection().gemm_dtype(DType::F32) {
                DType::BF16 => Tolerance { absolute: 0.05, relative: 0.02 },
                _ => Tolerance::F32,
            };
            assert_close("experts", &out, &expected, tolerance);
            let (found, expected) = (block.backward(&dout, &saved)?, exact.backward(&dout, &exact_saved)?);
            for (found, expected) in found.iter().zip(&expected) {
                assert_close("experts backward", found, expected, tolerance);
            }
        }
    }
    Ok(())
}

/// Each expert's product is that of a layer of its own, to the last bit: in every dtype, for any share of the rows.
#[test]
fn products_are_those_of_each_expert_alone() -> Result<()> {
    for (dtype, n) in
        [(DType::F64, 20), (DType::F32, 48), (DType::F16, 48), (DType::BF16, 48), (DType::BF16, 20)]
    {
        let act = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let all = Linear::new(randn(1, (6 * n, 40), act)?.to_dtype(dtype)?, None)?;
        // Expert 2 has no row, expert 5 most of them.
        let logits: Vec<f64> = (0..150)
            .flat_map(|t| (0..6).map(move |e| f64::from(u8::from(e == [0, 1, 3, 4, 5, 5][t % 6]))))
            .collect();
        let routing = Routing::new(&Tensor::from_vec(logits, (150, 6), &Device::Cpu)?.to_dtype(act)?, 1)?;
        let offsets = routing.sorted.offsets.to_vec1::<u32>()?;
        assert_eq!(offsets, [0, 25, 50, 50, 75, 100, 150]);
        let packed = all.clone().pack(act)?;
        let experts = ExpertLinear::new(packed.clone(), 6)?;
        let (x, dy) = (randn(2, (150, 40), act)?, randn(3, (150, n), act)?);
        let stored = packed.gemm_dtype(act);
        let (y, y_stored) =
            (experts.forward_to(&x, &routing, act)?, experts.forward_to(&x, &routing, stored)?);
        let dx = experts.backward(&dy, &routing, 0.5)?;
        assert_eq!((y_stored.dtype(), dx.dtype()), (stored, act));
        for expert in 0..6 {
            let (start, rows) = (offsets[expert] as usize, (offsets[expert + 1] - offsets[expert]) as usize);
            let layer = all.rows(expert * n..(expert + 1) * n)?.pack(act)?;
            let part = |x: &Tensor| x.narrow(0, start, rows);
            assert_same(&part(&y)?, &layer.forward(&part(&x)?)?)?;
            assert_same(&part(&y_stored)?, &layer.forward_to(&part(&x)?, stored)?)?;
            assert_same(&part(&dx)?, &layer.backward(&part(&dy)?, 0.5)?)?;
        }
        // Inputs in the dtype of the product are not rounded again.
        let operand = experts.operand(&x)?;
        assert_eq!(operand.dtype(), stored);
        assert_same(&experts.forward_to(&operand, &routing, act)?, &y)?;
        assert_same(&experts.operand(&operand)?, &operand)?;
    }
    Ok(())
}

/// The same bits.
fn assert_same(found: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()));
    let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    assert_eq!(values(found)?, values(expected)?);
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let shape @ [experts, _, c, _] = [9, 3, 96, 64];
        let block = Block::new(shape, dtype)?;
        let (u, logits) = (randn(3, (77, c), DType::F32)?, randn(5, (77, experts), DType::F32)?);
        let on = |threads: usize| -> Result<Vec<Tensor>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let (out, saved) = block.forward(&u, &logits, DType::F32)?;
                let [du, dlogits] = block.backward(&u, &saved)?;
                Ok(vec![out, du, dlogits])
            })
        };
        let expected = on(1)?;
        for threads in [2, 3] {
            for (found, expected) in on(threads)?.iter().zip(&expected) {
                assert_same(found, expected)?;
            }
        }
    }
    Ok(())
}

#[test]
fn activation_in_bf16_is_that_in_f32_rounded() -> Result<()> {
    let routing = Routing::new(&randn(1, (50, 6), DType::F32)?, 3)?;
    for f in [1, 45, 600] {
        let narrow = randn(2, (150, 2 * f), DType::F32)?.to_dtype(DType::BF16)?;
        let (wide, da) = (narrow.to_dtype(DType::F32)?, randn(3, (150, f), DType::F32)?);
        let rounded = |t: &Tensor| t.to_dtype(DType::BF16);
        assert_same(
            &activation_forward(&narrow, &routing)?,
            &rounded(&activation_forward(&wide, &routing)?)?,
        )?;
        let (found, expected) =
            (activation_backward(&da, &narrow, &routing)?, activation_backward(&da, &wide, &routing)?);
        assert_same(&found.0, &rounded(&expected.0)?)?;
        assert_same(&found.1, &expected.1)?;
        assert_eq!(found.1.dims(), [150]);
    }
    assert!(activation_forward(&randn(2, (150, 4), DType::F64)?, &routing).is_err());
    assert!(activation_forward(&randn(2, (150, 3), DType::F32)?, &routing).is_err());
    assert!(activation_forward(&randn(2, (149, 4), DType::F32)?, &routing).is_err());
    Ok(())
}

#[test]
fn routing_sorts_pairs_by_expert_and_rows() -> Result<()> {
    let logits = Tensor::new(&[[0f32, 3., 1., 3.], [5., -1., 4., 0.], [2., 2., 2., 2.]], &Device::Cpu)?;
    let routing = Routing::new(&logits, 2)?;
    // Of equal logits the lowest expert comes first.
    assert_eq!(routing.chosen().to_vec2::<u32>()?, [[1, 3], [0, 2], [0, 1]]);
    assert_eq!((routing.rows(), routing.per_token(), routing.pairs(), routing.experts()), (3, 2, 6, 4));
    let SortedPairs { order, place, offsets, .. } = &routing.sorted;
    assert_eq!(order.to_vec1::<u32>()?, [2, 4, 0, 5, 3, 1]);
    assert_eq!(place.to_vec2::<u32>()?, [[2, 5], [0, 4], [1, 3]]);
    assert_eq!(offsets.to_vec1::<u32>()?, [0, 2, 4, 5, 6]);
    let e = 1f32.exp();
    let expected = Tensor::new(&[[0.5f32, 0.5], [e / (e + 1.), 1. / (e + 1.)], [0.5, 0.5]], &Device::Cpu)?;
    assert_close("weights", routing.weights(), &expected, Tolerance::F32);
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let x = Tensor::new(&[[1f32, 10.], [2., 20.], [3., 30.]], &Device::Cpu)?.to_dtype(dtype)?;
        let gathered = routing.gather(&x)?;
        assert_eq!(gathered.dtype(), dtype);
        let expected =
            Tensor::new(&[[2f32, 20.], [3., 30.], [1., 10.], [3., 30.], [2., 20.], [1., 10.]], &Device::Cpu)?;
        assert_same(&gathered.to_dtype(DType::F32)?, &expected)?;
    }
    let y = Tensor::new(&[[1f32], [2.], [4.], [8.], [16.], [32.]], &Device::Cpu)?;
    assert_eq!(routing.combine(&y)?.to_vec2::<f32>()?, [[36.], [17.], [10.]]);
    Ok(())
}

/// As `torch.topk`, where NaN is the largest: a fault is not lost because its expert is not chosen.
#[test]
fn routing_spreads_nan_to_the_whole_row() -> Result<()> {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = [
        [0., nan, 1., 2.],
        [0., 1., 2., 3.],
        [nan, nan, nan, nan],
        [1., inf, inf, 0.],
        [-inf, 0., -inf, -inf],
    ];
    let routing = Routing::new(&Tensor::new(&logits, &Device::Cpu)?, 2)?;
    assert_eq!(routing.chosen().to_vec2::<u32>()?, [[1, 3], [3, 2], [0, 1], [1, 2], [1, 0]]);
    let weights = routing.weights().to_vec2::<f32>()?;
    for (row, is_nan) in weights.iter().zip([true, false, true, true, false]) {
        assert!(row.iter().all(|p| p.is_nan() == is_nan), "{weights:?}");
    }
    assert_eq!(weights[4], [1.0, 0.0]);
    let logits = Tensor::new(&logits, &Device::Cpu)?;
    let run = || -> Result<[Tensor; 3]> {
        let block = Block::new([4, 2, 8, 4], DType::F32)?;
        let (out, saved) = block.forward(&randn(1, (5, 8), DType::F32)?, &logits, DType::F32)?;
        let [du, dlogits] = block.backward(&randn(2, (5, 8), DType::F32)?, &saved)?;
        Ok([out, du, dlogits])
    };
    for results in [run()?, emulate(0, run)?] {
        for (name, rows) in ["output", "gradient", "gradient of the logits"].into_iter().zip(results) {
            let rows = rows.to_vec2::<f32>()?;
            for (row, is_nan) in [(0, true), (1, false), (2, true), (3, true), (4, false)] {
                assert_eq!(rows[row].iter().any(|x| x.is_nan()), is_nan, "{name} of row {row}: {rows:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn ops_of_no_rows_return_no_rows() -> Result<()> {
    let run = |dtype: DType| -> Result<()> {
        let block = Block::new([4, 2, 8, 16], dtype)?;
        let u = Tensor::zeros((0, 8), DType::F32, &Device::Cpu)?;
        let (out, saved) =
            block.forward(&u, &Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?, DType::F32)?;
        assert_eq!(out.dims(), [0, 8]);
        let [du, dlogits] = block.backward(&out, &saved)?;
        assert_eq!((du.dims(), dlogits.dims()), (&[0, 8][..], &[0, 4][..]));
        Ok(())
    };
    run(DType::F32)?;
    run(DType::BF16)?;
    emulate(0, || run(DType::F32))
}

#[test]
fn ops_on_a_gpu_refuse_what_they_do_not_compute() -> Result<()> {
    let (logits, x) = (randn(1, (3, 129), DType::F32)?, randn(2, (6, 5), DType::F32)?);
    let layer = ExpertLinear::new(Linear::new(randn(3, (8, 5), DType::F32)?, None)?, 4)?;
    let cpu = Routing::new(&logits.narrow(1, 0, 4)?.contiguous()?, 2)?;
    emulate(0, || {
        let error = Routing::new(&logits, 2).unwrap_err().to_string();
        assert_eq!(error, "routing: expected at most 128 experts on a GPU, found 129");
        let error = layer.forward_to(&x, &cpu, DType::F32).unwrap_err().to_string();
        assert_eq!(error, "experts: expected a routing that was made on a GPU");
        let error = Routing::new(&logits.narrow(1, 0, 4)?.contiguous()?.to_dtype(DType::F64)?, 2);
        assert!(error.unwrap_err().to_string().contains("found F64"));
        let routing = Routing::new(&logits.narrow(1, 0, 4)?.contiguous()?, 2)?;
        assert!(layer.forward_to(&x, &routing, DType::F32).is_ok());
        assert!(layer.forward_to(&x.to_dtype(DType::BF16)?, &routing, DType::BF16).is_err());
        Ok(())
    })
}

#[test]
fn expert_linear_shares_packed_memory_and_counts_bytes_once() -> Result<()> {
    for n in [16, 20, 48] {
        let all = Linear::new(randn(1, (5 * n, 64), DType::BF16)?, None)?;
        let packed = all.clone().pack(DType::F32)?;
        let experts = ExpertLinear::new(packed.clone(), 5)?;
        assert_eq!(experts.dims()?, (n, 64));
        // Without panels of its own an expert's matrix is read from the unpacked weight.
        let expected = if n % 16 == 0 { packed.bytes() } else { all.bytes() };
        assert_eq!(experts.projection().bytes(), expected);
        assert_same(&experts.projection().weight()?, &all.weight()?)?;
    }
    let all = Linear::new(randn(1, (10, 4), DType::F32)?, None)?;
    assert!(ExpertLinear::new(all.clone(), 3).is_err() && ExpertLinear::new(all.clone(), 0).is_err());
    let biased = Linear::new(all.weight()?, Some(randn(1, 10, DType::F32)?))?;
    assert!(ExpertLinear::new(biased, 5).is_err());
    Ok(())
}

#[test]
fn ops_refuse_other_shapes() -> Result<()> {
    let logits = randn(1, (3, 4), DType::F32)?;
    for per_token in [0, 5] {
        let error = Routing::new(&logits, per_token).unwrap_err().to_string();
        assert_eq!(error, format!("routing: expected 1 to 4 experts for a row, found {per_token}"));
    }
    let routing = Routing::new(&logits, 2)?;
    let error = routing.gather(&randn(1, (4, 2), DType::F32)?).unwrap_err();
    assert_eq!(error.to_string(), "experts gather: expected a matrix of 3 rows, found [4, 2]");
    let layer = |experts: usize| -> Result<ExpertLinear> {
        ExpertLinear::new(Linear::new(randn(1, (12, 5), DType::F32)?, None)?, experts)
    };
    let x = randn(1, (6, 5), DType::F32)?;
    assert!(layer(4)?.forward_to(&x, &routing, DType::F32).is_ok());
    let error = layer(3)?.forward_to(&x, &routing, DType::F32).unwrap_err();
    assert_eq!(error.to_string(), "experts: expected logits of 3 experts, found 4");
    assert!(layer(4)?.forward_to(&x.narrow(1, 0, 4)?, &routing, DType::F32).is_err());
    assert!(routing.combine(&x.narrow(0, 0, 5)?).is_err() && routing.backward(&x).is_err());
    Ok(())
}

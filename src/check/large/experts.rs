//! Experts at the sizes of a model.

use super::shapes::{Batch, Shape};
use super::{CHUNK, Large};
use crate::Result;
use crate::check::ResultKind;
use crate::ops::{ExpertLinear, Linear, Routing, autograd, experts};
use candle_core::{DType, Tensor};

/// Experts, and those of a row: granite-3.1-1b-a400m's.
const EXPERTS: usize = 32;
const PER_TOKEN: usize = 8;

/// A layer's experts.
struct ExpertMatrices {
    gate_up: ExpertLinear,
    down: ExpertLinear,
}

impl ExpertMatrices {
    /// Of weights in another dtype.
    fn converted(&self, dtype: DType) -> Result<Self> {
        let convert = |layer: &ExpertLinear| -> Result<ExpertLinear> {
            ExpertLinear::new(Linear::new(layer.projection().weight()?.to_dtype(dtype)?, None)?, EXPERTS)
        };
        Ok(Self { gate_up: convert(&self.gate_up)?, down: convert(&self.down)? })
    }

    /// Output, and gradients of the input and of the logits.
    fn run(&self, u: &Tensor, logits: &Tensor, dout: &Tensor) -> Result<[Tensor; 3]> {
        let routing = Routing::new(logits, PER_TOKEN)?;
        let layers = [&self.gate_up, &self.down];
        let (out, h) = experts::forward(u, &routing, layers, u.dtype())?;
        let (du, dlogits) = experts::backward(dout, &h, &routing, layers, 1.0)?;
        Ok([out, du, dlogits])
    }

    /// The same in candle's ops.
    fn expected(&self, u: &Tensor, logits: &Tensor, dout: &Tensor) -> Result<[Tensor; 3]> {
        let layers = [&self.gate_up, &self.down];
        let out = experts::reference(u, logits, layers, PER_TOKEN)?;
        let gradients = autograd(&[u, logits], dout, |v| {
            experts::reference(v[0].as_tensor(), v[1].as_tensor(), layers, PER_TOKEN)
        })?;
        Ok([out, gradients[0].clone(), gradients[1].clone()])
    }
}

pub(super) fn check(large: &mut Large, shape: &Shape, batch: &Batch) -> Result<()> {
    let (t, c) = (batch.rows(), shape.hidden);
    // k experts of this size compute as much as a model's MLP of twice its hidden size.
    let f = (c * 2 / PER_TOKEN).next_multiple_of(8);
    let name = format!("[{t}, {c}], {PER_TOKEN} of {EXPERTS} experts of {f}");
    let values = 3 * EXPERTS * c * f + t * (4 * c + PER_TOKEN * (2 * c + 5 * f));
    // Candle's ops compute every expert for every row, and autograd keeps it.
    large.case(&name, 16 * values + 40 * CHUNK * EXPERTS * (c + 4 * f), |large, case| {
        let (gate_up, down) =
            (large.random((EXPERTS * 2 * f, c), 0.05)?, large.random((EXPERTS * c, f), 0.1)?);
        let layer = |weight| ExpertLinear::new(Linear::new(weight, None)?, EXPERTS);
        let experts = ExpertMatrices { gate_up: layer(gate_up)?, down: layer(down)? };
        let exact = experts.converted(DType::F32)?;
        let (u, dout) = (large.random((t, c), 1.0)?, large.random((t, c), 1.0)?);
        let logits = large.random((t, EXPERTS), 2.0)?;
        let ours = large.run(|| experts.run(&u, &logits, &dout))?;
        let (mut expected, mut naive) = (Vec::new(), Vec::new());
        for start in (0..t).step_by(CHUNK) {
            let part = |t: &Tensor| t.narrow(0, start, CHUNK.min(t.dims()[0] - start));
            let (u, logits, dout) = (part(&u)?, part(&logits)?, part(&dout)?);
            naive.push(experts.expected(&u, &logits, &dout)?);
            let f32s = |t: &Tensor| t.to_dtype(DType::F32);
            expected.push(exact.expected(&f32s(&u)?, &f32s(&logits)?, &f32s(&dout)?)?);
        }
        let all = |parts: &[[Tensor; 3]], i: usize| {
            Tensor::cat(&parts.iter().map(|part| &part[i]).collect::<Vec<_>>(), 0)
        };
        for (i, what) in ["out", "du", "dlogits"].into_iter().enumerate() {
            let kind = if i == 0 { ResultKind::Value } else { ResultKind::Gradient };
            large.compare_with((case, what, kind), &ours[i], &all(&expected, i)?, &all(&naive, i)?)?;
        }
        Ok(())
    })
}

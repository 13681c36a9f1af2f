//! The dense feed-forward network (Shazeer, 2020, arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

use super::{LayerPass, Stream, ToDevice};
use crate::Result;
use crate::checkpoint::ModelConfig;
use crate::model::memory::{FeedForwardMemory, ValueSizes};
use crate::ops::{Linear, swiglu};
use candle_core::Tensor;

/// The frozen weights.
pub(in crate::model) struct Dense {
    /// Gate, up: [2F, C].
    pub(in crate::model) gate_up: Linear,
    /// [C, F].
    pub(in crate::model) down: Linear,
}

/// What the backward pass needs: gate and up, [rows, 2F].
pub(in crate::model) struct DenseSaved {
    gate_up: Tensor,
}

impl Dense {
    /// The memory that it needs in a layer.
    pub(in crate::model) fn memory(config: &ModelConfig, sizes: ValueSizes) -> FeedForwardMemory {
        let ValueSizes { activation, operand, operand_copy, .. } = sizes;
        let (c, f) = (config.hidden_size, config.intermediate_size);
        FeedForwardMemory {
            saved: 2 * f * operand,
            saved_if_recomputed: 0,
            workspace: (2 * c + f) * activation + 2 * f * operand + c * operand_copy,
        }
    }

    pub(super) fn forward(&self, normed: &Tensor, pass: &LayerPass) -> Result<DenseSaved> {
        Ok(DenseSaved { gate_up: self.gate_up.forward_to(normed, pass.input_dtype)? })
    }

    /// The residual stream after the network.
    pub(super) fn output(&self, saved: &DenseSaved, residual: Tensor, pass: &LayerPass) -> Result<Stream> {
        let activation = swiglu::forward(&saved.gate_up)?;
        Stream::project(residual, &self.down, &activation, pass.residual_multiplier)
    }

    /// The gradient of the normed input.
    pub(super) fn backward(&self, doutput: &Tensor, saved: &DenseSaved, pass: &LayerPass) -> Result<Tensor> {
        let dactivation = self.down.backward(doutput, pass.residual_multiplier)?;
        self.gate_up.backward(&swiglu::backward(&dactivation, &saved.gate_up)?, 1.0)
    }

    pub(super) fn projections(&self) -> [&Linear; 2] {
        [&self.gate_up, &self.down]
    }

    pub(super) fn to_device(&self, change: ToDevice) -> Result<Self> {
        Ok(Self { gate_up: change.linear(&self.gate_up)?, down: change.linear(&self.down)? })
    }
}

//! A mixture of experts (transformers `modeling_granitemoe.py`, `GraniteMoeMoE`): each row goes to the `k` experts for which
//! the router's logits are largest, and their outputs are added with the softmax over these logits as weights.
//!
//! ```text
//! p   = softmax of the k largest of u Wrᵀ
//! out = sum over chosen e of (p_e silu(gate_e) up_e) Woᵀ[e]          gate_e, up_e = u Wiᵀ[e]
//! ```

use super::{LayerPass, LayerWeights, ToDevice};
use crate::Result;
use crate::checkpoint::ModelConfig;
use crate::checkpoint::tensors::ExpertsTensors;
use crate::model::memory::{FeedForwardMemory, ValueSizes};
use crate::ops::Linear;
use crate::ops::experts::{self, ExpertLinear, Routing};
use candle_core::Tensor;

/// The frozen weights.
pub(in crate::model) struct Experts {
    /// [E, C].
    router: Linear,
    /// Gate, up of each expert: [2F, C].
    gate_up: ExpertLinear,
    /// Of each expert [C, F].
    down: ExpertLinear,
    /// Experts, E.
    count: usize,
    /// Experts that a row goes to, k.
    per_token: usize,
}

/// What the backward pass needs.
pub(in crate::model) struct ExpertsSaved {
    routing: Routing,
    /// Gate and up of each pair of a row and an expert, [S, 2F].
    gate_up: Tensor,
}

impl Experts {
    pub(super) fn new(tensors: &ExpertsTensors, weights: &mut impl LayerWeights) -> Result<Self> {
        let ExpertsTensors { router, gate_up, down } = tensors;
        let (count, per_token) = gate_up.experts.map_or((1, 1), |experts| (experts.count, experts.per_token));
        Ok(Self {
            router: weights.stack(router)?,
            gate_up: ExpertLinear::new(weights.stack(gate_up)?, count)?,
            down: ExpertLinear::new(weights.stack(down)?, count)?,
            count,
            per_token,
        })
    }

    /// The memory that they need in a layer.
    pub(in crate::model) fn memory(config: &ModelConfig, sizes: ValueSizes) -> FeedForwardMemory {
        let ValueSizes { activation, operand, operand_copy, row_sum, .. } = sizes;
        let Some(experts) = config.experts else { return FeedForwardMemory::default() };
        let (c, f, k) = (config.hidden_size, experts.size, experts.per_token);
        // Weight, choice, and the way there and back of each pair.
        let routing = k * (row_sum + 4 * size_of::<u32>());
        FeedForwardMemory {
            saved: 2 * f * k * operand + routing,
            saved_if_recomputed: routing,
            // Two gradients of the stream, and a copy of one in the dtype that products read; of the pairs those of the output, in
            // that dtype, and the activation, of the activation and of gate and up, or of gate and up and the input.
            workspace: 2 * c * activation
                + c * operand_copy
                + k * (c * operand + f * activation)
                    .max(f * activation + 2 * f * operand)
                    .max(2 * f * operand + c * activation),
        }
    }

    pub(super) fn forward(
        &self,
        normed: &Tensor,
        pass: &LayerPass,
        routing: Option<&Routing>,
    ) -> Result<ExpertsSaved> {
        let routing = match routing {
            Some(routing) => routing.clone(),
            None => Routing::new(&self.router.forward(normed)?, self.per_token)?,
        };
        let gate_up = self.gate_up.forward_to(&routing.gather(normed)?, &routing, pass.input_dtype)?;
        Ok(ExpertsSaved { routing, gate_up })
    }

    /// The sum of the chosen experts' outputs, [rows, C].
    pub(super) fn output(&self, saved: &ExpertsSaved) -> Result<Tensor> {
        experts::output(&saved.gate_up, &saved.routing, &self.down)
    }

    /// The gradient of the normed input.
    pub(super) fn backward(
        &self,
        doutput: &Tensor,
        saved: &ExpertsSaved,
        pass: &LayerPass,
    ) -> Result<Tensor> {
        let ExpertsSaved { routing, gate_up } = saved;
        let matrices = [&self.gate_up, &self.down];
        let (dexperts, dlogits) =
            experts::backward(doutput, gate_up, routing, matrices, pass.residual_multiplier)?;
        Ok((dexperts + self.router.backward(&dlogits, 1.0)?)?)
    }

    pub(super) fn projections(&self) -> [&Linear; 3] {
        [&self.router, self.gate_up.projection(), self.down.projection()]
    }

    pub(super) fn to_device(&self, change: ToDevice) -> Result<Self> {
        Ok(Self {
            router: change.linear(&self.router)?,
            gate_up: ExpertLinear::new(change.linear(self.gate_up.projection())?, self.count)?,
            down: ExpertLinear::new(change.linear(self.down.projection())?, self.count)?,
            count: self.count,
            per_token: self.per_token,
        })
    }
}

impl ExpertsSaved {
    pub(super) fn into_routing(self) -> Routing {
        self.routing
    }
}

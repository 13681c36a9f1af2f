//! The feed-forward network of a layer: a dense one, experts, or the sum of both.

use super::dense::DenseSaved;
use super::experts::ExpertsSaved;
use super::{Dense, Experts, LayerPass, LayerWeights, Stream, ToDevice};
use crate::checkpoint::tensors::{DenseTensors, LayerTensors};
use crate::ops::Linear;
use crate::ops::experts::Routing;
use crate::{Error, Result};
use candle_core::Tensor;

/// The frozen weights: of one network, or of two that read the same rows and whose outputs are added.
pub(in crate::model) struct FeedForward {
    dense: Option<Dense>,
    experts: Option<Experts>,
}

/// What the backward pass needs of each network.
pub(in crate::model) struct FeedForwardSaved {
    dense: Option<DenseSaved>,
    experts: Option<ExpertsSaved>,
}

impl FeedForward {
    pub(super) fn new(tensors: &LayerTensors, weights: &mut impl LayerWeights) -> Result<Self> {
        let dense = match &tensors.dense {
            Some(DenseTensors { gate_up, down }) => {
                Some(Dense { gate_up: weights.stack(gate_up)?, down: weights.stack(down)? })
            }
            None => None,
        };
        let experts = tensors.experts.as_ref().map(|tensors| Experts::new(tensors, weights)).transpose()?;
        Ok(Self { dense, experts })
    }

    /// Everything up to the output projections; `routing` is given if the layer is run again.
    pub(super) fn forward(
        &self,
        normed: &Tensor,
        pass: &LayerPass,
        routing: Option<&Routing>,
    ) -> Result<FeedForwardSaved> {
        Ok(FeedForwardSaved {
            dense: self.dense.as_ref().map(|dense| dense.forward(normed, pass)).transpose()?,
            experts: self
                .experts
                .as_ref()
                .map(|experts| experts.forward(normed, pass, routing))
                .transpose()?,
        })
    }

    /// The residual stream after the network.
    pub(super) fn output(
        &self,
        saved: &FeedForwardSaved,
        residual: Tensor,
        pass: &LayerPass,
    ) -> Result<Stream> {
        let stream = match (&self.dense, &saved.dense) {
            (Some(dense), Some(saved)) => dense.output(saved, residual, pass)?,
            _ => Stream::new(residual),
        };
        match (&self.experts, &saved.experts) {
            (Some(experts), Some(saved)) => stream.plus(experts.output(saved)?),
            _ => Ok(stream),
        }
    }

    /// The gradient of the normed input.
    pub(super) fn backward(
        &self,
        doutput: &Tensor,
        saved: &FeedForwardSaved,
        pass: &LayerPass,
    ) -> Result<Tensor> {
        let dense = match (&self.dense, &saved.dense) {
            (Some(dense), Some(saved)) => Some(dense.backward(doutput, saved, pass)?),
            _ => None,
        };
        let experts = match (&self.experts, &saved.experts) {
            (Some(experts), Some(saved)) => Some(experts.backward(doutput, saved, pass)?),
            _ => None,
        };
        match (dense, experts) {
            (Some(dense), Some(experts)) => Ok((dense + experts)?),
            (Some(only), None) | (None, Some(only)) => Ok(only),
            (None, None) => Err(Error::Invalid("feed-forward network: expected one, found none".into())),
        }
    }

    pub(super) fn projections(&self) -> impl Iterator<Item = &Linear> {
        let dense = self.dense.iter().flat_map(Dense::projections);
        dense.chain(self.experts.iter().flat_map(Experts::projections))
    }

    pub(super) fn to_device(&self, change: ToDevice) -> Result<Self> {
        Ok(Self {
            dense: self.dense.as_ref().map(|dense| dense.to_device(change)).transpose()?,
            experts: self.experts.as_ref().map(|experts| experts.to_device(change)).transpose()?,
        })
    }
}

impl FeedForwardSaved {
    /// The choice of experts, for a layer that is run again.
    pub(super) fn into_routing(self) -> Option<Routing> {
        self.experts.map(ExpertsSaved::into_routing)
    }
}

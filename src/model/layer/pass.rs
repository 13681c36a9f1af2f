//! What a layer has to know of the pass that runs it.

use crate::Result;
use crate::batch::PackedBatch;
use crate::checkpoint::ModelConfig;
use crate::ops::attention::Rotation;
use crate::ops::{IndexView, RopeTable, cpu, rows};
use candle_core::{DType, Tensor};

/// Rows whose output a layer has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum OutputRows {
    /// Every row.
    All,
    /// The rows that predict a target token.
    Targets,
}

/// Rows of whose input the backward pass wants the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum InputGradient {
    /// Every row.
    All,
    /// The prefix rows, which are the first: the layer below is the embedding, and sequences hold frozen tokens.
    Prefixes,
}

impl OutputRows {
    /// Of layer `layer`: after the last layer only target rows are read.
    pub(in crate::model) fn new(config: &ModelConfig, layer: usize) -> Self {
        if layer + 1 == config.num_hidden_layers { Self::Targets } else { Self::All }
    }
}

impl InputGradient {
    /// Of layer `layer`: below the first layer only prefix rows have a gradient.
    pub(in crate::model) fn new(layer: usize) -> Self {
        if layer == 0 { Self::Prefixes } else { Self::All }
    }
}

/// A layer's part in a pass over a batch.
pub(in crate::model) struct LayerPass<'a> {
    pub(in crate::model) batch: &'a PackedBatch,
    pub(in crate::model) rope: Option<&'a RopeTable>,
    /// dtype of the activations.
    pub(in crate::model) dtype: DType,
    /// dtype in which projections read their inputs.
    pub(in crate::model) input_dtype: DType,
    pub(in crate::model) residual_multiplier: f64,
    pub(in crate::model) output_rows: OutputRows,
    pub(in crate::model) input_gradient: InputGradient,
}

impl LayerPass<'_> {
    /// Rows of the batch that predict a target token.
    pub(super) fn targets(&self) -> IndexView<'_> {
        (&self.batch.target_rows).into()
    }

    /// The rows of `x`, one each of the batch, whose output is wanted.
    pub(super) fn output_rows_of(&self, x: &Tensor) -> Result<Tensor> {
        match self.output_rows {
            OutputRows::All => Ok(x.clone()),
            OutputRows::Targets => rows::forward(x, self.targets()),
        }
    }

    /// Number of leading rows whose input gradient is wanted.
    pub(super) fn gradient_rows(&self) -> usize {
        match self.input_gradient {
            InputGradient::All => self.batch.ids.len(),
            InputGradient::Prefixes => self.batch.prefix_rows,
        }
    }

    /// Positions of the rows whose output is wanted.
    pub(super) fn output_positions(&self) -> IndexView<'_> {
        match self.output_rows {
            OutputRows::All => (&self.batch.position_ids).into(),
            OutputRows::Targets => (&self.batch.target_positions).into(),
        }
    }

    /// `heads` leading heads of `x` with the rotary embedding, in the dtype of projections' inputs.
    pub(super) fn rotate(&self, x: Tensor, heads: usize, positions: IndexView) -> Result<Tensor> {
        match self.rope {
            None => cpu::to_storage("rope", &x, self.input_dtype),
            Some(rope) => rope.forward(x, heads, positions, self.input_dtype),
        }
    }

    /// The gradient of [`LayerPass::rotate`]'s input.
    pub(super) fn rotate_backward(&self, dy: Tensor, heads: usize, positions: IndexView) -> Result<Tensor> {
        match self.rope {
            None => cpu::to_storage("rope", &dy, self.input_dtype),
            Some(rope) => rope.backward(dy, heads, positions, self.input_dtype),
        }
    }

    /// The rotary embedding of queries and keys, for a backward pass that rotates back on the way.
    pub(super) fn rotation(&self) -> Option<Rotation<'_>> {
        let (queries, keys) = (self.output_positions(), IndexView::from(&self.batch.position_ids));
        self.rope.map(|table| Rotation { table, queries, keys })
    }
}

//! Which experts each row goes to.

use super::{check_matrix, cpu, gpu};
use crate::ops::backend::{Route, route};
use crate::ops::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The experts of each row, their weights, and the pairs of rows and experts sorted by expert; see the module. Clones share
/// the memory.
///
/// A logit that is NaN counts as the largest, as in `torch.topk`, so that a row with one has weights of NaN, and the fault shows
/// in the row's output.
#[derive(Debug, Clone)]
pub struct Routing {
    /// [T, k]; f32 on a GPU, otherwise the dtype of the logits.
    pub(super) weights: Tensor,
    /// [T, k] of u32, the largest logit first.
    pub(super) chosen: Tensor,
    pub(super) sorted: SortedPairs,
    pub(super) experts: usize,
    /// dtype of the logits.
    pub(super) dtype: DType,
}

/// The pairs of rows and experts, sorted by expert; all are u32. Pair `t k + j` is choice j of row t.
#[derive(Debug, Clone)]
pub(super) struct SortedPairs {
    /// The pair at each place, `[S]`.
    pub(super) order: Tensor,
    /// The place of each pair, [T, k].
    pub(super) place: Tensor,
    /// The first place of each expert, and S, `[E + 1]`.
    pub(super) offsets: Tensor,
    /// On a GPU: the first tile of each expert's products, and the number of tiles, `[E + 1]`.
    pub(super) tiles: Option<Tensor>,
}

impl Routing {
    /// Chooses the `per_token` largest of each row of `logits` [T, E].
    ///
    /// # Errors
    /// Returns an error if `per_token` is zero or over E, or a device operation fails.
    pub fn new(logits: &Tensor, per_token: usize) -> Result<Self> {
        const OP: &str = "routing";
        let _timed = profile::scope(OP, logits.device());
        let (rows, experts) = logits.dims2()?;
        if per_token == 0 || per_token > experts {
            let expected = format!("1 to {experts} experts for a row");
            return Err(Error::Shape { op: OP, expected, found: per_token.to_string() });
        }
        if u32::try_from(rows * per_token).is_err() {
            let expected = format!("fewer than {} rows", u32::MAX as usize / per_token);
            return Err(Error::Shape { op: OP, expected, found: rows.to_string() });
        }
        match route(logits) {
            Route::Cpu => cpu::routing(logits, per_token),
            Route::Kernel => gpu::routing(logits, per_token),
        }
    }

    /// T.
    pub fn rows(&self) -> usize {
        self.weights.dims()[0]
    }

    /// k.
    pub fn per_token(&self) -> usize {
        self.weights.dims()[1]
    }

    /// S = T k.
    pub fn pairs(&self) -> usize {
        self.weights.elem_count()
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The weights p of each row's experts, [T, k].
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Each row's experts, [T, k] of u32, the largest logit first.
    pub fn chosen(&self) -> &Tensor {
        &self.chosen
    }

    /// Bytes of a routing of `rows` rows with weights in dtype `weights`.
    pub fn bytes_of(rows: usize, per_token: usize, experts: usize, weights: DType) -> usize {
        rows * per_token * (weights.size_in_bytes() + 3 * size_of::<u32>())
            + 2 * (experts + 1) * size_of::<u32>()
    }

    /// The row of `x` [T, C] of each pair, sorted by expert: [S, C] in the dtype of `x`.
    ///
    /// # Errors
    /// Returns an error if `x` has another number of rows or a device operation fails.
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        const OP: &str = "experts gather";
        let _timed = profile::scope(OP, x.device());
        check_matrix(OP, x, self.rows(), None)?;
        match route(x) {
            Route::Cpu => cpu::gather(x, self),
            Route::Kernel => gpu::gather(x, self),
        }
    }

    /// Sums of the k rows of `y` [S, C] of each row's pairs, in the order of its choices: [T, C] in the dtype of `y`. It is the
    /// experts' last step, and the backward pass of [`Routing::gather`].
    ///
    /// # Errors
    /// Returns an error if `y` has another number of rows or a device operation fails.
    pub fn combine(&self, y: &Tensor) -> Result<Tensor> {
        const OP: &str = "experts combine";
        let _timed = profile::scope(OP, y.device());
        check_matrix(OP, y, self.pairs(), None)?;
        match route(y) {
            Route::Cpu => cpu::combine(y, self),
            Route::Kernel => gpu::combine(y, self),
        }
    }

    /// Gradient of the logits, [T, E] in their dtype, from that of the weights p, `dweights` `[S]` in the order of the pairs sorted
    /// by expert, in the dtype of the weights.
    ///
    /// # Errors
    /// Returns an error if `dweights` has another shape or dtype, or a device operation fails.
    pub fn backward(&self, dweights: &Tensor) -> Result<Tensor> {
        const OP: &str = "routing backward";
        let _timed = profile::scope(OP, dweights.device());
        if dweights.dims() != [self.pairs()] {
            let expected = format!("[{}]", self.pairs());
            return Err(Error::Shape { op: OP, expected, found: format!("{:?}", dweights.dims()) });
        }
        match route(dweights) {
            Route::Cpu => cpu::routing_backward(dweights, self),
            Route::Kernel => gpu::routing_backward(dweights, self),
        }
    }
}

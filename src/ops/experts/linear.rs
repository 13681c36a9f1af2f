//! The experts' matrices.

use super::{Routing, check_matrix, cpu, gpu};
use crate::ops::Linear;
use crate::ops::backend::{Route, route};
use crate::ops::cpu::to_storage;
use crate::ops::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Matrices [N, K] of E experts, frozen; clones share them.
#[derive(Debug, Clone)]
pub struct ExpertLinear {
    all: Linear,
    /// Parts of `all`, which share its memory.
    experts: Vec<Linear>,
}

impl ExpertLinear {
    /// From all experts' matrices, one below the other in one layer [E N, K] without a bias. Nothing is copied, except for a
    /// packed weight whose N is not a multiple of 16: it is unpacked, and packed again block by block in each product.
    ///
    /// # Errors
    /// Returns an error if the number of output features is not a multiple of `experts`, or the layer has a bias.
    pub fn new(all: Linear, experts: usize) -> Result<Self> {
        let (all, experts) = all.split_outputs(experts)?;
        Ok(Self { all, experts })
    }

    /// All matrices, one below the other: for their bytes, and to move or pack them.
    pub fn projection(&self) -> &Linear {
        &self.all
    }

    /// Output and input features of an expert, N and K.
    ///
    /// # Errors
    /// Returns an error if the weight is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        let (rows, k) = self.all.dims()?;
        Ok((rows / self.experts.len(), k))
    }

    /// `x` in the dtype in which the products read it ([`Linear::gemm_dtype`]). A gradient that is gathered for a product is
    /// rounded first: once for each row, and not for each of its pairs.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn operand(&self, x: &Tensor) -> Result<Tensor> {
        match route(x) {
            Route::Cpu => to_storage("experts", x, self.all.gemm_dtype(x.dtype())),
            Route::Kernel => Ok(x.clone()),
        }
    }

    /// `x Wᵀ` of `x` [S, K], the rows of the pairs of `routing`, each by its expert's matrix: [S, N]. dtypes as in
    /// [`Linear::forward_to`].
    ///
    /// # Errors
    /// As [`Linear::forward_to`]; also if `routing` is for another number of experts.
    pub fn forward_to(&self, x: &Tensor, routing: &Routing, out: DType) -> Result<Tensor> {
        const OP: &str = "experts";
        let _timed = profile::scope(OP, x.device());
        self.check(OP, x, routing, self.dims()?.1)?;
        match route(x) {
            Route::Cpu => cpu::forward(&self.experts, x, routing, out),
            Route::Kernel => gpu::forward(self, x, routing, out),
        }
    }

    /// `scale * dy W` of `dy` [S, N]: the gradient of the input, [S, K]. dtypes as in [`Linear::backward`].
    ///
    /// # Errors
    /// As [`ExpertLinear::forward_to`].
    pub fn backward(&self, dy: &Tensor, routing: &Routing, scale: f64) -> Result<Tensor> {
        const OP: &str = "experts backward";
        let _timed = profile::scope(OP, dy.device());
        self.check(OP, dy, routing, self.dims()?.0)?;
        match route(dy) {
            Route::Cpu => cpu::backward(&self.experts, dy, routing, scale),
            Route::Kernel => gpu::backward(self, dy, routing, scale),
        }
    }

    fn check(&self, op: &'static str, x: &Tensor, routing: &Routing, width: usize) -> Result<()> {
        check_matrix(op, x, routing.pairs(), Some(width))?;
        if routing.experts() == self.experts.len() {
            return Ok(());
        }
        let (expected, found) = (format!("logits of {} experts", self.experts.len()), routing.experts());
        Err(Error::Shape { op, expected, found: found.to_string() })
    }
}

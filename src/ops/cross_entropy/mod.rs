//! Softmax cross-entropy over the vocabulary, for rows that predict a target token. The gradient replaces the logits in
//! place, so that a chunk of rows needs one [rows, V] buffer. Rows may be wider than the vocabulary, as a padded head makes
//! them ([`super::Linear`]): columns beyond the vocabulary are no tokens, and their gradient is 0.
//!
//! ```text
//! z       = scale * logits                  scale = 1 / logits_scaling
//! lse     = log(sum(exp(z)))
//! nll     = lse - z[label]
//! dlogits = dloss * scale * (exp(z - lse) - onehot(label))          dloss of the row
//! ```

mod cpu;
mod gpu;
mod reference;
#[cfg(test)]
mod tests;

pub(in crate::ops) use cpu::log_sum_exp;
pub use reference::reference;

use super::backend::{Route, route};
use super::{IndexView, profile};
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// TokenLosses of rows of logits for their labels.
#[derive(Debug, Clone)]
pub struct TokenLosses {
    /// Negative log-likelihood of each row's label, nats; `[rows]`, f64 on the CPU and f32 on a GPU.
    pub nll: Tensor,
    /// Log-sum-exp of each row's scaled logits; shape and dtype of `nll`.
    pub lse: Tensor,
}

/// The columns of a row of logits and their scale.
#[derive(Debug, Clone, Copy)]
pub struct Softmax {
    /// V: the first columns of a row, one a token.
    pub vocab: usize,
    /// Multiplies the logits, 1 / `logits_scaling`.
    pub scale: f64,
}

/// What the losses of rows count in the loss whose gradient is taken: `sum(dloss[row] * loss of row)`.
#[derive(Debug, Clone)]
pub enum LossWeights {
    /// The same `dloss` for all rows.
    Uniform(f64),
    /// `dloss` of each row; shape and dtype of [`TokenLosses::nll`].
    PerRow(Tensor),
}

impl LossWeights {
    /// The weights of some of the rows.
    ///
    /// # Errors
    /// Returns an error if the range is not inside the rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        match self {
            Self::Uniform(dloss) => Ok(Self::Uniform(*dloss)),
            Self::PerRow(dloss) => Ok(Self::PerRow(dloss.narrow(0, rows.start, rows.len())?)),
        }
    }

    /// Checks that there is a weight for each of `rows`.
    pub(in crate::ops) fn check(&self, op: &'static str, rows: usize) -> Result<()> {
        match self {
            Self::PerRow(dloss) if dloss.dims() != [rows] => Err(Error::shape(
                op,
                format!("the loss weights of {rows} rows"),
                format!("{:?}", dloss.dims()),
            )),
            _ => Ok(()),
        }
    }

    /// The weight of each of `rows`, on the CPU.
    pub(in crate::ops) fn on_host(&self, rows: usize) -> Result<Vec<f64>> {
        match self {
            Self::Uniform(dloss) => Ok(vec![*dloss; rows]),
            Self::PerRow(dloss) => Ok(dloss.to_vec1()?),
        }
    }

    /// The weight of all rows, if they have one, and the kernel's argument for the weights of each: `other`, which the kernel
    /// does not read then.
    pub(in crate::ops) fn for_kernel<'a>(&'a self, other: &'a Tensor) -> (Option<f64>, &'a Tensor) {
        match self {
            Self::Uniform(dloss) => (Some(*dloss), other),
            Self::PerRow(dloss) => (None, dloss),
        }
    }
}

impl From<f64> for LossWeights {
    fn from(dloss: f64) -> Self {
        Self::Uniform(dloss)
    }
}

/// TokenLosses of `logits` [rows, V or more] for one label a row.
///
/// # Errors
/// Returns an error if a label is beyond the vocabulary, rows are narrower than the vocabulary, the numbers of labels and
/// rows differ, or a device operation fails.
pub fn forward(logits: &Tensor, labels: IndexView, softmax: Softmax) -> Result<TokenLosses> {
    let _timed = profile::scope("cross_entropy", logits.device());
    check(logits, labels, softmax)?;
    match route(logits) {
        Route::Cpu => cpu::forward(logits, labels, softmax),
        Route::Kernel => gpu::forward(logits, labels, softmax),
    }
}

/// Gradient of `sum(dloss * nll)` with respect to the logits [rows, V or more]; it replaces them in memory.
///
/// # Errors
/// As [`forward`]; also if `losses` or `dloss` are those of another number of rows.
pub fn backward(
    logits: Tensor,
    labels: IndexView,
    softmax: Softmax,
    losses: &TokenLosses,
    dloss: &LossWeights,
) -> Result<Tensor> {
    let _timed = profile::scope("cross_entropy backward", logits.device());
    check(&logits, labels, softmax)?;
    if losses.lse.dims() != [labels.host().len()] {
        return Err(Error::shape(
            "cross_entropy backward",
            format!("the log-sum-exp of {} rows", labels.host().len()),
            format!("{:?}", losses.lse.dims()),
        ));
    }
    dloss.check("cross_entropy backward", labels.host().len())?;
    match route(&logits) {
        Route::Cpu => cpu::backward(&logits, labels, softmax, losses, dloss)?,
        Route::Kernel => gpu::backward(&logits, labels, softmax, losses, dloss)?,
    }
    Ok(logits)
}

fn check(logits: &Tensor, labels: IndexView, Softmax { vocab, .. }: Softmax) -> Result<()> {
    let (rows, width) = logits.dims2()?;
    let labels = labels.host();
    if width < vocab {
        return Err(Error::shape(
            "cross_entropy",
            format!("logits of a vocabulary of {vocab}"),
            format!("{:?}", logits.dims()),
        ));
    }
    match labels.iter().find(|label| **label as usize >= vocab) {
        None if rows == labels.len() => Ok(()),
        beyond => Err(Error::shape(
            "cross_entropy",
            format!("{rows} labels under {vocab}"),
            format!("{} labels{}", labels.len(), beyond.map_or(String::new(), |l| format!(", one is {l}"))),
        )),
    }
}

//! Softmax cross-entropy over the vocabulary, for rows that predict a target token. The gradient replaces the logits in
//! place, so that a chunk of rows needs one [rows, V] buffer. Rows may be wider than the vocabulary, as a padded head makes
//! them ([`super::Linear`]): columns beyond the vocabulary are no tokens, and their gradient is 0.
//!
//! ```text
//! z       = scale * logits                  scale = 1 / logits_scaling
//! lse     = log(sum(exp(z)))
//! nll     = lse - z[label]
//! dlogits = dloss * scale * (exp(z - lse) - onehot(label))
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

/// Gradient of `dloss * sum(nll)` with respect to the logits [rows, V or more]; it replaces them in memory.
///
/// # Errors
/// As [`forward`]; also if `losses` are those of another number of rows.
pub fn backward(
    logits: Tensor,
    labels: IndexView,
    softmax: Softmax,
    losses: &TokenLosses,
    dloss: f64,
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

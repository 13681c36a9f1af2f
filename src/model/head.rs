//! The head: logits and losses of target rows.

use super::Decoder;
use crate::Result;
use crate::device::{self, Work};
use crate::ops::Indices;
use crate::ops::cross_entropy::{self, Softmax};
use candle_core::{DType, DeviceLocation, Tensor};

/// Rows whose logits exist at a time: on the CPU 64, which of 100,352 are 26 MB in f32; a GPU's product needs more
/// rows to be fast, and 512 are 103 MB in bf16.
pub(super) fn head_rows(device: DeviceLocation) -> usize {
    if device == DeviceLocation::Cpu { 64 } else { 512 }
}

/// Losses of the target rows, and the gradient of their hidden states.
pub struct HeadLoss {
    /// Negative log-likelihood of each label, nats: f64 `[targets]` on the CPU, f32 on a GPU, which may not have computed it
    /// yet.
    pub nll: Tensor,
    /// [targets, C]; `None` if no gradient was asked for.
    pub dhidden: Option<Tensor>,
}

impl Decoder {
    /// Rows whose logits exist at a time.
    pub(crate) fn head_rows(&self) -> usize {
        head_rows(self.device().location())
    }

    /// Losses of `labels` for the hidden states of their rows [targets, C]; their gradient for a loss of
    /// `dloss * sum(nll)` if `dloss` is given. Logits exist for some rows at a time.
    ///
    /// # Errors
    /// Returns an error if there are more or fewer labels than rows, or if a device operation fails.
    pub fn head_loss(&self, hidden: &Tensor, labels: &Indices, dloss: Option<f64>) -> Result<HeadLoss> {
        self.on_pool(|| {
            let softmax = Softmax { vocab: self.config.vocab_size, scale: 1.0 / self.config.logits_scaling };
            let (mut nll, mut dhidden) = (Vec::new(), Vec::new());
            let step = self.head_rows();
            for start in (0..labels.len()).step_by(step) {
                let n = step.min(labels.len() - start);
                let labels = labels.view(start..start + n);
                let logits = self.head.forward(&hidden.narrow(0, start, n)?)?;
                let losses = cross_entropy::forward(&logits, labels, softmax)?;
                if let Some(dloss) = dloss {
                    let dlogits = cross_entropy::backward(logits, labels, softmax, &losses, dloss)?;
                    dhidden.push(self.head.backward(&dlogits, 1.0)?);
                }
                nll.push(losses.nll);
            }
            let nll = if nll.is_empty() { self.no_losses()? } else { Tensor::cat(&nll, 0)? };
            let dhidden = match dloss {
                Some(_) if dhidden.is_empty() => Some(hidden.clone()),
                Some(_) => Some(Tensor::cat(&dhidden, 0)?),
                None => None,
            };
            Ok(HeadLoss { nll, dhidden })
        })
    }

    fn no_losses(&self) -> Result<Tensor> {
        let dtype = if self.device().is_cpu() { DType::F64 } else { DType::F32 };
        Ok(crate::ops::no_rows(1, dtype, self.device())?.flatten_all()?)
    }

    /// Logits [rows, V] of hidden states after the last norm [rows, C].
    ///
    /// # Errors
    /// Returns an error if the width is another or a device operation fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        device::before(Work::Logits, hidden.dims()[0])?;
        let logits = self.head.forward_divided(hidden, self.config.logits_scaling)?;
        // Without the columns of a padded head, which are no tokens.
        Ok(logits.narrow(1, 0, self.config.vocab_size)?)
    }
}

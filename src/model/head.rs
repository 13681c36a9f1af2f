//! The head: logits and losses of target rows.

use super::Decoder;
use crate::device::{self, Work};
use crate::ops::cross_entropy::{self, LossWeights, Softmax};
use crate::ops::{Indices, distillation};
use crate::{Error, Result};
use candle_core::{DType, DeviceLocation, Tensor};
use std::ops::Range;

/// Rows whose logits exist at a time: on the CPU 64, which of 100,352 are 26 MB in f32; a GPU's product needs more
/// rows to be fast, and 512 are 103 MB in bf16.
pub(super) fn head_rows(device: DeviceLocation) -> usize {
    if device == DeviceLocation::Cpu { 64 } else { 512 }
}

/// Losses of the target rows, and the gradient of their hidden states.
pub struct HeadLoss {
    /// Of each target row, nats: f64 `[targets]` on the CPU, f32 on a GPU, which may not have computed it yet.
    pub losses: Tensor,
    /// [targets, C]; `None` if no gradient was asked for.
    pub dhidden: Option<Tensor>,
}

/// Losses of some rows, and the gradient of their logits if one was asked for.
type ChunkLoss = (Tensor, Option<Tensor>);

impl Decoder {
    /// Rows whose logits exist at a time.
    pub(crate) fn head_rows(&self) -> usize {
        head_rows(self.device().location())
    }

    fn softmax(&self) -> Softmax {
        Softmax { vocab: self.config.vocab_size, scale: 1.0 / self.config.logits_scaling }
    }

    /// Negative log-likelihoods of `labels` for the hidden states of their rows [targets, C]; their gradient for a loss of
    /// `sum(dloss * nll)` if `dloss` is given. Logits exist for some rows at a time.
    ///
    /// # Errors
    /// Returns an error if there are more or fewer labels than rows, or if a device operation fails.
    pub fn head_loss(
        &self,
        hidden: &Tensor,
        labels: &Indices,
        dloss: Option<&LossWeights>,
    ) -> Result<HeadLoss> {
        let softmax = self.softmax();
        self.in_chunks(hidden, labels.len(), dloss, |rows, logits, dloss| {
            let labels = labels.view(rows);
            let losses = cross_entropy::forward(&logits, labels, softmax)?;
            let dlogits = match dloss {
                Some(dloss) => Some(cross_entropy::backward(logits, labels, softmax, &losses, dloss)?),
                None => None,
            };
            Ok((losses.nll, dlogits))
        })
    }

    /// Divergences KL(teacher || student) of the vocabulary's distributions for the hidden states of the same target rows
    /// [targets, C] of both; the gradient of the student's for a loss of `sum(dloss * kl)` if `dloss` is given. Logits exist
    /// for some rows at a time.
    ///
    /// # Errors
    /// Returns an error if the shapes differ or a device operation fails.
    pub fn head_distillation(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        dloss: Option<&LossWeights>,
    ) -> Result<HeadLoss> {
        if student.dims() != teacher.dims() {
            return Err(Error::shape(
                "head",
                format!("hidden states of the teacher as the student's, {:?}", student.dims()),
                format!("{:?}", teacher.dims()),
            ));
        }
        let softmax = self.softmax();
        self.in_chunks(student, student.dims()[0], dloss, |rows, logits, dloss| {
            let of_teacher = self.head.forward(&teacher.narrow(0, rows.start, rows.len())?)?;
            let divergences = distillation::forward(&logits, &of_teacher, softmax)?;
            let dlogits = match dloss {
                Some(dloss) => {
                    Some(distillation::backward(logits, &of_teacher, softmax, &divergences, dloss)?)
                }
                None => None,
            };
            Ok((divergences.kl, dlogits))
        })
    }

    /// Losses of all rows, in chunks: `loss` is called with a range of the `targets` rows, their logits and their part of `dloss`.
    fn in_chunks(
        &self,
        hidden: &Tensor,
        targets: usize,
        dloss: Option<&LossWeights>,
        loss: impl Fn(Range<usize>, Tensor, Option<&LossWeights>) -> Result<ChunkLoss> + Send + Sync,
    ) -> Result<HeadLoss> {
        self.on_pool(|| {
            let (mut losses, mut dhidden) = (Vec::new(), Vec::new());
            let step = self.head_rows();
            for start in (0..targets).step_by(step) {
                let n = step.min(targets - start);
                let logits = self.head.forward(&hidden.narrow(0, start, n)?)?;
                let rows = start..start + n;
                let dloss = dloss.map(|dloss| dloss.rows(rows.clone())).transpose()?;
                let (of_rows, dlogits) = loss(rows, logits, dloss.as_ref())?;
                if let Some(dlogits) = dlogits {
                    dhidden.push(self.head.backward(&dlogits, 1.0)?);
                }
                losses.push(of_rows);
            }
            let losses = if losses.is_empty() { self.no_losses()? } else { Tensor::cat(&losses, 0)? };
            let dhidden = match dloss {
                Some(_) if dhidden.is_empty() => Some(hidden.clone()),
                Some(_) => Some(Tensor::cat(&dhidden, 0)?),
                None => None,
            };
            Ok(HeadLoss { losses, dhidden })
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
        // Without the columns of a padded head, which are no tokens.
        Ok(self.padded_logits(hidden)?.narrow(1, 0, self.config.vocab_size)?)
    }

    /// The same with the columns of a padded head.
    pub(super) fn padded_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        device::before(Work::Logits, hidden.dims()[0])?;
        self.head.forward_divided(hidden, self.config.logits_scaling)
    }
}

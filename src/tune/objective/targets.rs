//! What the losses of target rows compare them with: labels, or a teacher.

use crate::batch::{PackedBatch, Passes};
use crate::model::{Decoder, HeadLoss};
use crate::ops::cross_entropy::LossWeights;
use crate::tune::teacher::Teacher;
use crate::{Error, Result};
use candle_core::Tensor;

/// The mean of a loss whose gradient is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mean {
    /// The mean over all target tokens.
    All,
    /// The sum of the groups' means, each over the group's own target tokens: groups of different prompts do not weigh each
    /// other's gradients.
    OfEachGroup,
    /// This batch's part of the mean over a step of so many target tokens.
    OfPart {
        /// Target tokens of the step.
        target_tokens: usize,
    },
}

/// The loss whose gradient is taken: cross-entropy, or the divergence from a teacher's distribution.
#[derive(Clone, Copy)]
pub struct Loss<'a> {
    /// Over which target tokens its mean is taken.
    pub mean: Mean,
    /// The loss of a target row is then KL(teacher || student); the batch has [`Passes::teacher_passes`].
    pub teacher: Option<&'a Teacher<'a>>,
}

impl From<Mean> for Loss<'_> {
    fn from(mean: Mean) -> Self {
        Self { mean, teacher: None }
    }
}

/// The target rows of a pass, and what their losses compare them with.
pub(super) struct Targets<'a> {
    pub(super) batch: &'a PackedBatch,
    /// Hidden states of the teacher's target rows, [targets, C]; without a teacher the labels count.
    teacher: Option<Tensor>,
}

impl<'a> Targets<'a> {
    /// Those of the pass of an index in [`Passes::iter`]; runs the teacher's pass.
    pub(super) fn new(
        model: &Decoder,
        passes: &'a Passes,
        pass: usize,
        teacher: Option<&Teacher>,
    ) -> Result<Self> {
        let batch = match pass.checked_sub(1) {
            None => &passes.prefix_pass,
            Some(i) => &passes.example_passes[i],
        };
        let teacher = match (teacher, passes.teacher_passes.get(pass)) {
            (None, _) => None,
            (Some(teacher), Some(batch)) => Some(teacher.hidden(model, batch)?),
            (Some(_), None) => {
                return Err(Error::Invalid(
                    "expected the passes of a teacher, found none in the batch".into(),
                ));
            }
        };
        Ok(Self { batch, teacher })
    }

    /// Losses for the student's hidden states [targets, C], and their gradient if `dloss` is given.
    pub(super) fn losses(
        &self,
        model: &Decoder,
        hidden: &Tensor,
        dloss: Option<&LossWeights>,
    ) -> Result<HeadLoss> {
        match &self.teacher {
            None => model.head_loss(hidden, &self.batch.labels, dloss),
            Some(teacher) => model.head_distillation(hidden, teacher, dloss),
        }
    }
}

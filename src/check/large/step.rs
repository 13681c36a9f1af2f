//! A whole step, in one pass and in several: its loss and its gradient.

use super::shapes::{Shape, group};
use super::{Errors, Large, Result};
use crate::Error;
use crate::batch::Passes;
use crate::check::ResultKind::Gradient;
use crate::model::{Decoder, Dtypes, TuningMemory};
use crate::prompt::Prefix;
use crate::tune::{self, Limits, Objective};
use candle_core::{DType, Tensor};

/// Rows of the step: more than the default limit of a pass on a GPU.
const ROWS: usize = 8300;

/// Most rows of a pass: the default on a GPU, and half of it.
const PASSES: [usize; 2] = [8192, 4096];

/// Layers of the models: the first and the last, which are special, and one between them.
const LAYERS: usize = 3;

const SEED: u64 = 42;

/// The result of a step.
struct LossAndGradient {
    loss: f64,
    gradient: Tensor,
}

pub(super) fn check(large: &mut Large, shape: &Shape, scale: usize) -> Result<()> {
    // The fewest reviews with this many rows.
    let mut examples = ROWS / scale / 32;
    let group = loop {
        let group = group(shape, scale, examples);
        if rows(&group) >= ROWS / scale {
            break group;
        }
        examples += 1;
    };
    let config = shape.config(LAYERS);
    let device = large.target.device;
    let f32s = Dtypes { weights: DType::F32, activations: DType::F32 };
    let memory = TuningMemory::new(&config, f32s, device.location());
    let (total, targets) = (rows(&group), 2 * examples);
    let bytes = 2 * memory.weights + memory.tape(total, targets, 0) + memory.workspace(total, targets, 0);
    large.case(&format!("{total} rows, {LAYERS} layers"), bytes, |large, case| {
        let under_test = Dtypes { weights: large.target.dtype, activations: large.target.dtype };
        let model = Decoder::random(&config, Dtypes::for_weights(DType::F32, device)?, device, SEED)?;
        let model = model.to_device(under_test, device)?;
        let prompts = model.embedding().narrow(0, 20, group.prompt.len())?.to_dtype(DType::F32)?;
        let prompts = Prefix::Embeddings(prompts);
        let groups = std::slice::from_ref(&group);
        let gradient = |model: &Decoder, max_rows| {
            outcome(tune::gradient(model, &prompts, groups, Limits::rows(max_rows))?)
        };
        let one_pass = large.run(|| gradient(&model, usize::MAX))?;
        // In f32 the steps in several passes are compared with the step in one pass; otherwise the errors of the step
        // in one pass are the allowed errors.
        let exact = match large.target.dtype {
            DType::F32 => LossAndGradient { loss: one_pass.loss, gradient: one_pass.gradient.clone() },
            _ => gradient(&model.to_device(f32s, device)?, usize::MAX)?,
        };
        for most in PASSES {
            let most = most / scale;
            let passes = Passes::new(groups, most).iter().count();
            if passes < 2 && most < total * 3 / 4 {
                return Err(Error::Invalid(format!(
                    "expected {total} rows in passes of {most}, found one pass"
                )));
            }
            let found = large.run(|| gradient(&model, most))?;
            let case = format!("{case}, {passes} passes of up to {most}");
            large.outcome(&case, [&found, &one_pass, &exact])?;
        }
        Ok(())
    })
}

fn rows(group: &crate::batch::PrefixGroup) -> usize {
    let work = group.sequences.iter().map(|s| s.rows()).sum::<usize>();
    group.prefix_rows() + work
}

fn outcome(objective: Objective) -> Result<LossAndGradient> {
    let loss = objective.loss()?;
    let Some(gradient) = objective.gradient else {
        return Err(Error::Invalid("expected a gradient of the step, found none".into()));
    };
    Ok(LossAndGradient { loss, gradient: gradient.values().clone() })
}

impl Large<'_> {
    /// Compares a step in several passes with the exact one; the allowed error is that of the step in one pass.
    fn outcome(&mut self, case: &str, [found, one_pass, exact]: [&LossAndGradient; 3]) -> Result<()> {
        let mut gradient = Errors::default();
        gradient.add(&found.gradient, &exact.gradient, &one_pass.gradient)?;
        // A loss is one number, whose error may be almost 0 by chance: it may err by the rounding of one value.
        let one_rounding = match self.target.dtype {
            DType::F32 => 0.0,
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        let loss = Errors {
            ours: (found.loss - exact.loss).abs(),
            naive: (one_pass.loss - exact.loss).abs().max(one_rounding * exact.loss),
            largest: exact.loss.abs(),
        };
        for (what, errors) in [("loss", loss), ("dprompts", gradient)] {
            // Passes add up in another order, three layers deep.
            let errors = Errors { largest: 5.0 * errors.largest, ..errors };
            self.judge((case, what, Gradient), errors);
        }
        Ok(())
    }
}

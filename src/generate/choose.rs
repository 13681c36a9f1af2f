//! From the hidden states of a step's target rows to the next token of each sequence.

use super::sequence::RunningSequence;
use super::{Event, Token};
use crate::Result;
use crate::device::Shortage;
use crate::model::{Decoder, StepLogits};
use crate::ops::cpu::View;
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// The target rows of one sequence: for each, in ascending order, its row number in the sequence and the index of its
/// logits.
struct SequenceRows<'a> {
    sequence: &'a mut RunningSequence,
    rows: Vec<(usize, usize)>,
}

/// What a pass computed of its target rows.
pub(super) enum TargetRows {
    /// Hidden states after the last norm, [rows, C].
    Hidden(Tensor),
    /// One row of each sequence.
    Logits(StepLogits),
}

/// What the device returns for some rows.
enum HeadOutput {
    /// The likeliest token of each.
    Tokens(Vec<u32>),
    /// Logits f32 [rows, V] on the CPU.
    Logits(Tensor),
}

/// Gives each sequence the logits of its rows. `rows` holds (sequence, row of the sequence) for each row of `computed`. Logits are computed for a part of the rows at a time, a smaller part if the device runs out of memory. If
/// the logits of a single row do not fit, its sequence ends.
pub(super) fn choose(
    model: &Decoder,
    computed: &TargetRows,
    rows: &[(usize, usize)],
    running: &mut [RunningSequence],
    shortage: &mut Shortage,
) -> Result<()> {
    let (mut start, mut step) = (0, model.head_rows());
    while start < rows.len() {
        let some = &rows[start..rows.len().min(start + step)];
        let argmax_only = some.iter().all(|(i, row)| running[*i].needs_argmax_only(*row));
        match logits_or_argmax(model, computed, start..start + some.len(), argmax_only) {
            Ok(output) => {
                distribute(model, output, some, running)?;
                start += some.len();
            }
            Err(error) if shortage.caused(&error) => {
                if some.len() == 1 {
                    running[some[0].0].events.push(Event::no_memory(&error));
                    start += 1;
                } else {
                    step = some.len() / 2;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Logits of some rows. If `argmax_only` is true, the likeliest token of each is enough.
fn logits_or_argmax(
    model: &Decoder,
    computed: &TargetRows,
    rows: Range<usize>,
    argmax_only: bool,
) -> Result<HeadOutput> {
    let logits = match computed {
        TargetRows::Hidden(hidden) => model.logits(&hidden.narrow(0, rows.start, rows.len())?)?,
        TargetRows::Logits(step) => step.logits.narrow(0, rows.start, rows.len())?,
    };
    if argmax_only && !logits.device().is_cpu() {
        // The device then returns one number a row instead of one for every token of the vocabulary.
        let tokens = match computed {
            TargetRows::Hidden(_) => logits.argmax(D::Minus1)?,
            TargetRows::Logits(step) => step.tokens.narrow(0, rows.start, rows.len())?,
        };
        return Ok(HeadOutput::Tokens(tokens.to_vec1::<u32>()?));
    }
    Ok(HeadOutput::Logits(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?))
}

fn distribute(
    model: &Decoder,
    output: HeadOutput,
    rows: &[(usize, usize)],
    running: &mut [RunningSequence],
) -> Result<()> {
    let logits = match output {
        HeadOutput::Tokens(tokens) => {
            for ((i, _), token) in rows.iter().zip(tokens) {
                running[*i].push(Token { id: token, logprob: None, top: Vec::new() });
            }
            return Ok(());
        }
        HeadOutput::Logits(logits) => logits,
    };
    let values = View::<f32>::new("logits", &logits)?;
    let vocabulary = logits.dims()[1];
    let mut by_sequence: Vec<SequenceRows> =
        running.iter_mut().map(|sequence| SequenceRows { sequence, rows: Vec::new() }).collect();
    for (index, (i, row)) in rows.iter().enumerate() {
        by_sequence[*i].rows.push((*row, index));
    }
    by_sequence.retain(|sequence| !sequence.rows.is_empty());
    by_sequence.par_iter_mut().try_for_each(|SequenceRows { sequence, rows }| {
        rows.iter().try_for_each(|(row, index)| {
            sequence.read_logits(model, *row, &values[index * vocabulary..(index + 1) * vocabulary])
        })
    })
}

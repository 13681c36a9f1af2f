//! From the hidden states of a step's target rows to what their sequences make of the logits.

use super::sequence::Sequence;
use super::{Event, Token};
use crate::Result;
use crate::device::Shortage;
use crate::model::Decoder;
use crate::ops::cpu::View;
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

/// The target rows of one sequence: row numbers of its own, in order, beside where their logits are.
struct Rows<'a> {
    sequence: &'a mut Sequence,
    rows: Vec<(usize, usize)>,
}

/// What the device has to say of some rows.
enum Found {
    /// The likeliest token of each.
    Tokens(Vec<u32>),
    /// Logits f32 [rows, V] on the CPU.
    Logits(Tensor),
}

/// Gives each sequence the logits of its rows: `rows` names (sequence, its own row) of each of `hidden` [rows, C]. Logits
/// exist for some rows at a time, fewer where the device runs out of memory; a sequence whose single row's logits do not
/// fit ends.
pub(super) fn choose(
    model: &Decoder,
    hidden: &Tensor,
    rows: &[(usize, usize)],
    running: &mut [Sequence],
    shortage: &mut Shortage,
) -> Result<()> {
    let (mut start, mut step) = (0, model.head_rows());
    while start < rows.len() {
        let some = &rows[start..rows.len().min(start + step)];
        let plain = some.iter().all(|(i, row)| running[*i].takes_the_likeliest(*row));
        match find(model, &hidden.narrow(0, start, some.len())?, plain) {
            Ok(found) => {
                give(model, found, some, running)?;
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

/// All that is asked of the device; with `plain` the likeliest token of each row is enough.
fn find(model: &Decoder, hidden: &Tensor, plain: bool) -> Result<Found> {
    let logits = model.logits(hidden)?;
    if plain && !logits.device().is_cpu() {
        // A number a row comes back from the device, and not a vocabulary.
        return Ok(Found::Tokens(logits.argmax(D::Minus1)?.to_vec1::<u32>()?));
    }
    Ok(Found::Logits(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?))
}

fn give(model: &Decoder, found: Found, rows: &[(usize, usize)], running: &mut [Sequence]) -> Result<()> {
    let logits = match found {
        Found::Tokens(tokens) => {
            for ((i, _), token) in rows.iter().zip(tokens) {
                running[*i].chosen(Token { id: token, logprob: None, top: Vec::new() });
            }
            return Ok(());
        }
        Found::Logits(logits) => logits,
    };
    let values = View::<f32>::new("logits", &logits)?;
    let vocabulary = logits.dims()[1];
    let mut of: Vec<Rows> = running.iter_mut().map(|sequence| Rows { sequence, rows: Vec::new() }).collect();
    for (at, (i, row)) in rows.iter().enumerate() {
        of[*i].rows.push((*row, at));
    }
    of.retain(|of| !of.rows.is_empty());
    of.par_iter_mut().try_for_each(|Rows { sequence, rows }| {
        rows.iter().try_for_each(|(row, at)| {
            sequence.read(model, *row, &values[at * vocabulary..(at + 1) * vocabulary])
        })
    })
}

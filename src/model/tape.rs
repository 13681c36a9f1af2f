//! What a forward pass leaves for the backward pass, block by block: all that the block's backward pass reads, or
//! the block's input alone, from which the backward pass runs the block again (Chen et al., 2016, arXiv:1604.06174).
//!
//! ```text
//! forward     block 0 .. n-1: x           block n ..: x, q/k/v, attention output, x', gate/up
//! backward    L-1, L-2 ..  n: from the tape, which is freed on the way
//!             n-1 ..       0: forward again into the room that those left, then backward
//! ```
//!
//! The first blocks are the ones that are run again: when their turn comes, the tapes behind them are gone, and
//! what running a block again takes fits where those were. At the other end it would come on top of all of them. The
//! last block is never run again: its queries, output and MLP exist for target rows only, and its turn comes first.

use crate::ops::attention::{Kept, Qkv};
use crate::ops::rms_norm::Normed;
use crate::{Error, Result};
use candle_core::Tensor;

/// What the backward pass needs of a forward pass.
pub struct Tape {
    pub(super) blocks: Vec<Saved>,
    /// Leading rows of the pass that are prefixes.
    pub(super) prefix_rows: usize,
    pub(super) last: Normed,
}

/// What is kept of a block.
pub(super) enum Saved {
    /// All that its backward pass reads.
    Whole(BlockTape),
    /// The residual stream at its attention norm [T, C].
    Input {
        residual: Tensor,
        /// [P, 2K D] of a prefix pass: example passes read them.
        keys_values: Option<Tensor>,
    },
}

pub(super) struct BlockTape {
    pub(super) attention: NormTape,
    pub(super) qkv: Qkv,
    pub(super) attended: Kept,
    pub(super) mlp: NormTape,
    pub(super) gate_up: Tensor,
}

/// The residual stream at a norm, and its reciprocal RMS.
pub(super) struct NormTape {
    pub(super) residual: Tensor,
    pub(super) rstd: Tensor,
}

impl Tape {
    /// A matrix per block whose last 2K D columns are keys and values of the pass's prefix rows.
    ///
    /// # Errors
    /// A pass that recomputes blocks and whose prefixes no other pass reads ([`crate::batch::PackedBatch::shares_prefixes`]).
    pub fn keys_values(&self) -> Result<Vec<Tensor>> {
        let of = |saved: &Saved| match saved {
            Saved::Whole(tape) => Ok(tape.qkv.keys_values().narrow(0, 0, self.prefix_rows)?),
            Saved::Input { keys_values: Some(kv), .. } => Ok(kv.clone()),
            Saved::Input { keys_values: None, .. } => {
                let found = "a pass that shares none and whose blocks are recomputed";
                Err(Error::Invalid(format!("keys and values: expected a prefix pass, found {found}")))
            }
        };
        self.blocks.iter().map(of).collect()
    }

    /// The hidden states of the target rows behind the last norm, [targets, C].
    pub fn hidden(&self) -> &Tensor {
        &self.last.normed
    }
}

impl BlockTape {
    /// The block's input alone, and its keys and values [P, 2K D], `kv_width` columns wide, of so many prefix rows if
    /// example passes read them.
    pub(super) fn input(self, kv_width: usize, shared_rows: Option<usize>) -> Result<Saved> {
        let keys_values = shared_rows.map(|rows| own_keys_values(&self.qkv, rows, kv_width)).transpose()?;
        Ok(Saved::Input { residual: self.attention.residual, keys_values })
    }
}

/// Keys and values of the first `rows` rows as a matrix of their own, [rows, `kv_width`]: as a view they would hold the
/// queries and the other rows too.
pub(super) fn own_keys_values(qkv: &Qkv, rows: usize, kv_width: usize) -> Result<Tensor> {
    let kv = qkv.keys_values();
    let columns = kv.dims()[1];
    Ok(kv.narrow(0, 0, rows)?.narrow(1, columns - kv_width, kv_width)?.force_contiguous()?)
}

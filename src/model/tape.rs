//! What a forward pass saves for the backward pass, layer by layer: all that the layer's backward pass reads, or
//! the layer's input alone, from which the backward pass runs the layer again (Chen et al., 2016, arXiv:1604.06174).
//!
//! ```text
//! forward     layer 0 .. n-1: x           layer n ..: x, q/k/v, attention output, x', gate/up
//! backward    L-1, L-2 ..  n: from the tape, which is freed on the way
//!             n-1 ..       0: forward again in the memory that those left, then backward
//! ```
//!
//! The first layers are the ones that are run again: by then the tapes of the later layers are gone, and
//! what running a layer again takes fits in their memory. At the other end it would be needed on top of all of them. The
//! last layer is never run again: its queries, output and feed-forward network exist for target rows only, and its backward
//! pass comes first.

use super::layer::{PrefixState, Saved};
use crate::Result;
use crate::ops::rms_norm::Normed;
use candle_core::Tensor;

/// What the backward pass needs of a forward pass.
pub struct Tape {
    pub(super) layers: Vec<Saved>,
    /// Leading rows of the pass that are prefixes.
    pub(super) prefix_rows: usize,
    pub(super) last: Normed,
}

impl Tape {
    /// What the example passes read of the prefixes in this pass, layer by layer.
    ///
    /// # Errors
    /// Returns an error if layers of the pass are recomputed and no other pass reads its prefixes
    /// ([`crate::batch::PackedBatch::shares_prefixes`]).
    pub fn prefix_states(&self) -> Result<Vec<PrefixState>> {
        self.layers.iter().map(|saved| saved.prefix_state(self.prefix_rows)).collect()
    }

    /// The hidden states of the target rows after the last norm, [targets, C].
    pub fn hidden(&self) -> &Tensor {
        &self.last.normed
    }
}

//! The forward pass over a packed batch.
//!
//! No weight gets a gradient, so the inputs of projections are not saved. On a CPU that multiplies bf16, the residual stream
//! and all sums are f32; queries, keys and values, attention's output, gate and up are stored in bf16, in which the
//! projections read them.

use super::layer::{Given, LayerPass, LayerSaved, PrefixState, Saved, Stream};
use super::{Decoder, KvCache, Tape};
use crate::Result;
use crate::batch::PackedBatch;
use crate::device::{self, Work};
use crate::ops::backend::{Route, route};
use crate::ops::embed::{self, EmbedLookup};
use crate::ops::rms_norm::Normed;
use candle_core::Tensor;

/// Rows of a pass that fill a GPU: a product of so many rows does 4,096 operations for each value of the weight, seven
/// times what an H100 does in bf16 while it reads one (989 TFLOP/s at 3.35 TB/s: 590). By arithmetic, not measured.
pub(crate) const GPU_FULL_ROWS: usize = 2048;

/// Rows that a prefix pass should have at least, in passes of at most `max_rows` ([`crate::batch::Packing`]). A GPU reads
/// all weights for it, forward and backward, and launches as much as for a full pass, so it takes some sequences too: up
/// to 1,024 rows, and a quarter of what passes have beyond [`GPU_FULL_ROWS`]. Its tape stays while the example passes
/// run: if memory is short, so that passes are not larger than that, it would cost more in recomputed layers than it
/// saves (by arithmetic 5 % and 1 % of a step of 8b on a 24 GB card). A CPU takes as long for the prefixes as for as many
/// other rows.
pub(super) fn prefix_pass_rows(on_cpu: bool, max_rows: usize) -> usize {
    // What the emulator runs is small.
    #[cfg(test)]
    if crate::ops::gpu::emulated::is_on() {
        return max_rows / 4;
    }
    if on_cpu { 0 } else { (max_rows.saturating_sub(GPU_FULL_ROWS) / 4).min(1024) }
}

/// Result of [`Decoder::prefix_pass`].
pub struct PrefixPass {
    /// What the sequences of other passes read of the prefix rows, layer by layer.
    pub states: Vec<PrefixState>,
    /// The hidden states of the target rows after the last norm, [targets, C].
    pub hidden: Tensor,
}

impl Decoder {
    /// Rows that a prefix pass should have at least, in passes of at most `max_rows`.
    pub(crate) fn prefix_pass_rows(&self, max_rows: usize) -> usize {
        prefix_pass_rows(route(&self.embedding) == Route::Cpu, max_rows)
    }

    /// Runs a batch and saves what [`Decoder::backward`] needs. `prompts` [n, C] holds the virtual tokens of
    /// all groups; `prefix` is [`Tape::prefix_states`] of the pass that holds the prefixes, if that is another one.
    /// Of the first `recompute` layers, at most all but the last, only the input is saved: the backward pass runs
    /// them again, with the same gradient.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn forward(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        prefix: Option<&[PrefixState]>,
        recompute: usize,
    ) -> Result<Tape> {
        let recompute = recompute.min(self.layers.len().saturating_sub(1));
        let shares = batch.shares_prefixes || batch.examples == 0;
        let shared_rows = shares.then_some(batch.prefix_rows);
        let mut layers = Vec::with_capacity(self.layers.len());
        let last = self.run(batch, prompts, prefix, |i, saved| {
            let mixer = &self.layers[i].mixer;
            layers.push(if i >= recompute {
                Saved::All(saved)
            } else {
                saved.into_input(shared_rows, mixer)?
            });
            Ok(())
        })?;
        Ok(Tape { layers, prefix_rows: batch.prefix_rows, last })
    }

    /// Runs a batch without a tape: the hidden states of the target rows after the last norm, [targets, C].
    /// `prompts` and `prefix` are as in [`Decoder::forward`].
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn hidden(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        prefix: Option<&[PrefixState]>,
    ) -> Result<Tensor> {
        Ok(self.run(batch, prompts, prefix, |_, _| Ok(()))?.normed)
    }

    /// Runs a batch that holds prefixes, without a tape, for other passes that read these prefixes. `given` is what the batch
    /// itself reads of prompts that are keys and values.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn prefix_pass(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        given: Option<&[PrefixState]>,
    ) -> Result<PrefixPass> {
        let mut states = Vec::with_capacity(self.layers.len());
        let last = self.run(batch, prompts, given, |i, saved| {
            states.push(match batch.examples {
                0 => saved.prefix_state(batch.prefix_rows)?,
                _ => saved.own_prefix_state(batch.prefix_rows, &self.layers[i].mixer)?,
            });
            Ok(())
        })?;
        Ok(PrefixPass { states, hidden: last.normed })
    }

    /// Runs a batch; `keep` is called with what each layer saved, and frees what it does not keep of it.
    fn run(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        prefix: Option<&[PrefixState]>,
        mut keep: impl FnMut(usize, LayerSaved) -> Result<()> + Send,
    ) -> Result<Normed> {
        self.through_layers(batch, prompts, |i, stream, pass| {
            let layer = &self.layers[i];
            let given = Given { prefix: prefix.map(|states| &states[i]), routing: None };
            let saved = layer.forward(layer.normed(&stream, pass)?, pass, given)?;
            let output = layer.output(&saved, pass)?;
            drop(stream);
            keep(i, saved)?;
            Ok(output)
        })
    }

    /// Runs a batch while generating, without a tape: what later tokens read of its rows goes into `cache`, whose rows the
    /// batch's segments name. Returns the hidden states of the target rows after the last norm, [targets, C].
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn infer(&self, batch: &PackedBatch, prompts: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let last = self
            .through_layers(batch, prompts, |i, stream, pass| self.layers[i].infer(&stream, pass, cache, i));
        Ok(last?.normed)
    }

    /// The embeddings of a batch, taken from layer to layer by `run_layer`, and the last norm.
    fn through_layers(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        mut run_layer: impl FnMut(usize, Stream, &LayerPass) -> Result<Stream> + Send,
    ) -> Result<Normed> {
        device::before(Work::Pass, batch.ids.len())?;
        self.on_pool(|| {
            let rope = self.rope_of(batch)?;
            let mut stream = Stream::new(embed::forward(&self.embedding, prompts, &self.lookup(batch))?);
            for i in 0..self.layers.len() {
                stream = run_layer(i, stream, &self.layer_pass(i, batch, rope.as_deref()))?;
            }
            stream.normed(&self.norm, self.config.residual_multiplier, self.dtype())
        })
    }

    pub(super) fn lookup<'a>(&self, batch: &'a PackedBatch) -> EmbedLookup<'a> {
        EmbedLookup { ids: (&batch.ids).into(), multiplier: self.config.embedding_multiplier }
    }
}

//! Decoding: steps in which every sequence has one row, the token that it generated last. A step of a small model is bound by the
//! number of its launches, so on CUDA it can run as one graph ([`graphs`]).
//!
//! A graph repeats addresses and sizes, so a step is made to have few of them:
//!
//! ```text
//!   sequences  a b c d e         a step of 5 sequences runs in bucket 8: 1, 2, 4 ... 128
//!   rows       a b c d e - - -   a padding sequence has token 0 at position 0, reads and writes a row of the cache that is its
//!                                own, and nobody reads its logits
//!   inputs     [ids | positions | cache rows | ... ]     one buffer a bucket, written before each step
//!   tiles      [a b] [c d e] [- - -] [] [] ...           of attention: as many as rows, the last ones without queries
//!   outputs    logits [8, V], tokens `[8]`               buffers of the bucket
//! ```
//!
//! The first step of a bucket runs as any other pass, which loads the kernels. The second is recorded, and from then on its graph is
//! launched. Graphs are dropped when a matrix that they read has moved: the table of rotary angles grew, or the cache is another.

use super::{Continuation, Decoder, KvCache};
use crate::Result;
use crate::batch::PackedBatch;
use crate::checkpoint::MixerKind;
use crate::ops::attention::PlannedPass;
use crate::ops::backend::{Route, route};
use crate::ops::gpu::graphs::{self, Graph};
use crate::ops::{Indices, profile};
use candle_core::{D, Tensor, TensorId};
use std::collections::BTreeMap;
use std::sync::Once;

/// Sequences of the largest bucket. A step of more is bound by products and attention, not by launches.
const MOST: usize = 128;

/// Sequences of the bucket in which a step of `sequences` runs; `None` if it runs in none.
fn bucket(sequences: usize) -> Option<usize> {
    (1..=MOST).contains(&sequences).then(|| sequences.next_power_of_two())
}

/// Logits of the sequences of a step.
pub(crate) struct StepLogits {
    /// [sequences, V].
    pub(crate) logits: Tensor,
    /// The likeliest token of each, u32 `[sequences]`.
    pub(crate) tokens: Tensor,
}

impl StepLogits {
    /// Those of the first `sequences` rows, without the columns of a padded head.
    fn first(&self, sequences: usize, model: &Decoder) -> Result<Self> {
        let logits = self.logits.narrow(0, 0, sequences)?.narrow(1, 0, model.config.vocab_size)?;
        Ok(Self { logits, tokens: self.tokens.narrow(0, 0, sequences)? })
    }
}

/// The buffers of a bucket, and its graph.
#[derive(Default)]
struct BucketStep {
    inputs: Option<Tensor>,
    /// Of all rows, with the columns of a padded head; `None` before the first step.
    outputs: Option<StepLogits>,
    graph: Option<Graph>,
}

/// How steps run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// In buckets, as graphs.
    Graphs,
    /// In buckets.
    #[cfg(test)]
    Buckets,
    /// As any other pass, since a graph failed or there is too little memory.
    Stopped,
}

/// Matrices whose addresses graphs repeat and that may become others. Weights stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReadMatrices {
    angles: Option<TensorId>,
    cache: TensorId,
    prompts: TensorId,
}

/// Runs the decoding steps of one cache.
pub(crate) struct Decoding {
    mode: Mode,
    buckets: BTreeMap<usize, BucketStep>,
    recorded_with: Option<ReadMatrices>,
}

impl Decoding {
    /// Rows that the cache needs for padding sequences, one each: a step of 65 sequences has the most.
    pub(crate) const PADDING_ROWS: usize = MOST / 2 - 1;

    /// For `model` on its device, if the user asks for graphs; `None`, with a warning, if it can't have them.
    ///
    /// # Errors
    /// Returns an error if the variable [`graphs::VARIABLE`] has a value that it can't have.
    pub(crate) fn new(model: &Decoder) -> Result<Option<Self>> {
        if !graphs::are_requested()? {
            return Ok(None);
        }
        let obstacle = match model.config.layers_with(MixerKind::Mamba2) {
            0 => graphs::obstacle(model.device()),
            _ => Some("the host copies the states of Mamba2 layers"),
        };
        match obstacle {
            None => Ok(Some(Self::with(Mode::Graphs))),
            Some(reason) => {
                warn(&format!("{}=1 has no effect: {reason}", graphs::VARIABLE));
                Ok(None)
            }
        }
    }

    /// Steps are padded and never recorded.
    #[cfg(test)]
    pub(crate) fn padded() -> Self {
        Self::with(Mode::Buckets)
    }

    fn with(mode: Mode) -> Self {
        Self { mode, buckets: BTreeMap::new(), recorded_with: None }
    }

    /// Frees all graphs and buffers; steps run as any other pass from now on.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub(crate) fn stop(&mut self, model: &Decoder) -> Result<()> {
        if self.mode == Mode::Stopped {
            return Ok(());
        }
        self.mode = Mode::Stopped;
        self.buckets.clear();
        graphs::free_memory(model.device())
    }

    /// Runs a step; `None` if it has to run as any other pass: a sequence has several tokens, or there are too many sequences.
    ///
    /// # Errors
    /// As [`KvCache::pack`] and [`Decoder::infer`].
    pub(crate) fn run(
        &mut self,
        model: &Decoder,
        (prompts, cache): (&Tensor, &mut KvCache),
        next: &[Continuation],
    ) -> Result<Option<StepLogits>> {
        let is_decoding = next.iter().all(|sequence| sequence.tokens.len() == 1 && sequence.targets == 1);
        if self.mode == Mode::Stopped || !is_decoding || profile::is_on() {
            return Ok(None);
        }
        let Some(rows) = bucket(next.len()) else { return Ok(None) };
        let batch = cache.pack_padded(next, rows)?;
        self.drop_graphs_unless(ReadMatrices {
            angles: model.rope_of(&batch)?.map(|table| table.tables().0.id()),
            cache: cache.keys_values(0)?.id(),
            prompts: prompts.id(),
        });
        let step = self.buckets.entry(rows).or_default();
        model.write_inputs(&batch, cache, &mut step.inputs)?;
        let mut compute =
            || graphs::with_kept_arguments(model.device(), || model.decode(&batch, prompts, &mut *cache));
        if self.mode == Mode::Graphs && step.outputs.is_some() {
            let Err(error) = step.run_graph(model, &mut compute) else {
                return step.first(next.len(), model);
            };
            let outputs = compute()?;
            warn(&format!(
                "a step of {} sequences did not run as a CUDA graph, and steps run without graphs from now on: {error}",
                next.len()
            ));
            self.stop(model)?;
            return outputs.first(next.len(), model).map(Some);
        }
        step.outputs = Some(compute()?);
        step.first(next.len(), model)
    }

    /// Drops all graphs if they were recorded with other matrices than `read`.
    fn drop_graphs_unless(&mut self, read: ReadMatrices) {
        if self.recorded_with.replace(read) != Some(read) {
            self.buckets.values_mut().for_each(|step| step.graph = None);
        }
    }
}

impl BucketStep {
    /// Runs the step as a graph, which is recorded if there is none: what `compute` enqueues, and copies to the outputs.
    fn run_graph(&mut self, model: &Decoder, compute: impl FnOnce() -> Result<StepLogits>) -> Result<()> {
        let Some(outputs) = &self.outputs else { return Ok(()) };
        let graph = match self.graph.take() {
            Some(graph) => graph,
            None => graphs::capture(model.device(), || {
                let computed = compute()?;
                outputs.logits.slice_set(&computed.logits, 0, 0)?;
                outputs.tokens.slice_set(&computed.tokens, 0, 0)?;
                Ok(())
            })?,
        };
        graph.launch()?;
        self.graph = Some(graph);
        Ok(())
    }

    fn first(&self, sequences: usize, model: &Decoder) -> Result<Option<StepLogits>> {
        self.outputs.as_ref().map(|outputs| outputs.first(sequences, model)).transpose()
    }
}

impl Decoder {
    /// Writes the indices of a decoding step and the plans of its attention to `inputs`, which is made if there is none, in one
    /// copy; nothing on the CPU. Their sizes depend on the number of rows alone.
    fn write_inputs(&self, batch: &PackedBatch, cache: &KvCache, inputs: &mut Option<Tensor>) -> Result<()> {
        if route(&self.embedding) != Route::Kernel {
            return Ok(());
        }
        let pass = PlannedPass {
            segments: &batch.segments,
            target_segments: &batch.target_segments,
            rows: batch.ids.len(),
            targets: batch.target_rows.len(),
            prefix: None,
            layers: self.layers.len(),
            backward: false,
        };
        let plans = self.attention.plans(&pass, &self.embedding);
        let PackedBatch { ids, position_ids, target_rows, target_positions, .. } = batch;
        let lists = [ids, position_ids, target_rows, target_positions, cache.written_rows()].into_iter();
        Indices::write_together(lists.chain(pass.visible()).chain(plans.indices()), inputs, self.device())
    }

    /// Runs a decoding step, and chooses the likeliest tokens.
    fn decode(&self, batch: &PackedBatch, prompts: &Tensor, cache: &mut KvCache) -> Result<StepLogits> {
        let logits = self.padded_logits(&self.infer(batch, prompts, cache)?)?;
        let tokens = logits.narrow(1, 0, self.config.vocab_size)?.argmax(D::Minus1)?;
        Ok(StepLogits { logits, tokens })
    }
}

/// Prints a warning, once for the process: every evaluation makes a cache of its own.
fn warn(text: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| eprintln!("warning: {text}"));
}

#[cfg(test)]
mod tests;

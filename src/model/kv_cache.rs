//! Keys and values of prefixes and of the sequences that follow them, in one matrix per layer of the model.
//!
//! ```text
//!   rows   0        25   34          70        91                          capacity
//!          ┌─────────┬────┬───────────┬─────────┬─────────────────────────────┐
//!          │ prefix  │    │ sequence  │ another │ free                        │   [capacity, 2K D]
//!          └─────────┴────┴───────────┴─────────┴─────────────────────────────┘
//!           virtual   free  filled ▸ reserved
//!           tokens
//! ```
//!
//! A range is allocated when a sequence begins, for its longest possible result, so that no sequence is moved or removed
//! later. Ranges that are freed are joined with their neighbours, and the lowest range that is large enough is
//! allocated first.
//!
//! A Mamba2 layer keeps one state for a whole range, in a *slot*, however many rows the range has. A sequence's first rows
//! start from the slot of its prefix, without a copy, and write their own. A pass that failed must not be run again for
//! sequences with slots: some layers' states have moved on, and others' have not.

mod pack;
mod slots;

pub use pack::Continuation;

use super::Decoder;
use super::layer::{PrefixState, other_kind};
use crate::Result;
use crate::checkpoint::MixerKind;
use crate::device::{self, Work, free_memory};
use crate::ops::Indices;
use crate::ops::rope::CacheRows;
use crate::ops::ssd::ScanStates;
use candle_core::{Device, Tensor};
use slots::Slots;
use std::ops::Range;
use std::sync::OnceLock;

/// What one layer keeps of the rows of all requests while they are generated.
enum LayerCache {
    /// Attention: keys and values, [capacity, 2K D].
    KeysValues(Tensor),
    /// Mamba2: states in slots.
    Scan(ScanStates),
}

/// What the layers keep of every row that later tokens read.
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
    /// Rows after them for sequences that pad a step, each of which has one.
    padding_rows: usize,
    /// Ranges that nobody has, in order, no two of which touch.
    free_ranges: Vec<Range<usize>>,
    /// Slots of the ranges that are allocated; `None` if no layer keeps a state.
    slots: Option<Slots>,
    writes: Writes,
}

/// Where the rows of a pass go.
#[derive(Default)]
struct Writes {
    /// (row of the pass, rows of the cache) of tokens that stand together.
    ranges: Vec<(usize, Range<usize>)>,
    /// Rows of the pass that are a sequence's only one, and their rows of the cache.
    from: Indices,
    to: Vec<u32>,
    /// `to` in every column, on the device.
    to_columns: OnceLock<Tensor>,
    /// The row of the cache of every row of the pass.
    rows: Indices,
    /// The slot of each sequence of the pass; empty without slots.
    slots: Vec<usize>,
    /// Whether a layer has written its states.
    states_written: bool,
}

impl KvCache {
    /// Room for `capacity` rows of keys and values, in the dtype that the model's products read, and for the states of as many
    /// sequences and prefixes as a quarter of the free memory holds.
    ///
    /// # Errors
    /// Returns an error if there is no memory for two states, or a device operation fails.
    pub fn new(model: &Decoder, capacity: usize) -> Result<Self> {
        Self::with_padding(model, capacity, 0)
    }

    /// The same with `padding_rows` more rows for [`KvCache::pack_padded`].
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub(crate) fn with_padding(model: &Decoder, capacity: usize, padding_rows: usize) -> Result<Self> {
        device::before(Work::Cache, capacity)?;
        let (config, device) = (model.config(), model.device());
        let slots = match config.layers_with(MixerKind::Mamba2) {
            0 => None,
            _ => Some(Slots::new(slots::count(capacity, model.state_bytes(), free_memory(device)?)?)),
        };
        let width = 2 * config.num_key_value_heads * config.head_dim;
        let layer = |i: usize| match (&config.mamba, config.mixer(i), &slots) {
            (Some(mamba), MixerKind::Mamba2, Some(slots)) => {
                let zeros = |shape, dtype| Tensor::zeros(shape, dtype, device);
                let (inner, tail) = (mamba.inner(), mamba.taps - 1);
                Ok(LayerCache::Scan(ScanStates {
                    ssm: zeros((slots.count(), inner, mamba.state), model.prompt_dtype())?,
                    conv: zeros((slots.count(), tail, mamba.channels()), model.product_dtype())?,
                }))
            }
            _ => {
                let matrix = Tensor::zeros((capacity + padding_rows, width), model.product_dtype(), device)?;
                Ok(LayerCache::KeysValues(matrix))
            }
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let (free_ranges, writes) = (all_free(capacity), Writes::default());
        Ok(Self { layers, capacity, padding_rows, free_ranges, slots, writes })
    }

    /// Rows in all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether the batch packed last may be run again if its pass failed: no layer has written a state over the one that it
    /// started from.
    pub fn can_run_again(&self) -> bool {
        !self.writes.states_written
    }

    /// Allocates `rows` consecutive rows, and a slot for their state; `None` if there are no such rows, or no slot.
    pub fn allocate(&mut self, rows: usize) -> Option<Range<usize>> {
        if rows == 0 {
            return Some(0..0);
        }
        if self.slots.as_ref().is_some_and(Slots::is_full) {
            return None;
        }
        let index = self.free_ranges.iter().position(|range| range.len() >= rows)?;
        let range = &mut self.free_ranges[index];
        let taken = range.start..range.start + rows;
        range.start = taken.end;
        if range.start == range.end {
            self.free_ranges.remove(index);
        }
        if let Some(slots) = &mut self.slots {
            slots.take(taken.start);
        }
        Some(taken)
    }

    /// Frees rows that were allocated.
    pub fn free(&mut self, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
        if let Some(slots) = &mut self.slots {
            slots.give_back(rows.start);
        }
        let index = self.free_ranges.partition_point(|range| range.start < rows.start);
        let joins_next = self.free_ranges.get(index).is_some_and(|next| next.start == rows.end);
        let joins_last = index > 0 && self.free_ranges[index - 1].end == rows.start;
        match (joins_last, joins_next) {
            (true, true) => self.free_ranges[index - 1].end = self.free_ranges.remove(index).end,
            (true, false) => self.free_ranges[index - 1].end = rows.end,
            (false, true) => self.free_ranges[index].start = rows.start,
            (false, false) => self.free_ranges.insert(index, rows),
        }
    }

    /// The row of the cache of every row of the batch packed last.
    pub(super) fn written_rows(&self) -> &Indices {
        &self.writes.rows
    }

    /// Writes what the layers read of a prompt that is keys and values to the first of the allocated `rows`; the state of Mamba2
    /// layers is that of the prompt.
    ///
    /// # Errors
    /// Returns an error if the layers are others or a device operation fails.
    pub fn write_given(&mut self, rows: &Range<usize>, given: &[PrefixState]) -> Result<()> {
        let slot = self.slots.as_ref().map(|slots| slots.of_rows(rows));
        for (layer, state) in self.layers.iter().zip(given) {
            match (layer, state, slot) {
                (LayerCache::KeysValues(matrix), PrefixState::KeysValues(own), _) => {
                    matrix.slice_set(own, 0, rows.start)?;
                }
                (LayerCache::Scan(states), PrefixState::Scan(own), Some(slot)) => {
                    states.ssm.slice_set(&own.ssm, 0, slot)?;
                    states.conv.slice_set(&own.conv, 0, slot)?;
                }
                _ => return Err(other_kind("a prompt's keys and values")),
            }
        }
        Ok(())
    }

    /// The rows to which a layer's keys and values of the batch packed last are written.
    pub(super) fn rows(&self, layer: usize) -> Result<CacheRows<'_>> {
        Ok(CacheRows { cache: self.keys_values(layer)?, rows: (&self.writes.rows).into() })
    }

    /// Writes the keys and values [rows of the batch, 2K D] of the batch packed last, by candle's ops.
    pub(super) fn write(&mut self, layer: usize, kv: &Tensor) -> Result<()> {
        let matrix = self.keys_values(layer)?;
        for (row, range) in &self.writes.ranges {
            matrix.slice_set(&kv.narrow(0, *row, range.len())?.contiguous()?, 0, range.start)?;
        }
        if !self.writes.to.is_empty() {
            let rows = kv.contiguous()?.index_select(&self.writes.from.to_device(kv.device())?, 0)?;
            matrix.scatter_set(&self.writes.columns(kv.dims()[1], kv.device())?, &rows, 0)?;
        }
        Ok(())
    }

    /// Keys and values of layer `layer`, [capacity, 2K D].
    pub(super) fn keys_values(&self, layer: usize) -> Result<&Tensor> {
        match &self.layers[layer] {
            LayerCache::KeysValues(matrix) => Ok(matrix),
            LayerCache::Scan(_) => Err(other_kind("the layer's cache")),
        }
    }

    /// The states of all slots of layer `layer`.
    pub(super) fn scan_states(&self, layer: usize) -> Result<&ScanStates> {
        match &self.layers[layer] {
            LayerCache::Scan(states) => Ok(states),
            LayerCache::KeysValues(_) => Err(other_kind("the layer's cache")),
        }
    }

    /// Writes the states at the end of the sequences of the batch packed last.
    pub(super) fn write_scan_states(&mut self, layer: usize, ends: &ScanStates) -> Result<()> {
        self.writes.states_written = true;
        let states = self.scan_states(layer)?;
        for (i, slot) in self.writes.slots.iter().enumerate() {
            states.ssm.slice_set(&ends.ssm.narrow(0, i, 1)?.contiguous()?, 0, *slot)?;
            states.conv.slice_set(&ends.conv.narrow(0, i, 1)?.contiguous()?, 0, *slot)?;
        }
        Ok(())
    }
}

impl Writes {
    fn columns(&self, width: usize, device: &Device) -> Result<Tensor> {
        if let Some(columns) = self.to_columns.get() {
            return Ok(columns.clone());
        }
        let columns: Vec<u32> = self.to.iter().flat_map(|row| std::iter::repeat_n(*row, width)).collect();
        let columns = Tensor::from_vec(columns, (self.to.len(), width), device)?;
        // The one thread that writes made both.
        let _ = self.to_columns.set(columns.clone());
        Ok(columns)
    }
}

fn all_free(capacity: usize) -> Vec<Range<usize>> {
    if capacity == 0 { Vec::new() } else { std::iter::once(0..capacity).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cache_of(capacity: usize) -> KvCache {
        let (free_ranges, writes) = (all_free(capacity), Writes::default());
        KvCache { layers: Vec::new(), capacity, padding_rows: 0, free_ranges, slots: None, writes }
    }

    #[test]
    fn what_is_given_back_is_whole_again() {
        let mut cache = cache_of(10);
        let taken: Vec<_> = [3, 3, 4].into_iter().map(|n| cache.allocate(n).unwrap()).collect();
        assert_eq!(taken, [0..3, 3..6, 6..10]);
        assert_eq!(cache.allocate(1), None);
        cache.free(taken[0].clone());
        cache.free(taken[2].clone());
        assert_eq!(cache.allocate(5), None, "seven rows are free, and no five stand together");
        cache.free(taken[1].clone());
        assert_eq!(cache.allocate(10), Some(0..10));
    }

    proptest! {
        #[test]
        fn no_row_is_had_twice_and_none_is_lost(sizes in prop::collection::vec((0usize..9, any::<bool>()), 1..60)) {
            let mut cache = cache_of(40);
            let mut had: Vec<Range<usize>> = Vec::new();
            for (rows, give_back) in sizes {
                if give_back && !had.is_empty() {
                    cache.free(had.remove(rows % had.len()));
                } else if let Some(range) = cache.allocate(rows) {
                    prop_assert_eq!(range.len(), rows);
                    had.push(range);
                }
                let mut all: Vec<usize> = had.iter().chain(&cache.free_ranges).flat_map(Clone::clone).collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..40).collect::<Vec<_>>());
                prop_assert!(cache.free_ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}

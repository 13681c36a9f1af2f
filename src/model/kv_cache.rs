//! Keys and values of sequences that are being generated, and of the prefix that they share.

use crate::data::pack::PackedBatch;
use crate::ops::{Indices, Segment};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Keys and values of a prefix, made once and shared by every sequence behind it.
#[derive(Clone)]
pub struct PrefixCache {
    /// Per block, a matrix whose last 2K D columns are the keys and values of its rows.
    pub layers: Vec<Tensor>,
    /// Rows of the prefix, P.
    pub rows: usize,
}

/// Keys and values per block, [capacity, 2K D]: each sequence has a range of rows with room to grow.
pub struct KvCache {
    layers: Vec<Tensor>,
    slots: Vec<Slot>,
    prefix: Option<PrefixCache>,
    /// Rows that the pass under way writes, in the order of its rows.
    writes: Vec<Range<usize>>,
}

#[derive(Clone)]
struct Slot {
    rows: Range<usize>,
    filled: usize,
}

impl KvCache {
    /// Room for sequences of `capacities` rows behind `prefix`, in the dtype of the activations; `width` is 2K D.
    ///
    /// # Errors
    /// The device's.
    pub fn new(
        blocks: usize,
        width: usize,
        capacities: &[usize],
        prefix: Option<PrefixCache>,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let mut slots = Vec::new();
        let mut end = 0;
        for rows in capacities {
            slots.push(Slot { rows: end..end + rows, filled: 0 });
            end += rows;
        }
        let layer = || Tensor::zeros((end, width), dtype, device);
        let layers = (0..blocks).map(|_| layer()).collect::<candle_core::Result<_>>()?;
        Ok(Self { layers, slots, prefix, writes: Vec::new() })
    }

    /// Packs the next tokens of some sequences, (slot, tokens), as a batch whose last rows are target rows.
    ///
    /// # Errors
    /// More tokens than a slot has room for.
    pub fn pack(&mut self, next: &[(usize, &[u32])]) -> Result<PackedBatch> {
        let prefix = self.prefix.as_ref().map_or(0, |p| p.rows);
        let (mut ids, mut position_ids, mut target_rows) = (Vec::new(), Vec::new(), Vec::new());
        let (mut segments, mut target_segments) = (Vec::new(), Vec::new());
        self.writes.clear();
        for (i, (slot, tokens)) in next.iter().enumerate() {
            let slot = &mut self.slots[*slot];
            let (first, filled) = (slot.filled, slot.filled + tokens.len());
            if filled > slot.rows.len() || tokens.is_empty() {
                return Err(Error::Shape {
                    op: "kv_cache",
                    expected: format!("1 to {} more tokens", slot.rows.len() - first),
                    found: format!("{}", tokens.len()),
                });
            }
            slot.filled = filled;
            self.writes.push(slot.rows.start + first..slot.rows.start + filled);
            let queries = ids.len()..ids.len() + tokens.len();
            ids.extend_from_slice(tokens);
            position_ids.extend((prefix + first) as u32..(prefix + filled) as u32);
            target_rows.push(queries.end as u32 - 1);
            let keys = slot.rows.start..slot.rows.start + filled;
            let segment = |queries, first| Segment {
                queries,
                keys: keys.clone(),
                first,
                prefix: (prefix > 0).then_some(0..prefix),
            };
            target_segments.push(segment(i..i + 1, filled - 1));
            segments.push(segment(queries, first));
        }
        Ok(PackedBatch {
            ids: ids.into(),
            position_ids: position_ids.into(),
            prefix_rows: 0,
            segments: segments.into(),
            target_segments: target_segments.into(),
            target_rows: target_rows.into(),
            labels: Indices::default(),
            examples: next.len(),
        })
    }

    /// Writes the keys and values [rows of the batch, 2K D] of the batch packed last.
    pub(super) fn write(&mut self, block: usize, kv: &Tensor) -> Result<()> {
        let kv = kv.contiguous()?;
        let mut row = 0;
        for range in &self.writes {
            self.layers[block].slice_set(&kv.narrow(0, row, range.len())?.contiguous()?, 0, range.start)?;
            row += range.len();
        }
        Ok(())
    }

    pub(super) fn layer(&self, block: usize) -> &Tensor {
        &self.layers[block]
    }

    pub(super) fn prefix(&self, block: usize) -> Option<&Tensor> {
        self.prefix.as_ref().filter(|p| p.rows > 0).map(|p| &p.layers[block])
    }
}

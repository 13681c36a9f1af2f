//! The next tokens of some sequences as a batch.

use super::{KvCache, Writes};
use crate::batch::PackedBatch;
use crate::ops::ssd::{ScanPlan, ScanSegment, ScanStart};
use crate::ops::{Indices, Segment};
use crate::{Error, Result};
use std::ops::Range;

/// The next tokens of one sequence, or a prefix's own.
#[derive(Debug, Clone)]
pub struct Continuation<'a> {
    /// Token ids, at least one; those above the vocabulary are rows of the matrix of prompts.
    pub tokens: &'a [u32],
    /// Rows of the prefix that all of them see.
    pub prefix: Range<usize>,
    /// The first row of the rotary table for its positions: 0, or [`crate::ops::rope::Rope::long_above`] in a sequence that is
    /// longer than that, whose prefix was computed so too.
    pub first_position: usize,
    /// Rows that the sequence has.
    pub own: Range<usize>,
    /// How many of them are written.
    pub filled: usize,
    /// Trailing tokens whose hidden states are wanted.
    pub targets: usize,
}

impl KvCache {
    /// Packs the next tokens of some sequences as a batch, which has to be the next one that [`crate::model::Decoder::infer`] runs.
    ///
    /// # Errors
    /// More tokens than a sequence has room for, or none; more targets than tokens.
    pub fn pack(&mut self, next: &[Continuation]) -> Result<PackedBatch> {
        let (mut ids, mut position_ids, mut target_rows) = (Vec::new(), Vec::new(), Vec::new());
        let (mut segments, mut target_segments) = (Vec::new(), Vec::new());
        let mut target_positions = Vec::new();
        let (mut ranges, mut from, mut to, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for Continuation { tokens, prefix, first_position, own, filled, targets } in next {
            let (first, end) = (*filled, filled + tokens.len());
            if end > own.len() || tokens.is_empty() || *targets > tokens.len() {
                return Err(Error::Shape {
                    op: "kv_cache",
                    expected: format!("1 to {} more tokens, and no more targets", own.len() - first),
                    found: format!("{} tokens and {targets} targets", tokens.len()),
                });
            }
            let queries = ids.len()..ids.len() + tokens.len();
            let written = own.start + first..own.start + end;
            rows.extend(written.start as u32..written.end as u32);
            match tokens {
                [_] => {
                    from.push(queries.start as u32);
                    to.push(written.start as u32);
                }
                _ => ranges.push((queries.start, written.clone())),
            }
            ids.extend_from_slice(tokens);
            let position = first_position + prefix.len();
            position_ids.extend((position + first) as u32..(position + end) as u32);
            let wanted = target_rows.len()..target_rows.len() + targets;
            target_rows.extend((queries.end - targets) as u32..queries.end as u32);
            target_positions.extend((position + end - targets) as u32..(position + end) as u32);
            let segment = |queries, first| Segment {
                queries,
                keys: own.start..written.end,
                first,
                prefix: Some(prefix.clone()).filter(|p| !p.is_empty()),
            };
            target_segments.push(segment(wanted, end - targets));
            segments.push(segment(queries, first));
        }
        let (scan, slots) = self.scan(next);
        let (from, rows) = (from.into(), rows.into());
        self.writes = Writes { ranges, from, to, rows, slots, ..Writes::default() };
        Ok(PackedBatch {
            ids: ids.into(),
            position_ids: position_ids.into(),
            prefix_rows: 0,
            segments: segments.into(),
            target_segments: target_segments.into(),
            scan,
            target_rows: target_rows.into(),
            target_positions: target_positions.into(),
            labels: Indices::default(),
            target_groups: Vec::new(),
            examples: next.len(),
            shares_prefixes: false,
        })
    }

    /// As [`KvCache::pack`], as a batch of `sequences` sequences: those that `next` has fewer have token 0 alone, in a row of the
    /// cache that nobody else reads. The tiles of its attention are as many as its rows.
    ///
    /// # Errors
    /// As [`KvCache::pack`]; also if the cache has too few rows for padding.
    pub(in crate::model) fn pack_padded(
        &mut self,
        next: &[Continuation],
        sequences: usize,
    ) -> Result<PackedBatch> {
        let padding = sequences.saturating_sub(next.len());
        if padding > self.padding_rows || self.slots.is_some() {
            return Err(Error::shape(
                "kv_cache",
                format!("at most {} sequences as padding, and no Mamba2 layers", self.padding_rows),
                format!("{padding}, and Mamba2 layers: {}", self.slots.is_some()),
            ));
        }
        let sequence = |row: usize| Continuation {
            tokens: &[0],
            prefix: 0..0,
            first_position: 0,
            own: row..row + 1,
            filled: 0,
            targets: 1,
        };
        let padding = (self.capacity..self.capacity + padding).map(sequence);
        let all: Vec<Continuation> = next.iter().cloned().chain(padding).collect();
        let mut batch = self.pack(&all)?;
        batch.segments = batch.segments.with_a_tile_per_query();
        batch.target_segments = batch.target_segments.with_a_tile_per_query();
        Ok(batch)
    }

    /// The scan over the next tokens of some sequences, and the slot of each: a sequence starts from its prefix's state, and goes
    /// on from its own.
    fn scan(&self, next: &[Continuation]) -> (ScanPlan, Vec<usize>) {
        let Some(slots) = &self.slots else { return (ScanPlan::default(), Vec::new()) };
        let mut row = 0;
        let segments = next.iter().enumerate().map(|(i, next)| {
            let rows = row..row + next.tokens.len();
            row = rows.end;
            let source = if next.filled > 0 { &next.own } else { &next.prefix };
            let start = match source.is_empty() {
                true => ScanStart::Zero,
                false => ScanStart::State(slots.of_rows(source)),
            };
            ScanSegment { rows, start, end: Some(i) }
        });
        let plan = segments.collect::<Vec<_>>().into();
        (plan, next.iter().map(|next| slots.of_rows(&next.own)).collect())
    }
}

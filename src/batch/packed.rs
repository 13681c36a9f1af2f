//! One packed batch.

use crate::ops::ssd::ScanPlan;
use crate::ops::{Indices, Segment, Segments};
use std::ops::Range;

/// Rows that go through the model together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedBatch {
    /// A token of the vocabulary, or a virtual token ([`crate::ops::embed::virtual_id`]); `[T]`.
    pub ids: Indices,
    /// Row of the rotary table for each row: its position from the beginning of its prefix, and in a sequence of more
    /// than [`crate::ops::rope::Rope::long_above`] positions that many more; `[T]`.
    pub position_ids: Indices,
    /// Leading rows of the batch that are prefixes.
    pub prefix_rows: usize,
    /// Who sees whom, all rows being queries.
    pub segments: Segments,
    /// The same with the target rows as the only queries.
    pub target_segments: Segments,
    /// The same rows for the scan of Mamba2 layers, and where each segment's state comes from.
    pub scan: ScanPlan,
    /// Rows that predict, in order.
    pub target_rows: Indices,
    /// `position_ids` of `target_rows`.
    pub target_positions: Indices,
    /// The token that each of them predicts; empty if there is nothing to compare with.
    pub labels: Indices,
    /// The groups of the target rows: index of a group, and how many target rows of it follow.
    pub target_groups: Vec<(usize, usize)>,
    /// Examples in the batch.
    pub examples: usize,
    /// Whether other passes read what layers hand on of its prefixes.
    pub shares_prefixes: bool,
}

impl PackedBatch {
    pub(super) fn push(
        &mut self,
        ids: impl Iterator<Item = u32>,
        position: usize,
        prefix: Option<Range<usize>>,
        targets: usize,
    ) {
        let start = self.ids.len();
        self.ids.extend(ids);
        let rows = start..self.ids.len();
        self.position_ids.extend((position as u32..).take(rows.len()));
        let first = rows.len() - targets;
        let queries = self.target_rows.len()..self.target_rows.len() + targets;
        self.target_rows.extend((rows.start + first) as u32..rows.end as u32);
        self.target_positions.extend(((position + first) as u32..).take(targets));
        self.target_segments.push(Segment { queries, keys: rows.clone(), first, prefix: prefix.clone() });
        self.segments.push(Segment { queries: rows.clone(), keys: rows, first: 0, prefix });
    }
}

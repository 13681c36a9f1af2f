//! Where the rows before a segment's first row are.

use crate::ops::{ScanSegment, ScanStart};

/// A row that a convolution reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RowSource {
    /// Zeros.
    Zero,
    /// A row of the batch.
    Row(usize),
    /// A row of a given state's tail: the state and the row.
    Tail(usize, usize),
}

impl RowSource {
    /// The row at a position of a segment: 0 is its first row, and -1 the one before; at least -(W - 1) for `taps` taps, W.
    pub(super) fn new(segments: &[ScanSegment], segment: usize, position: isize, taps: usize) -> Self {
        let ScanSegment { rows, start, .. } = &segments[segment];
        if let Ok(position) = usize::try_from(position) {
            return Self::Row(rows.start + position);
        }
        match *start {
            ScanStart::Zero => Self::Zero,
            ScanStart::State(state) => Self::Tail(state, (taps - 1).wrapping_add_signed(position)),
            ScanStart::Segment(earlier) => {
                Self::new(segments, earlier, segments[earlier].rows.len() as isize + position, taps)
            }
        }
    }

    /// The last W - 1 rows of a segment.
    pub(super) fn tail(segments: &[ScanSegment], segment: usize, taps: usize) -> impl Iterator<Item = Self> {
        let first = segments[segment].rows.len() as isize - (taps as isize - 1);
        (0..taps as isize - 1).map(move |i| Self::new(segments, segment, first + i, taps))
    }
}

/// A row that is added to the gradient of a row or of a tail beside those of the row's own segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddedRow {
    /// The gradient of a later segment's row, times the weights of `d` rows before.
    Gradient { row: usize, d: usize },
    /// A row of the gradient of the ends.
    End(usize),
}

/// What each row or tail gets from other segments and, if they have a gradient, from ends: by rows, then tails, and for each in the
/// order of the segments.
pub(super) fn added_rows(
    segments: &[ScanSegment],
    taps: usize,
    has_dends: bool,
) -> Vec<(RowSource, AddedRow)> {
    let mut added = Vec::new();
    for (s, segment) in segments.iter().enumerate() {
        for (i, row) in segment.rows.clone().enumerate().take(taps - 1) {
            for d in i + 1..taps {
                let source = RowSource::new(segments, s, i as isize - d as isize, taps);
                added.push((source, AddedRow::Gradient { row, d }));
            }
        }
        if let (Some(end), true) = (segment.end, has_dends) {
            for (i, source) in RowSource::tail(segments, s, taps).enumerate() {
                added.push((source, AddedRow::End(end * (taps - 1) + i)));
            }
        }
    }
    added.retain(|(source, _)| *source != RowSource::Zero);
    // A stable sort: the order of the segments stays.
    added.sort_by_key(|(source, _)| *source);
    added
}

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

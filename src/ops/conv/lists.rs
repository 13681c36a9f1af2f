//! The rows that the GPU's kernels read, and the terms of each gradient, as lists of numbers.

use super::source::{AddedRow, RowSource, added_rows};
use crate::ops::{Indices, ScanSegment};
use std::sync::OnceLock;

/// As `NO_ROW`, `TAIL` and `END` in `kernels/conv.cu`.
const NO_ROW: u32 = u32::MAX;
const TAIL: u32 = 1 << 31;
const END: u32 = 1 << 31;

/// The lists of a plan's segments for one number of taps and of given states, made once for all layers.
#[derive(Debug)]
pub(in crate::ops) struct ConvLists {
    /// The W - 1 rows before each row, the nearest first, [T, W - 1].
    pub(super) sources: Indices,
    /// The last W - 1 rows of each wanted end, [n, W - 1].
    pub(super) ends: Indices,
    /// [`ConvTerms`] without and with gradients of the ends.
    terms: [OnceLock<ConvTerms>; 2],
}

/// The terms of the gradient of each row and then of each given tail's row.
#[derive(Debug)]
pub(super) struct ConvTerms {
    /// Where the terms of each begin, and the end of the last.
    pub(super) offsets: Indices,
    pub(super) terms: Indices,
}

fn code(source: RowSource, taps: usize) -> u32 {
    match source {
        RowSource::Zero => NO_ROW,
        RowSource::Row(row) => row as u32,
        RowSource::Tail(state, row) => TAIL | (state * (taps - 1) + row) as u32,
    }
}

impl ConvLists {
    pub(super) fn new(segments: &[ScanSegment], taps: usize) -> Self {
        let mut sources = Vec::new();
        let mut ends: Vec<(usize, RowSource)> = Vec::new();
        for (s, segment) in segments.iter().enumerate() {
            for i in 0..segment.rows.len() {
                let before = (1..taps).map(|d| RowSource::new(segments, s, i as isize - d as isize, taps));
                sources.extend(before.map(|source| code(source, taps)));
            }
            if let Some(end) = segment.end {
                ends.extend(RowSource::tail(segments, s, taps).map(|source| (end, source)));
            }
        }
        ends.sort_by_key(|(end, _)| *end);
        let ends: Vec<u32> = ends.into_iter().map(|(_, source)| code(source, taps)).collect();
        Self { sources: sources.into(), ends: ends.into(), terms: Default::default() }
    }

    /// The terms of the gradients of all rows and of `states` tails.
    pub(super) fn terms(
        &self,
        segments: &[ScanSegment],
        (taps, states): (usize, usize),
        has_dends: bool,
    ) -> &ConvTerms {
        self.terms[usize::from(has_dends)].get_or_init(|| ConvTerms::new(segments, (taps, states), has_dends))
    }
}

impl ConvTerms {
    fn new(segments: &[ScanSegment], (taps, states): (usize, usize), has_dends: bool) -> Self {
        let (mut offsets, mut terms) = (vec![0], Vec::new());
        let added = added_rows(segments, taps, has_dends);
        let mut added = added.into_iter().peekable();
        let gradient = |row: usize, d: usize| (row * taps + d) as u32;
        let rows = segments.iter().flat_map(|s| s.rows.clone().map(|row| (RowSource::Row(row), s.rows.end)));
        let tails = (0..states).flat_map(|state| (0..taps - 1).map(move |row| RowSource::Tail(state, row)));
        for (source, end) in rows.chain(tails.map(|tail| (tail, 0))) {
            if let RowSource::Row(row) = source {
                terms.extend((0..taps.min(end - row)).map(|d| gradient(row + d, d)));
            }
            while let Some((_, row)) = added.next_if(|(to, _)| *to == source) {
                terms.push(match row {
                    AddedRow::Gradient { row, d } => gradient(row, d),
                    AddedRow::End(row) => END | row as u32,
                });
            }
            offsets.push(terms.len() as u32);
        }
        Self { offsets: offsets.into(), terms: terms.into() }
    }
}

//! Slots for the states of Mamba2 layers: one for each allocated range of rows.

use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;

/// Most slots: a step of so many sequences fills a CPU and reads more of states than of most models' weights.
const MOST: usize = 256;

/// Fewest slots: of a prefix, and of a sequence that follows it.
const FEWEST: usize = 2;

/// Which range of rows has which slot.
pub(super) struct Slots {
    count: usize,
    /// By the first row of the range.
    taken: HashMap<usize, usize>,
    /// The lowest is last.
    free: Vec<usize>,
}

/// Slots for a cache of `rows` rows: as many as a quarter of the free memory holds, and no more than can be used.
///
/// # Errors
/// Returns an error if there is no memory for a prefix and a sequence.
pub(super) fn count(rows: usize, bytes: usize, free: Option<usize>) -> Result<usize> {
    let fit = free.map_or(MOST, |free| free / 4 / bytes.max(1));
    if fit < FEWEST {
        return Err(Error::Invalid(format!(
            "cache: expected memory for the states of {FEWEST} sequences, {bytes} bytes each, in a quarter of what is free, \
             found {} bytes free",
            free.unwrap_or(0)
        )));
    }
    Ok(fit.min(MOST).min(rows).max(FEWEST))
}

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        Self { count, taken: HashMap::new(), free: (0..count).rev().collect() }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a slot for the range that begins at `row`.
    pub(super) fn take(&mut self, row: usize) {
        let slot = self.free.pop().expect("allocate asks first whether a slot is free");
        let before = self.taken.insert(row, slot);
        debug_assert!(before.is_none(), "row {row} is in two ranges");
    }

    /// Frees the slot of the range that begins at `row`.
    pub(super) fn give_back(&mut self, row: usize) {
        self.free.extend(self.taken.remove(&row));
    }

    /// The slot of an allocated range.
    ///
    /// # Panics
    /// Panics if the range is not allocated.
    pub(super) fn of_rows(&self, rows: &Range<usize>) -> usize {
        self.taken[&rows.start]
    }
}

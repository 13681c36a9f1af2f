//! The number of rows of a step on a device that may run out of memory.

/// Number of successful steps before more rows are tried again: the memory may be free by then. If it is not, one step
/// in this number is run twice.
const PATIENCE: usize = 1000;

/// Rows of a step: half of those that did not fit, and twice as many again after [`PATIENCE`] successful steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowLimit {
    limit: usize,
    current: usize,
    succeeded: usize,
}

impl RowLimit {
    /// At most `limit` rows; 0 counts as 1.
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.max(1);
        Self { limit, current: limit, succeeded: 0 }
    }

    /// Rows that the next step may have.
    pub(super) fn current(&self) -> usize {
        self.current
    }

    /// Halves the rows after a step of `rows` did not fit. Returns false if it was a single row.
    pub(super) fn halve(&mut self, rows: usize) -> bool {
        let current = self.current.min(rows) / 2;
        if current == 0 {
            return false;
        }
        (self.current, self.succeeded) = (current, 0);
        true
    }

    /// Counts a successful step.
    pub(super) fn succeeded(&mut self) {
        if self.current == self.limit {
            return;
        }
        self.succeeded += 1;
        if self.succeeded == PATIENCE {
            (self.current, self.succeeded) = ((2 * self.current).min(self.limit), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_rows_are_halved_and_doubled() {
        let mut rows = RowLimit::new(100);
        assert!(rows.halve(30) && rows.current() == 15);
        (1..PATIENCE).for_each(|_| rows.succeeded());
        assert_eq!(rows.current(), 15);
        rows.succeeded();
        assert_eq!(rows.current(), 30);
        (0..2 * PATIENCE).for_each(|_| rows.succeeded());
        assert_eq!(rows.current(), 100);
        (0..6).for_each(|_| assert!(rows.halve(1000)));
        assert!(rows.current() == 1 && !rows.halve(1) && rows.current() == 1);
        assert_eq!(RowLimit::new(0).current(), 1);
    }
}

//! How many rows a step may have on a device that may run out of memory.

/// Steps that have to go well before more rows are tried again: what took the memory may be gone by then, and where it is
/// not, one step in so many is run twice.
const PATIENCE: usize = 1000;

/// Rows of a step: half of those that did not fit, and twice as many again after [`PATIENCE`] steps that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StepRows {
    most: usize,
    now: usize,
    went_well: usize,
}

impl StepRows {
    /// At most `most`, which is 1 at the least.
    pub(super) fn new(most: usize) -> Self {
        let most = most.max(1);
        Self { most, now: most, went_well: 0 }
    }

    /// Rows that the next step may have.
    pub(super) fn now(&self) -> usize {
        self.now
    }

    /// Lowers the rows after a step of `rows` did not fit; false where it was a single row.
    pub(super) fn less(&mut self, rows: usize) -> bool {
        let now = self.now.min(rows) / 2;
        if now == 0 {
            return false;
        }
        (self.now, self.went_well) = (now, 0);
        true
    }

    /// Counts a step that fitted.
    pub(super) fn went_well(&mut self) {
        if self.now == self.most {
            return;
        }
        self.went_well += 1;
        if self.went_well == PATIENCE {
            (self.now, self.went_well) = ((2 * self.now).min(self.most), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_halved_and_doubled_again() {
        let mut rows = StepRows::new(100);
        assert!(rows.less(30) && rows.now() == 15);
        (1..PATIENCE).for_each(|_| rows.went_well());
        assert_eq!(rows.now(), 15);
        rows.went_well();
        assert_eq!(rows.now(), 30);
        (0..2 * PATIENCE).for_each(|_| rows.went_well());
        assert_eq!(rows.now(), 100);
        (0..6).for_each(|_| assert!(rows.less(1000)));
        assert!(rows.now() == 1 && !rows.less(1) && rows.now() == 1);
        assert_eq!(StepRows::new(0).now(), 1);
    }
}

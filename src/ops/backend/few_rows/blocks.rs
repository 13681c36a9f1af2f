//! How a product is cut: tasks of columns, blocks of the weight, panels of a block.

use super::{COLUMNS, FewRows, PANELS, WeightRows};
use std::ops::Range;

/// Terms of a sum in a panel: 128 times 64 values are 32 kB.
pub(super) const DEPTH: usize = 128;

/// A part of the weight: columns of the output, and terms of their sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WeightBlock {
    pub(super) columns: Range<usize>,
    pub(super) depth: Range<usize>,
}

impl WeightBlock {
    /// The first block of some columns.
    pub(super) fn first(product: FewRows, columns: Range<usize>) -> Self {
        Self { columns, depth: 0..0 }.deeper(product)
    }

    /// The block that is multiplied after this one: the next terms of the same columns, or the first ones of as many columns
    /// behind them, which a task of the same thread often has. Without columns after the last one.
    pub(super) fn next(&self, product: FewRows) -> Self {
        let (_, columns, depth) = product.size;
        if self.depth.end < depth {
            return self.deeper(product);
        }
        Self::first(product, self.columns.end..(self.columns.end + self.columns.len()).min(columns))
    }

    fn deeper(&self, product: FewRows) -> Self {
        let terms = match product.weight_rows {
            WeightRows::Columns => PANELS * DEPTH,
            WeightRows::Terms => DEPTH,
        };
        let start = self.depth.end;
        Self { columns: self.columns.clone(), depth: start..(start + terms).min(product.size.2) }
    }

    /// The block in panels of at most [`COLUMNS`] and [`DEPTH`].
    pub(super) fn panels(&self) -> impl Iterator<Item = Self> + Clone {
        let Self { columns, depth } = self.clone();
        columns.clone().step_by(COLUMNS).flat_map(move |column| {
            let (columns, end) = (column..(column + COLUMNS).min(columns.end), depth.end);
            depth
                .clone()
                .step_by(DEPTH)
                .map(move |start| Self { columns: columns.clone(), depth: start..(start + DEPTH).min(end) })
        })
    }

    /// Rows of the weight, and values of each.
    pub(super) fn in_memory(&self, weight_rows: WeightRows) -> (Range<usize>, Range<usize>) {
        match weight_rows {
            WeightRows::Columns => (self.columns.clone(), self.depth.clone()),
            WeightRows::Terms => (self.depth.clone(), self.columns.clone()),
        }
    }
}

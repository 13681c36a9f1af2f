//! How a product is cut: blocks of the weight, and panels of a block.

use super::{COLUMNS, DEPTH, FewRows, WeightRows};
use std::ops::Range;

/// A part of the weight: columns of the output, and terms of their sums.
#[derive(Debug, Clone)]
pub(super) struct WeightBlock {
    pub(super) columns: Range<usize>,
    pub(super) depth: Range<usize>,
}

impl WeightBlock {
    /// The first block of some columns.
    pub(super) fn first(product: FewRows, columns: Range<usize>) -> Self {
        Self { columns, depth: 0..0 }.deeper(product)
    }

    /// The block that is multiplied after this one: the next terms of the same columns, or else the first terms of as many
    /// columns after them, which the same thread often computes next. It is empty after the last columns.
    pub(super) fn next(&self, product: FewRows) -> Self {
        let (_, columns, depth) = product.size;
        if self.depth.end < depth {
            return self.deeper(product);
        }
        Self::first(product, self.columns.end..(self.columns.end + self.columns.len()).min(columns))
    }

    fn deeper(&self, product: FewRows) -> Self {
        let (start, terms) = (self.depth.end, product.weight_rows.block().1);
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

    /// Where it lies in memory.
    pub(super) fn source(&self, product: FewRows) -> WeightPart {
        let (_, columns, depth) = product.size;
        let (rows, values, stride) = match product.weight_rows {
            WeightRows::Columns => (&self.columns, &self.depth, depth),
            WeightRows::Terms => (&self.depth, &self.columns, columns),
        };
        let first = product.weight.as_ptr().wrapping_add(rows.start * stride + values.start);
        WeightPart { first, stride, rows: rows.len(), values: values.len() }
    }
}

/// Rows of the weight, or a part of each.
#[derive(Clone, Copy)]
pub(super) struct WeightPart {
    pub(super) first: *const f32,
    /// Elements from a row to the next one.
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// Of each row.
    pub(super) values: usize,
}

//! The plans that a pass will ask for, made before it runs, so that they are uploaded with the batch's other indices.

use super::plan::{UploadedKeyPlan, Wanted};
use super::{AttentionShape, Segments, gpu, route};
use crate::ops::Indices;
use crate::ops::gpu::Route;
use candle_core::Tensor;
use std::sync::Arc;

/// A pass of a model with `blocks` blocks, the last of which has target rows as its only queries.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) segments: &'a Segments,
    pub(crate) target_segments: &'a Segments,
    /// Rows of the batch, T.
    pub(crate) rows: usize,
    /// Target rows.
    pub(crate) targets: usize,
    /// Rows of the prefixes' pass, where that is another.
    pub(crate) prefix: Option<usize>,
    pub(crate) blocks: usize,
    /// Whether the backward pass runs too.
    pub(crate) backward: bool,
}

/// Plans of a pass; none where the CPU computes.
#[derive(Default)]
pub(crate) struct Plans {
    queries: Vec<Arc<Indices>>,
    keys: Vec<Arc<UploadedKeyPlan>>,
}

impl Plans {
    /// Their arrays.
    pub(crate) fn indices(&self) -> impl Iterator<Item = &Indices> {
        let keys = self.keys.iter().flat_map(|plan| [&plan.items, &plan.reductions]);
        self.queries.iter().map(|plan| &**plan).chain(keys)
    }
}

impl AttentionShape {
    /// The plans of a pass whose activations are on the device and in the dtype of `like`. The segments keep them; one that
    /// a call finds missing is made then.
    pub(crate) fn plans(&self, pass: &Pass, like: &Tensor) -> Plans {
        let mut plans = Plans::default();
        if route(like) != Route::Kernel || self.head_dim > gpu::MAX_HEAD_DIM {
            return plans;
        }
        let tiling = gpu::tiling(self, like);
        let last = pass.blocks.saturating_sub(1);
        // Of the blocks between the first and the last, all have the same.
        let mut blocks = vec![0, last.min(1), last];
        blocks.dedup();
        for block in blocks {
            let (segments, queries) = match block == last {
                true => (pass.target_segments, pass.targets),
                false => (pass.segments, pass.rows),
            };
            plans.queries.push(segments.query_plan(&tiling, queries));
            if !pass.backward {
                continue;
            }
            let all = (queries, pass.rows);
            let (queries, keys) = match pass.prefix {
                _ if block > 0 => all,
                Some(_) => (0, 0),
                None => super::prefix_rows(segments),
            };
            if block > 0 || pass.prefix.is_none() {
                plans.queries.push(segments.query_plan(&tiling, queries));
            }
            plans.keys.push(segments.key_plan(&tiling, &Wanted { queries, keys, prefix: pass.prefix }));
        }
        plans
    }
}

impl<'a> Pass<'a> {
    /// The row numbers that every plan's kernels read.
    pub(crate) fn visible(&self) -> [&'a Indices; 2] {
        [self.segments.visible(), self.target_segments.visible()]
    }
}

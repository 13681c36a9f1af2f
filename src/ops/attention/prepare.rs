//! The plans of a pass, made before it runs, so that they are uploaded with the batch's other indices.

use super::gpu::plan::{GradRows, UploadedKeyPlan};
use super::{AttentionShape, Segments, gpu};
use crate::ops::Indices;
use crate::ops::backend::{Route, route};
use candle_core::Tensor;
use std::sync::Arc;

/// A pass of a model with `layers` layers; the queries of the last layer are the target rows.
#[derive(Clone, Copy)]
pub(crate) struct PlannedPass<'a> {
    pub(crate) segments: &'a Segments,
    pub(crate) target_segments: &'a Segments,
    /// Rows of the batch, T.
    pub(crate) rows: usize,
    /// Target rows.
    pub(crate) targets: usize,
    /// Rows of the prefixes, if another pass computes them.
    pub(crate) prefix: Option<usize>,
    pub(crate) layers: usize,
    /// Whether the backward pass runs too.
    pub(crate) backward: bool,
}

/// Plans of a pass; none on the CPU.
#[derive(Default)]
pub(crate) struct PassPlans {
    queries: Vec<Arc<Indices>>,
    keys: Vec<Arc<UploadedKeyPlan>>,
}

impl PassPlans {
    /// The arrays of all plans.
    pub(crate) fn indices(&self) -> impl Iterator<Item = &Indices> {
        let keys = self.keys.iter().flat_map(|plan| [&plan.items, &plan.reductions]);
        self.queries.iter().map(|plan| &**plan).chain(keys)
    }
}

impl AttentionShape {
    /// The plans of a pass whose activations have the device and the dtype of `like`. The segments keep them; a call that needs
    /// another plan makes it.
    pub(crate) fn plans(&self, pass: &PlannedPass, like: &Tensor) -> PassPlans {
        let mut plans = PassPlans::default();
        if route(like) == Route::Cpu || self.head_dim > gpu::MAX_HEAD_DIM {
            return plans;
        }
        let tiling = gpu::tiling(self, like);
        let last = pass.layers.saturating_sub(1);
        // All layers between the first and the last have the same plans.
        let mut layers = vec![0, last.min(1), last];
        layers.dedup();
        for layer in layers {
            let (segments, queries) = match layer == last {
                true => (pass.target_segments, pass.targets),
                false => (pass.segments, pass.rows),
            };
            plans.queries.push(segments.query_plan(&tiling, queries));
            if !pass.backward {
                continue;
            }
            let all = (queries, pass.rows);
            let (queries, keys) = match pass.prefix {
                _ if layer > 0 => all,
                Some(_) => (0, 0),
                None => super::prefix_rows(segments),
            };
            if layer > 0 || pass.prefix.is_none() {
                plans.queries.push(segments.query_plan(&tiling, queries));
            }
            plans.keys.push(segments.key_plan(&tiling, &GradRows { queries, keys, prefix: pass.prefix }));
        }
        plans
    }
}

impl<'a> PlannedPass<'a> {
    /// The row numbers that every plan's kernels read.
    pub(crate) fn visible(&self) -> [&'a Indices; 2] {
        [self.segments.visible(), self.target_segments.visible()]
    }
}

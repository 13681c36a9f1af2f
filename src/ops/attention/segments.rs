//! The segments of a batch, with the plans of the GPU's kernels, which are made once for all layers of the model.

use super::Segment;
use super::gpu::plan::{self, GradRows, KeyPlan, Tiling, UploadedKeyPlan};
use crate::ops::Indices;
use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Which queries of a batch attend to which keys, in the order of the queries.
#[derive(Clone, Default)]
pub struct Segments {
    list: Vec<Segment>,
    plans: Arc<SegmentPlans>,
    /// Whether a plan has as many tiles as queries.
    has_fixed_tiles: bool,
}

#[derive(Default)]
struct SegmentPlans {
    visible: OnceLock<Indices>,
    queries: Mutex<HashMap<(Tiling, usize), Arc<Indices>>>,
    keys: Mutex<HashMap<(Tiling, GradRows), Arc<UploadedKeyPlan>>>,
}

impl Segments {
    /// Appends a segment.
    pub fn push(&mut self, segment: Segment) {
        self.list.push(segment);
        self.plans = Arc::default();
    }

    /// The same segments with as many tiles in each plan of queries as it has queries, so that its size depends on nothing else.
    /// The last tiles have no queries.
    pub(crate) fn with_a_tile_per_query(self) -> Self {
        Self { list: self.list, plans: Arc::default(), has_fixed_tiles: true }
    }

    /// [`plan::visible`], flat.
    pub(super) fn visible(&self) -> &Indices {
        self.plans.visible.get_or_init(|| flat(plan::visible(&self.list)))
    }

    /// [`plan::tiles`] of the first `queries` queries, flat: 6 numbers each.
    pub(super) fn query_plan(&self, tiling: &Tiling, queries: usize) -> Arc<Indices> {
        let mut plans = self.plans.queries.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let mut tiles = plan::tiles(&self.list, tiling, queries);
            if self.has_fixed_tiles {
                tiles.resize(queries, plan::EMPTY_TILE);
            }
            Arc::new(flat(tiles))
        };
        plans.entry((*tiling, queries)).or_insert_with(make).clone()
    }

    /// The [`KeyPlan`] of some rows.
    pub(super) fn key_plan(&self, tiling: &Tiling, rows: &GradRows) -> Arc<UploadedKeyPlan> {
        let mut plans = self.plans.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let KeyPlan { items, reductions, slots } = KeyPlan::new(&self.list, tiling, rows);
            Arc::new(UploadedKeyPlan { items: flat(items), reductions: flat(reductions), slots })
        };
        plans.entry((*tiling, *rows)).or_insert_with(make).clone()
    }
}

fn flat<const N: usize>(rows: Vec<[u32; N]>) -> Indices {
    rows.into_flattened().into()
}

impl From<Vec<Segment>> for Segments {
    fn from(list: Vec<Segment>) -> Self {
        Self { list, plans: Arc::default(), has_fixed_tiles: false }
    }
}

impl FromIterator<Segment> for Segments {
    fn from_iter<I: IntoIterator<Item = Segment>>(segments: I) -> Self {
        segments.into_iter().collect::<Vec<_>>().into()
    }
}

impl Deref for Segments {
    type Target = [Segment];
    fn deref(&self) -> &[Segment] {
        &self.list
    }
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.list.fmt(f)
    }
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.list == other.list
    }
}

impl Eq for Segments {}

impl<'a> IntoIterator for &'a Segments {
    type Item = &'a Segment;
    type IntoIter = std::slice::Iter<'a, Segment>;
    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

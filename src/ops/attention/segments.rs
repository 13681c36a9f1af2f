//! The segments of a batch, with what the kernels need of them, made once for all blocks of the model.

use super::Segment;
use super::plan::{self, KeyPlan, Tiling, UploadedKeyPlan, Wanted};
use crate::ops::Indices;
use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Who sees whom in a batch, in the order of its queries.
#[derive(Clone, Default)]
pub struct Segments {
    list: Vec<Segment>,
    plans: Arc<Plans>,
}

#[derive(Default)]
struct Plans {
    visible: OnceLock<Indices>,
    queries: Mutex<HashMap<(Tiling, usize), Arc<Indices>>>,
    keys: Mutex<HashMap<(Tiling, Wanted), Arc<UploadedKeyPlan>>>,
}

impl Segments {
    /// Appends a segment.
    pub fn push(&mut self, segment: Segment) {
        self.list.push(segment);
        self.plans = Arc::default();
    }

    /// [`plan::visible`], flat.
    pub(super) fn visible(&self) -> &Indices {
        self.plans.visible.get_or_init(|| flat(plan::visible(&self.list)))
    }

    /// [`plan::tiles`] of the first `queries` queries, flat: 6 numbers each.
    pub(super) fn query_plan(&self, tiling: &Tiling, queries: usize) -> Arc<Indices> {
        let mut plans = self.plans.queries.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || Arc::new(flat(plan::tiles(&self.list, tiling, queries)));
        plans.entry((*tiling, queries)).or_insert_with(made).clone()
    }

    /// The [`KeyPlan`] of some rows.
    pub(super) fn key_plan(&self, tiling: &Tiling, wanted: &Wanted) -> Arc<UploadedKeyPlan> {
        let mut plans = self.plans.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || {
            let KeyPlan { items, reductions, slots } = KeyPlan::new(&self.list, tiling, wanted);
            Arc::new(UploadedKeyPlan { items: flat(items), reductions: flat(reductions), slots })
        };
        plans.entry((*tiling, *wanted)).or_insert_with(made).clone()
    }
}

fn flat<const N: usize>(rows: Vec<[u32; N]>) -> Indices {
    rows.into_flattened().into()
}

impl From<Vec<Segment>> for Segments {
    fn from(list: Vec<Segment>) -> Self {
        Self { list, plans: Arc::default() }
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

//! The segments of a plan as the GPU's kernels read them.

use crate::ops::{Indices, ScanSegment, ScanStart};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// As `NONE` and `OTHER` in `kernels/ssd.cu`.
const NONE: u32 = u32::MAX;
const OTHER: u32 = 1 << 31;

/// Rows of an item at most, if it has several segments: each item adds up the gradient of its start state in memory of its own.
const ITEM_ROWS: usize = 128;

/// The state after a segment, or before one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateOrigin {
    Zero,
    Given(usize),
    /// A segment that has rows, by its number among those.
    Segment(usize),
}

/// A segment that has rows.
#[derive(Debug)]
struct Rows {
    rows: Range<usize>,
    start: StateOrigin,
    level: usize,
    /// Place of its end state.
    slot: Option<usize>,
    /// Place of the gradient of its end state.
    gradient: Option<usize>,
}

/// Neighbouring segments that start from one state.
#[derive(Debug)]
struct ScanItem {
    segments: Range<usize>,
    start: StateOrigin,
    level: usize,
    /// Place of the gradient of the start state.
    gradient: Option<usize>,
}

/// The lists of a plan, made once for all layers.
#[derive(Debug)]
pub(in crate::ops) struct SsdLists {
    items: Vec<ScanItem>,
    /// Where each wanted end state comes from.
    ends: Vec<StateOrigin>,
    /// Items of each level.
    pub(super) levels: Vec<Range<usize>>,
    /// Gradients of end states of each level.
    pub(super) gradients: Vec<Range<usize>>,
    /// End states, the wanted ones first.
    pub(super) slots: usize,
    /// Gradients of items' start states.
    pub(super) starts: usize,
    /// Segments that have rows.
    pub(super) segments: usize,
    /// The ends that no segment writes, and their sources.
    pub(super) copies: Vec<(usize, StateOrigin)>,
    /// 4 numbers of each item.
    pub(super) item_list: Indices,
    /// 4 numbers of each segment.
    pub(super) segment_list: Indices,
    slot_of: Vec<Option<usize>>,
    gradient_of: Vec<Option<usize>>,
    /// Terms of the gradients of end states, without and with gradients of the ends.
    sums: [OnceLock<StateSums>; 2],
    /// Those of given states, by their number.
    given_sums: Mutex<HashMap<(usize, bool), Arc<StateSums>>>,
}

/// Sums of states' gradients.
#[derive(Debug)]
pub(super) struct StateSums {
    /// Where the terms of each begin, and the end of the last.
    pub(super) offsets: Indices,
    pub(super) terms: Indices,
}

impl SsdLists {
    pub(in crate::ops::ssd) fn new(list: &[ScanSegment]) -> Self {
        let (mut segments, ends) = segments(list);
        let mut slots = ends.len();
        let is_start = |j: usize, all: &[Rows]| all.iter().any(|s| s.start == StateOrigin::Segment(j));
        for j in 0..segments.len() {
            let end = ends.iter().position(|end| *end == StateOrigin::Segment(j));
            segments[j].slot = end.or_else(|| {
                is_start(j, &segments).then(|| {
                    slots += 1;
                    slots - 1
                })
            });
        }
        let levels = segments.iter().map(|s| s.level + 1).max().unwrap_or(0);
        let (mut gradients, mut next) = (Vec::new(), 0);
        for level in 0..levels {
            let first = next;
            for segment in segments.iter_mut().filter(|s| s.level == level && s.slot.is_some()) {
                segment.gradient = Some(next);
                next += 1;
            }
            gradients.push(first..next);
        }
        let (items, level_items, starts) = items(&segments, levels);
        let slot_of: Vec<_> = segments.iter().map(|s| s.slot).collect();
        let copies = ends.iter().copied().enumerate();
        let copies = copies.filter(|(end, source)| match source {
            StateOrigin::Segment(j) => slot_of[*j] != Some(*end),
            _ => true,
        });
        let number = |place: Option<usize>| place.map_or(NONE, |place| place as u32);
        let segment_list = segments
            .iter()
            .flat_map(|s| [s.rows.start as u32, s.rows.end as u32, number(s.slot), number(s.gradient)]);
        let item_list = items.iter().flat_map(|item| {
            let start = match item.start {
                StateOrigin::Zero => NONE,
                StateOrigin::Given(state) => OTHER | state as u32,
                StateOrigin::Segment(j) => number(slot_of[j]),
            };
            [item.segments.start as u32, item.segments.len() as u32, start, number(item.gradient)]
        });
        Self {
            copies: copies.collect(),
            item_list: item_list.collect::<Vec<_>>().into(),
            segment_list: segment_list.collect::<Vec<_>>().into(),
            gradient_of: segments.iter().map(|s| s.gradient).collect(),
            segments: segments.len(),
            levels: level_items,
            items,
            ends,
            gradients,
            slots,
            starts,
            slot_of,
            sums: Default::default(),
            given_sums: Default::default(),
        }
    }

    /// The place of a segment's end state.
    pub(super) fn slot(&self, segment: usize) -> Option<usize> {
        self.slot_of[segment]
    }

    /// Sums of the gradients of end states.
    pub(super) fn sums(&self, has_dends: bool) -> &StateSums {
        self.sums[usize::from(has_dends)].get_or_init(|| {
            let mut with_gradient: Vec<(usize, usize)> = self
                .gradient_of
                .iter()
                .enumerate()
                .filter_map(|(j, gradient)| gradient.map(|gradient| (gradient, j)))
                .collect();
            with_gradient.sort_unstable();
            self.sums_of(with_gradient.into_iter().map(|(_, j)| StateOrigin::Segment(j)), has_dends)
        })
    }

    /// Sums of the gradients of the `states` given states.
    pub(super) fn given_sums(&self, states: usize, has_dends: bool) -> Arc<StateSums> {
        let mut sums = self.given_sums.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(self.sums_of((0..states).map(StateOrigin::Given), has_dends));
        sums.entry((states, has_dends)).or_insert_with(make).clone()
    }

    fn sums_of(&self, sources: impl Iterator<Item = StateOrigin>, has_dends: bool) -> StateSums {
        let (mut offsets, mut terms) = (vec![0], Vec::new());
        for source in sources {
            let ends = self.ends.iter().enumerate().filter(|(_, end)| has_dends && **end == source);
            terms.extend(ends.map(|(end, _)| OTHER | end as u32));
            let items = self.items.iter().filter(|item| item.start == source);
            terms.extend(items.filter_map(|item| item.gradient).map(|gradient| gradient as u32));
            offsets.push(terms.len() as u32);
        }
        StateSums { offsets: offsets.into(), terms: terms.into() }
    }
}

/// The segments that have rows, and the source of each wanted end.
fn segments(list: &[ScanSegment]) -> (Vec<Rows>, Vec<StateOrigin>) {
    let mut segments: Vec<Rows> = Vec::new();
    let mut after = Vec::new();
    let mut ends = vec![StateOrigin::Zero; list.iter().filter(|s| s.end.is_some()).count()];
    for segment in list {
        let start = match segment.start {
            ScanStart::Zero => StateOrigin::Zero,
            ScanStart::State(state) => StateOrigin::Given(state),
            ScanStart::Segment(earlier) => after[earlier],
        };
        let end = if segment.rows.is_empty() { start } else { StateOrigin::Segment(segments.len()) };
        if !segment.rows.is_empty() {
            let level = if let StateOrigin::Segment(j) = start { segments[j].level + 1 } else { 0 };
            segments.push(Rows { rows: segment.rows.clone(), start, level, slot: None, gradient: None });
        }
        if let Some(i) = segment.end {
            ends[i] = end;
        }
        after.push(end);
    }
    (segments, ends)
}

/// The items by level, the range of each level, and the number of gradients of start states.
fn items(segments: &[Rows], levels: usize) -> (Vec<ScanItem>, Vec<Range<usize>>, usize) {
    let mut items: Vec<ScanItem> = Vec::new();
    let mut rows = 0;
    for (j, segment) in segments.iter().enumerate() {
        match items.last_mut() {
            Some(item)
                if (item.start, item.level) == (segment.start, segment.level)
                    && rows + segment.rows.len() <= ITEM_ROWS =>
            {
                item.segments.end = j + 1;
                rows += segment.rows.len();
            }
            _ => {
                let (start, level) = (segment.start, segment.level);
                items.push(ScanItem { segments: j..j + 1, start, level, gradient: None });
                rows = segment.rows.len();
            }
        }
    }
    items.sort_by_key(|item| item.level);
    let mut starts = 0;
    for item in items.iter_mut().filter(|item| item.start != StateOrigin::Zero) {
        item.gradient = Some(starts);
        starts += 1;
    }
    let first = |level| items.partition_point(|item| item.level < level);
    let ranges = (0..levels).map(|level| first(level)..first(level + 1)).collect();
    (items, ranges, starts)
}

//! How a batch is cut into blocks of the GPU's attention kernels: flat arrays that are uploaded once and
//! serve every layer.
//!
//! ```text
//!                 prefix rows      own rows
//!   queries of  ┌─────────────┬───────┐
//!   a prefix    │             │◣      │   forward and dq: a *tile* is at most `query_tile` neighbouring queries
//!   group       │      2      │ ◣   0 │   with the same prefix; its block walks the prefix, then own rows
//!               │             │   ◣   │
//!               └─────────────┴───────┘   dk and dv: an *item* is at most `key_tile` rows of keys and the queries
//!   the prefix                │◣    1 │   whose share of their gradient its block adds up
//!   itself                    └───────┘
//! ```
//!
//! Source 0, rows that their own segment's queries see and no other: written where they belong. Rows of a
//! prefix are seen by many queries: each item puts its sum into a *slot* of `key_tile` rows, source 1 those of
//! the prefix's own queries, source 2 those of `query_chunk` queries behind it at a time. A *reduction* adds the
//! slots of its rows up in order. So no two blocks write one element, and repeats are equal bit for bit.

use super::Segment;
use crate::ops::Indices;
use std::ops::Range;

/// Own keys that a tile may walk beyond the longest range that one of its queries sees. Few long sequences
/// are better in tiles of their own: more blocks, each with a shorter walk.
const WALK: usize = 256;

/// Above so many slots, queries come in larger chunks: with a few key heads 64 are more blocks than a GPU has
/// multiprocessors, and at 8 key heads of 128 they take 32 MB.
const SLOTS: usize = 64;

/// Sizes of the pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    /// Most queries of a tile.
    pub(super) query_tile: usize,
    /// Most key rows of an item, and rows of a slot.
    pub(super) key_tile: usize,
    /// Queries of an item of a prefix, or more where that makes too many slots; a multiple of `query_tile`.
    pub(super) query_chunk: usize,
}

/// Rows whose gradients are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    /// Leading rows of the query matrix.
    pub(super) queries: usize,
    /// Leading rows of the matrix of own keys.
    pub(super) keys: usize,
    /// Rows of the prefixes' matrix, where that is another pass's.
    pub(super) prefix: Option<usize>,
}

/// What the blocks of the dk and dv kernel do.
#[derive(Debug, Default)]
pub(super) struct KeyPlan {
    /// Key rows begin, end; queries begin, end; source; slot.
    pub(super) items: Vec<[u32; 6]>,
    /// Key rows begin, end; slots begin, end: none writes zeros.
    pub(super) reductions: Vec<[u32; 4]>,
    /// Slots that the items fill.
    pub(super) slots: usize,
}

/// A [`KeyPlan`] as the kernels read it.
pub(super) struct UploadedKeyPlan {
    /// Flat, 6 numbers an item.
    pub(super) items: Indices,
    /// Flat, 4 numbers a reduction.
    pub(super) reductions: Indices,
    /// Slots that the items fill.
    pub(super) slots: usize,
}

/// First own key row of each query, and one past the last that it sees.
pub(super) fn visible(segments: &[Segment]) -> Vec<[u32; 2]> {
    let rows = |s: &Segment| {
        let (start, seen) = (s.keys.start, s.keys.start + s.first);
        (1..=s.queries.len()).map(move |i| [start as u32, (seen + i) as u32])
    };
    segments.iter().flat_map(rows).collect()
}

struct Tile {
    queries: Range<usize>,
    prefix: Range<usize>,
    own: Range<usize>,
    /// Most own keys that a query of it sees.
    longest: usize,
}

/// Rows of the prefix; none and an empty one are the same.
fn prefix(segment: &Segment) -> Range<usize> {
    segment.prefix.clone().filter(|p| !p.is_empty()).unwrap_or(0..0)
}

impl Tile {
    /// Of the queries of one segment.
    fn new(segment: &Segment, queries: Range<usize>) -> Self {
        let own =
            segment.keys.start..segment.keys.start + segment.first + queries.end - segment.queries.start;
        Self { queries, prefix: prefix(segment), longest: own.len(), own }
    }

    /// Appends `next`, unless that makes too large a tile.
    fn join(&mut self, next: &Self, query_tile: usize) -> bool {
        let own = self.own.start.min(next.own.start)..self.own.end.max(next.own.end);
        let longest = self.longest.max(next.longest);
        let fits = self.prefix == next.prefix
            && self.queries.len() + next.queries.len() <= query_tile
            && own.len() <= longest + WALK;
        if fits {
            self.queries.end = next.queries.end;
            (self.own, self.longest) = (own, longest);
        }
        fits
    }
}

/// Tiles of the first `queries` queries, in their order: queries begin, end; prefix rows begin, end; own rows
/// begin, end.
pub(super) fn tiles(segments: &[Segment], tiling: &Tiling, queries: usize) -> Vec<[u32; 6]> {
    let mut tiles: Vec<Tile> = Vec::new();
    for segment in segments {
        let end = segment.queries.end.min(queries);
        let mut from = segment.queries.start;
        while from < end {
            let room = tiles.last().map_or(0, |t| tiling.query_tile - t.queries.len());
            let filling = Tile::new(segment, from..end.min(from + room));
            if room > 0 && tiles.last_mut().is_some_and(|t| t.join(&filling, tiling.query_tile)) {
                from = filling.queries.end;
                continue;
            }
            tiles.push(Tile::new(segment, from..end.min(from + tiling.query_tile)));
            from = end.min(from + tiling.query_tile);
        }
    }
    let flat = |t: Tile| [t.queries, t.prefix, t.own].map(|r| [r.start as u32, r.end as u32]);
    tiles.into_iter().map(flat).map(|[a, b, c]| [a[0], a[1], b[0], b[1], c[0], c[1]]).collect()
}

/// From the first to the last query that sees one of the own `keys`.
fn seen_by(segments: &[Segment], keys: &Range<usize>) -> Range<usize> {
    let mut all: Option<Range<usize>> = None;
    for segment in segments.iter().filter(|s| !s.queries.is_empty()) {
        let seen = segment.keys.start + segment.first + segment.queries.len();
        let from = keys.start.max(segment.keys.start);
        if from >= keys.end.min(seen) {
            continue;
        }
        let first = segment.queries.start + from.saturating_sub(segment.keys.start + segment.first);
        let range = all.get_or_insert(first..segment.queries.end);
        *range = range.start.min(first)..range.end.max(segment.queries.end);
    }
    all.unwrap_or(0..0)
}

/// Runs of neighbouring queries whose prefix holds all of `keys`.
fn behind(segments: &[Segment], keys: &Range<usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let holds = |p: &Range<usize>| p.start <= keys.start && keys.end <= p.end;
    for segment in segments.iter().filter(|s| !s.queries.is_empty() && s.prefix.as_ref().is_some_and(holds)) {
        match runs.last_mut() {
            Some(run) if run.end == segment.queries.start => run.end = segment.queries.end,
            _ => runs.push(segment.queries.clone()),
        }
    }
    runs
}

/// Pieces of at most `query_chunk` queries, about equally long.
fn chunks(queries: Range<usize>, tiling: &Tiling) -> impl Iterator<Item = Range<usize>> {
    let pieces = queries.len().div_ceil(tiling.query_chunk).max(1);
    let length = queries.len().div_ceil(pieces).next_multiple_of(tiling.query_tile);
    cut(queries, length.max(1))
}

/// `0..rows` cut wherever a prefix begins or ends; whether the part is in one.
fn parts(segments: &[Segment], rows: usize) -> Vec<(Range<usize>, bool)> {
    let mut prefixes: Vec<Range<usize>> = segments.iter().map(prefix).filter(|p| !p.is_empty()).collect();
    prefixes.dedup();
    let mut cuts: Vec<usize> = prefixes.iter().flat_map(|p| [p.start, p.end]).chain([0, rows]).collect();
    cuts.retain(|cut| *cut <= rows);
    cuts.sort_unstable();
    cuts.dedup();
    let shared = |part: &Range<usize>| prefixes.iter().any(|p| p.start <= part.start && part.end <= p.end);
    cuts.windows(2).map(|w| (w[0]..w[1], shared(&(w[0]..w[1])))).collect()
}

fn cut(rows: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(length).map(move |from| from..end.min(from + length))
}

impl KeyPlan {
    /// Covers every wanted row of keys, also those that no query sees.
    pub(super) fn new(segments: &[Segment], tiling: &Tiling, wanted: &Wanted) -> Self {
        let mut plan = Self::default();
        let elsewhere = wanted.prefix.is_some();
        let rows = parts(segments, wanted.prefix.unwrap_or(wanted.keys));
        let shared = rows.into_iter().filter(|(_, in_prefix)| elsewhere || *in_prefix);
        let tiles: Vec<_> = shared.flat_map(|(part, _)| cut(part, tiling.key_tile)).collect();
        let queries = segments.last().map_or(0, |s| s.queries.end);
        let enough = (queries * tiles.len()).div_ceil(SLOTS).next_multiple_of(tiling.query_tile);
        let chunked = Tiling { query_chunk: tiling.query_chunk.max(enough), ..*tiling };
        tiles.into_iter().for_each(|keys| plan.prefix(segments, &chunked, keys, !elsewhere));
        let all = || vec![(0..wanted.keys, false)];
        let own = if elsewhere { all() } else { parts(segments, wanted.keys) };
        for (part, _) in own.into_iter().filter(|(_, in_prefix)| !in_prefix) {
            for keys in cut(part, tiling.key_tile) {
                let queries = seen_by(segments, &keys);
                plan.push(&keys, queries, 0, 0);
            }
        }
        // Blocks start in this order: the longest first, so that none is left for the end.
        plan.items.sort_by_key(|[_, _, begin, end, ..]| std::cmp::Reverse(end - begin));
        plan
    }

    /// Items and the reduction of rows of a prefix, `own` where they are rows of this batch.
    fn prefix(&mut self, segments: &[Segment], tiling: &Tiling, keys: Range<usize>, own: bool) {
        let first = self.slots;
        let causal = if own { seen_by(segments, &keys) } else { 0..0 };
        for queries in chunks(causal, tiling) {
            self.push(&keys, queries, 1, self.slots);
            self.slots += 1;
        }
        for queries in behind(segments, &keys).into_iter().flat_map(|run| chunks(run, tiling)) {
            self.push(&keys, queries, 2, self.slots);
            self.slots += 1;
        }
        self.reductions.push([keys.start, keys.end, first, self.slots].map(|n| n as u32));
    }

    fn push(&mut self, keys: &Range<usize>, queries: Range<usize>, source: usize, slot: usize) {
        let item = [keys.start, keys.end, queries.start, queries.end, source, slot];
        self.items.push(item.map(|n| n as u32));
    }
}

#[cfg(test)]
mod tests;

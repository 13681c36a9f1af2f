//! How a batch is cut into blocks of the GPU's attention kernels: flat arrays that are uploaded once and serve every layer.
//!
//! ```text
//!                 prefix rows      own rows
//!   queries of  ┌─────────────┬───────┐
//!   a prefix    │             │◣      │   forward and dq: a *tile* is at most `query_tile` neighbouring queries
//!   group       │      2      │ ◣   0 │   with the same prefix; its block reads the prefix, then own rows
//!               │             │   ◣   │
//!               └─────────────┴───────┘   dk and dv: an *item* is at most `key_tile` rows of keys, and the queries
//!   the prefix                │◣    1 │   whose contributions to their gradient its block sums
//!   itself                    └───────┘
//! ```
//!
//! Source 0: rows to which only queries of their own segment attend; their gradients are written to the output. Many queries
//! attend to the rows of a prefix: each of their items writes its sum to a *slot* of `key_tile` rows. Source 1 are the items of
//! the prefix's own queries, source 2 those of the queries after it, `query_chunk` at a time. A *reduction* adds up the slots of
//! its rows in order. So no two blocks write one element, and repeats are equal bit for bit.

use crate::ops::{Indices, Segment};
use std::ops::Range;

/// Own keys that a tile may read beyond the longest range to which one of its queries attends. Few long sequences are better in
/// tiles of their own: more blocks, each of which reads fewer keys.
const MAX_EXTRA_KEYS: usize = 256;

/// Above so many slots, queries come in larger chunks: with a few key heads 64 are more blocks than a GPU has
/// multiprocessors, and at 8 key heads of 128 they take 32 MB.
const SLOTS: usize = 64;

/// Sizes of the pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::ops::attention) struct Tiling {
    /// Most queries of a tile.
    pub(in crate::ops::attention) query_tile: usize,
    /// Most key rows of an item, and rows of a slot.
    pub(in crate::ops::attention) key_tile: usize,
    /// Queries of an item of a prefix, or more if there were too many slots otherwise; a multiple of `query_tile`.
    pub(in crate::ops::attention) query_chunk: usize,
}

/// Rows whose gradients are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::ops::attention) struct GradRows {
    /// Leading rows of the query matrix.
    pub(in crate::ops::attention) queries: usize,
    /// Leading rows of the matrix of own keys.
    pub(in crate::ops::attention) keys: usize,
    /// Rows of the prefixes' matrix, if another pass computed it.
    pub(in crate::ops::attention) prefix: Option<usize>,
}

/// The work of the blocks of the dk and dv kernel.
#[derive(Debug, Default)]
pub(in crate::ops::attention) struct KeyPlan {
    /// Key rows begin, end; queries begin, end; source; slot.
    pub(in crate::ops::attention) items: Vec<[u32; 6]>,
    /// Key rows begin, end; slots begin, end. A reduction of no slots writes zeros.
    pub(in crate::ops::attention) reductions: Vec<[u32; 4]>,
    /// Slots that the items fill.
    pub(in crate::ops::attention) slots: usize,
}

/// A [`KeyPlan`] as the kernels read it.
pub(in crate::ops::attention) struct UploadedKeyPlan {
    /// Flat, 6 numbers an item.
    pub(in crate::ops::attention) items: Indices,
    /// Flat, 4 numbers a reduction.
    pub(in crate::ops::attention) reductions: Indices,
    /// Slots that the items fill.
    pub(in crate::ops::attention) slots: usize,
}

/// First own key row of each query, and the row after the last to which it attends.
pub(in crate::ops::attention) fn visible(segments: &[Segment]) -> Vec<[u32; 2]> {
    let rows = |s: &Segment| {
        let (start, seen) = (s.keys.start, s.keys.start + s.first);
        (1..=s.queries.len()).map(move |i| [start as u32, (seen + i) as u32])
    };
    segments.iter().flat_map(rows).collect()
}

/// Neighbouring queries with the same prefix.
struct QueryTile {
    queries: Range<usize>,
    prefix: Range<usize>,
    own: Range<usize>,
    /// The most own keys to which one of its queries attends.
    longest: usize,
}

/// Rows of the prefix; an empty range if there is none.
fn prefix(segment: &Segment) -> Range<usize> {
    segment.prefix.clone().filter(|p| !p.is_empty()).unwrap_or(0..0)
}

impl QueryTile {
    /// A tile of queries of one segment.
    fn new(segment: &Segment, queries: Range<usize>) -> Self {
        let own =
            segment.keys.start..segment.keys.start + segment.first + queries.end - segment.queries.start;
        Self { queries, prefix: prefix(segment), longest: own.len(), own }
    }

    /// Appends `next` if the tile does not become too large; returns whether it did.
    fn join(&mut self, next: &Self, query_tile: usize) -> bool {
        let own = self.own.start.min(next.own.start)..self.own.end.max(next.own.end);
        let longest = self.longest.max(next.longest);
        let fits = self.prefix == next.prefix
            && self.queries.len() + next.queries.len() <= query_tile
            && own.len() <= longest + MAX_EXTRA_KEYS;
        if fits {
            self.queries.end = next.queries.end;
            (self.own, self.longest) = (own, longest);
        }
        fits
    }
}

/// Tiles of the first `queries` queries, in their order: queries begin, end; prefix rows begin, end; own rows
/// begin, end.
pub(in crate::ops::attention) fn tiles(
    segments: &[Segment],
    tiling: &Tiling,
    queries: usize,
) -> Vec<[u32; 6]> {
    let mut tiles: Vec<QueryTile> = Vec::new();
    for segment in segments {
        let end = segment.queries.end.min(queries);
        let mut from = segment.queries.start;
        while from < end {
            let room = tiles.last().map_or(0, |t| tiling.query_tile - t.queries.len());
            let filling = QueryTile::new(segment, from..end.min(from + room));
            if room > 0 && tiles.last_mut().is_some_and(|t| t.join(&filling, tiling.query_tile)) {
                from = filling.queries.end;
                continue;
            }
            tiles.push(QueryTile::new(segment, from..end.min(from + tiling.query_tile)));
            from = end.min(from + tiling.query_tile);
        }
    }
    let flat = |t: QueryTile| [t.queries, t.prefix, t.own].map(|r| [r.start as u32, r.end as u32]);
    tiles.into_iter().map(flat).map(|[a, b, c]| [a[0], a[1], b[0], b[1], c[0], c[1]]).collect()
}

/// A tile without queries, whose block writes nothing. Its rows end at 1 and not at 0, since a kernel may read what the last query
/// before the end sees.
pub(in crate::ops::attention) const EMPTY_TILE: [u32; 6] = [1, 1, 0, 0, 0, 0];

/// From the first to the last query that attends to one of the own `keys`.
fn queries_attending_to(segments: &[Segment], keys: &Range<usize>) -> Range<usize> {
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

/// Runs of neighbouring queries whose prefix contains all of `keys`.
fn queries_after_prefix(segments: &[Segment], keys: &Range<usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let contains = |p: &Range<usize>| p.start <= keys.start && keys.end <= p.end;
    for segment in
        segments.iter().filter(|s| !s.queries.is_empty() && s.prefix.as_ref().is_some_and(contains))
    {
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

/// `0..rows`, cut at every begin and end of a prefix, and whether the part is in a prefix.
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
    /// Covers every row of keys in `grad_rows`, also those to which no query attends.
    pub(in crate::ops::attention) fn new(
        segments: &[Segment],
        tiling: &Tiling,
        grad_rows: &GradRows,
    ) -> Self {
        let mut plan = Self::default();
        let in_other_pass = grad_rows.prefix.is_some();
        let rows = parts(segments, grad_rows.prefix.unwrap_or(grad_rows.keys));
        let shared = rows.into_iter().filter(|(_, in_prefix)| in_other_pass || *in_prefix);
        let tiles: Vec<_> = shared.flat_map(|(part, _)| cut(part, tiling.key_tile)).collect();
        let queries = segments.last().map_or(0, |s| s.queries.end);
        let enough = (queries * tiles.len()).div_ceil(SLOTS).next_multiple_of(tiling.query_tile);
        let chunked = Tiling { query_chunk: tiling.query_chunk.max(enough), ..*tiling };
        tiles.into_iter().for_each(|keys| plan.prefix(segments, &chunked, keys, !in_other_pass));
        let all = || vec![(0..grad_rows.keys, false)];
        let own = if in_other_pass { all() } else { parts(segments, grad_rows.keys) };
        for (part, _) in own.into_iter().filter(|(_, in_prefix)| !in_prefix) {
            for keys in cut(part, tiling.key_tile) {
                let queries = queries_attending_to(segments, &keys);
                plan.push(&keys, queries, 0, 0);
            }
        }
        // Blocks start in this order: the longest first, so that none is left for the end.
        plan.items.sort_by_key(|[_, _, begin, end, ..]| std::cmp::Reverse(end - begin));
        plan
    }

    /// Adds the items and the reduction of rows of a prefix; `own` if they are rows of this batch.
    fn prefix(&mut self, segments: &[Segment], tiling: &Tiling, keys: Range<usize>, own: bool) {
        let first = self.slots;
        let causal = if own { queries_attending_to(segments, &keys) } else { 0..0 };
        for queries in chunks(causal, tiling) {
            self.push(&keys, queries, 1, self.slots);
            self.slots += 1;
        }
        for queries in queries_after_prefix(segments, &keys).into_iter().flat_map(|run| chunks(run, tiling)) {
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

//! How segments are cut into tasks and blocks of queries on the CPU.

use crate::ops::Segment;
use std::ops::Range;

/// Queries whose scores are in memory at a time, and about the queries of a run: enough rows for an efficient product with the
/// prefix, and few enough that a batch of 300 rows makes tasks for several cores.
const QUERY_BLOCK: usize = 128;

/// Neighbouring segments with the same prefix.
pub(super) struct SegmentRun {
    pub(super) segments: Range<usize>,
    pub(super) prefix: Option<Range<usize>>,
}

/// Groups the segments into runs. A segment is never cut, so its keys belong to one run.
pub(super) fn runs(segments: &[Segment]) -> Vec<SegmentRun> {
    let mut runs: Vec<SegmentRun> = Vec::new();
    let mut queries = 0;
    for (i, segment) in segments.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.prefix == segment.prefix && queries + segment.queries.len() <= QUERY_BLOCK => {
                run.segments.end = i + 1;
                queries += segment.queries.len();
            }
            _ => {
                runs.push(SegmentRun { segments: i..i + 1, prefix: segment.prefix.clone() });
                queries = segment.queries.len();
            }
        }
    }
    runs
}

/// A part of one segment inside a block of queries.
pub(super) struct SegmentPiece {
    /// Rows of the block.
    pub(super) rows: Range<usize>,
    /// First row of the segment's own keys.
    pub(super) key: usize,
    /// Own keys that the first of the rows attends to; each next row attends to one more.
    pub(super) visible: usize,
}

/// A row of a block's scores.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScoreRow {
    /// Row of the block.
    pub(super) index: usize,
    /// Columns to which its query attends, the prefix's first.
    pub(super) visible: usize,
}

impl SegmentPiece {
    /// Own keys to which the last of the rows attends.
    pub(super) fn keys(&self) -> usize {
        self.visible + self.rows.len() - 1
    }

    /// Row `index` of the block, which is one of the piece's, with `prefix` columns of a prefix.
    pub(super) fn score_row(&self, index: usize, prefix: usize) -> ScoreRow {
        ScoreRow { index, visible: prefix + self.visible + index - self.rows.start }
    }
}

/// Queries whose scores are computed together.
pub(super) struct QueryBlock {
    /// First row of the query matrix.
    pub(super) query: usize,
    pub(super) rows: usize,
    pub(super) pieces: Vec<SegmentPiece>,
    /// Columns of the scores: keys of the prefix and the most own keys of a piece, rounded up to full lanes.
    pub(super) columns: usize,
}

impl QueryBlock {
    /// The rows of its scores, with `prefix` columns of a prefix.
    pub(super) fn score_rows(&self, prefix: usize) -> impl Iterator<Item = ScoreRow> {
        self.pieces.iter().flat_map(move |piece| piece.rows.clone().map(move |i| piece.score_row(i, prefix)))
    }
}

/// The number of columns of the scores is a multiple of it, so that a row consists of full vectors.
pub(super) const LANES: usize = 32;

/// Cuts the segments of a run, whose prefix has `prefix` rows, into blocks.
pub(super) fn blocks(segments: &[Segment], prefix: usize) -> Vec<QueryBlock> {
    let mut blocks: Vec<QueryBlock> = Vec::new();
    for segment in segments {
        let mut done = 0;
        while done < segment.queries.len() {
            if blocks.last().is_none_or(|b| b.rows == QUERY_BLOCK) {
                let query = segment.queries.start + done;
                blocks.push(QueryBlock { query, rows: 0, pieces: Vec::new(), columns: prefix });
            }
            let Some(block) = blocks.last_mut() else { unreachable!("one was pushed") };
            let n = (segment.queries.len() - done).min(QUERY_BLOCK - block.rows);
            let rows = block.rows..block.rows + n;
            let piece = SegmentPiece { rows, key: segment.keys.start, visible: segment.first + done + 1 };
            block.columns = block.columns.max((prefix + piece.keys()).next_multiple_of(LANES));
            block.rows += n;
            block.pieces.push(piece);
            done += n;
        }
    }
    blocks
}

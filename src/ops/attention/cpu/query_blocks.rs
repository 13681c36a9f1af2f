//! How segments are cut into the CPU kernel's tasks and blocks of queries.

use super::Segment;
use std::ops::Range;

/// Queries whose scores are held at a time, and about the queries of a run: enough rows for an efficient
/// product with the prefix, few enough that a batch of 300 rows makes tasks for several cores.
const QUERY_BLOCK: usize = 128;

/// Neighbouring segments with the same prefix.
pub(super) struct Run {
    pub(super) segments: Range<usize>,
    pub(super) prefix: Option<Range<usize>>,
}

/// Cuts the segments into runs; a segment is never cut, so its keys belong to one run.
pub(super) fn runs(segments: &[Segment]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut queries = 0;
    for (i, segment) in segments.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.prefix == segment.prefix && queries + segment.queries.len() <= QUERY_BLOCK => {
                run.segments.end = i + 1;
                queries += segment.queries.len();
            }
            _ => {
                runs.push(Run { segments: i..i + 1, prefix: segment.prefix.clone() });
                queries = segment.queries.len();
            }
        }
    }
    runs
}

/// A part of one segment inside a block of queries.
pub(super) struct Piece {
    /// Rows of the block.
    pub(super) rows: Range<usize>,
    /// First row of the segment's own keys.
    pub(super) key: usize,
    /// Own keys that the first of the rows sees; each next row sees one more.
    pub(super) visible: usize,
}

/// A row of a block's scores.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// Which row of the block it is.
    pub(super) index: usize,
    /// Columns that its query sees, the prefix's first.
    pub(super) visible: usize,
}

impl Piece {
    pub(super) fn keys(&self) -> usize {
        self.visible + self.rows.len() - 1
    }

    /// The row `index` of the block, which is one of the piece's, with `prefix` columns of a prefix.
    pub(super) fn row(&self, index: usize, prefix: usize) -> Row {
        Row { index, visible: prefix + self.visible + index - self.rows.start }
    }
}

/// Queries that are worked on together.
pub(super) struct Block {
    /// First row of the query matrix.
    pub(super) query: usize,
    pub(super) rows: usize,
    pub(super) pieces: Vec<Piece>,
    /// Keys of the prefix, and the most own keys of a piece: columns of the scores, up to whole lanes.
    pub(super) columns: usize,
}

impl Block {
    /// Its rows, with `prefix` columns of a prefix.
    pub(super) fn each_row(&self, prefix: usize) -> impl Iterator<Item = Row> {
        self.pieces.iter().flat_map(move |piece| piece.rows.clone().map(move |i| piece.row(i, prefix)))
    }
}

/// Columns of the scores are a multiple of it, so that a row can be worked on in whole vectors.
pub(super) const LANES: usize = 32;

pub(super) fn blocks(segments: &[Segment], prefix: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for segment in segments {
        let mut done = 0;
        while done < segment.queries.len() {
            if blocks.last().is_none_or(|b| b.rows == QUERY_BLOCK) {
                let query = segment.queries.start + done;
                blocks.push(Block { query, rows: 0, pieces: Vec::new(), columns: prefix });
            }
            let Some(block) = blocks.last_mut() else { unreachable!("one was pushed") };
            let n = (segment.queries.len() - done).min(QUERY_BLOCK - block.rows);
            let rows = block.rows..block.rows + n;
            let piece = Piece { rows, key: segment.keys.start, visible: segment.first + done + 1 };
            block.columns = block.columns.max((prefix + piece.keys()).next_multiple_of(LANES));
            block.rows += n;
            block.pieces.push(piece);
            done += n;
        }
    }
    blocks
}

//! How a product is cut among threads.

use super::SIDE;
use half::bf16;

/// Rows and columns of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TaskSplit {
    /// Rows of a group of tasks.
    pub(super) rows: usize,
    /// Tasks of a group, which share its columns.
    pub(super) across: usize,
    /// Columns of a task if all are equally fast.
    pub(super) columns: usize,
}

/// Part of the second-level cache that rows may take in tiles, in tenths: 1.25 MB of 2 MB on the machine of amx/mod.rs. Rows of
/// 2.3 MB made 770 GFLOP/s a core there, and rows of 1.15 MB 1,780.
const CACHE_TENTHS: usize = 6;

/// What a row costs a task that packs it and reads it again for all columns, in columns of the weight that it reads. With 367
/// rows on 2 cores of a Sapphire Rapids class CPU a cut of the rows was faster for 576 columns (1,741 against 1,636
/// GFLOP/s), as fast for 960, and slower for 3,072 (1,754 against 1,954): so 367 rows are worth about 960 columns, in
/// halves.
const ROW_COST: f64 = 2.5;

impl TaskSplit {
    /// Of `m` rows by `width` columns, with sums of `depth` values at a time, for `threads` threads.
    pub(super) fn new(m: usize, width: usize, depth: usize, threads: usize) -> Self {
        let cache = gemm_common::cache::CACHE_INFO[1].cache_bytes;
        Self::for_cache(m, width, depth, (threads, cache))
    }

    fn for_cache(m: usize, width: usize, depth: usize, (threads, cache): (usize, usize)) -> Self {
        let (blocks, pairs) = (m.div_ceil(SIDE), width.div_ceil(SIDE));
        let bytes = SIDE * depth.max(1) * size_of::<bf16>();
        let fewest = blocks.div_ceil((cache / 10 * CACHE_TENTHS / bytes).max(1));
        let (mut least, mut best) = (f64::INFINITY, (1, 1));
        for groups in fewest..=blocks.min(fewest + threads) {
            // A task for each thread; of many groups, as many as give each thread equally many tasks.
            let equal = threads / greatest_common_divisor(groups, threads);
            for across in [threads.div_ceil(groups), (threads / groups).max(1), equal] {
                let across = across.min(pairs);
                let rounds = (groups * across).div_ceil(threads) as f64;
                let read = (pairs.div_ceil(across) as f64) + ROW_COST * blocks.div_ceil(groups) as f64;
                // Beside what is read, what is multiplied: the largest task's share.
                let multiplied = (pairs.div_ceil(across) * blocks.div_ceil(groups)) as f64;
                let cost = rounds * (read + multiplied);
                if cost < least {
                    (least, best) = (cost, (groups, across));
                }
            }
        }
        let (groups, across) = best;
        Self { rows: blocks.div_ceil(groups) * SIDE, across, columns: pairs.div_ceil(across) * SIDE }
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1 << 20;

    /// Whether rows are cut, for 367 of them and two threads with 2 MB each.
    fn cuts_rows(width: usize, depth: usize) -> bool {
        let split = TaskSplit::for_cache(367, width, depth, (2, 2 * MB));
        assert_eq!(367usize.div_ceil(split.rows) * split.across, 2, "a task for each thread");
        split.across == 1
    }

    #[test]
    fn split_is_by_rows_or_columns_as_measured() {
        assert!(cuts_rows(576, 576) && cuts_rows(576, 1536) && !cuts_rows(3072, 576));
        // Sums over 3,072 values at a time would not leave room for the rows.
        assert!(cuts_rows(576, 3072));
    }

    #[test]
    fn split_keeps_rows_in_the_cache() {
        for threads in [1, 2, 3, 8, 64] {
            for (m, width, depth) in
                [(1, 1, 1), (16, 49_152, 576), (367, 960, 576), (5000, 64, 2048), (4096, 4096, 2048)]
            {
                let split = TaskSplit::for_cache(m, width, depth, (threads, 2 * MB));
                let bytes = split.rows.min(m) * depth * 2;
                assert!(
                    bytes <= 12 * MB / 10 || split.rows == SIDE,
                    "{bytes} bytes of {m} rows, {threads} threads"
                );
                let groups = m.div_ceil(split.rows);
                let most = m.div_ceil(SIDE) * width.div_ceil(SIDE);
                assert!(
                    groups * split.across >= threads.min(most).div_ceil(2),
                    "{split:?} of {threads} threads"
                );
                assert!(split.columns * split.across >= width);
            }
        }
        // No cache is too small, and an unknown one neither.
        assert_eq!(TaskSplit::for_cache(100, 64, 2048, (2, 0)).rows, SIDE);
    }
}

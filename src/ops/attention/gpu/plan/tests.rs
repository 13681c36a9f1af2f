use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const TILINGS: [Tiling; 4] = [
    Tiling { query_tile: 1, key_tile: 1, query_chunk: 2 },
    Tiling { query_tile: 4, key_tile: 3, query_chunk: 8 },
    Tiling { query_tile: 16, key_tile: 16, query_chunk: 64 },
    Tiling { query_tile: 64, key_tile: 64, query_chunk: 512 },
];

/// How often a query meets a key, (query, key, whether it is a prefix's).
type QueryKeyPairs = HashMap<(usize, usize, bool), usize>;

fn allowed(segments: &[Segment]) -> QueryKeyPairs {
    let mut pairs = QueryKeyPairs::new();
    for segment in segments {
        for (i, query) in segment.queries.clone().enumerate() {
            let own = segment.keys.start..=segment.keys.start + segment.first + i;
            own.for_each(|key| *pairs.entry((query, key, false)).or_default() += 1);
            prefix(segment).for_each(|key| *pairs.entry((query, key, true)).or_default() += 1);
        }
    }
    pairs
}

fn range(ends: &[u32]) -> Range<usize> {
    ends[0] as usize..ends[1] as usize
}

fn check_tiles(segments: &[Segment], tiling: &Tiling, queries: usize) {
    let visible = visible(segments);
    let (mut pairs, mut next) = (QueryKeyPairs::new(), 0);
    for tile in tiles(segments, tiling, queries) {
        let (rows, prefix, own) = (range(&tile[..2]), range(&tile[2..4]), range(&tile[4..]));
        assert_eq!(rows.start, next, "queries are in order");
        assert!(!rows.is_empty() && rows.len() <= tiling.query_tile);
        next = rows.end;
        for query in rows {
            let seen = range(&visible[query]);
            prefix.clone().for_each(|key| *pairs.entry((query, key, true)).or_default() += 1);
            let own = own.clone().filter(|key| seen.contains(key));
            own.for_each(|key| *pairs.entry((query, key, false)).or_default() += 1);
        }
    }
    assert_eq!(next, queries);
    let mut expected = allowed(segments);
    expected.retain(|(query, ..), _| *query < queries);
    assert_eq!(pairs, expected);
}

fn check_items(segments: &[Segment], tiling: &Tiling, grad_rows: &GradRows) {
    let plan = KeyPlan::new(segments, tiling, grad_rows);
    let visible = visible(segments);
    let mut pairs = QueryKeyPairs::new();
    let (mut own_writes, mut slots) = (vec![0; grad_rows.keys], vec![None; plan.slots]);
    for &[key_begin, key_end, query_begin, query_end, source, slot] in &plan.items {
        let (keys, queries) = (range(&[key_begin, key_end]), range(&[query_begin, query_end]));
        assert!(!keys.is_empty() && keys.len() <= tiling.key_tile);
        if source == 0 {
            own_writes[keys.clone()].iter_mut().for_each(|n| *n += 1);
        } else {
            assert!(slots[slot as usize].replace(keys.clone()).is_none(), "slot {slot} has two items");
        }
        for query in queries {
            let seen = range(&visible[query]);
            for key in keys.clone().filter(|key| source == 2 || seen.contains(key)) {
                *pairs.entry((query, key, source == 2)).or_default() += 1;
            }
        }
    }
    let mut prefix_writes = vec![0; grad_rows.prefix.unwrap_or(grad_rows.keys)];
    let mut reduced = vec![0; plan.slots];
    for &[key_begin, key_end, slot_begin, slot_end] in &plan.reductions {
        let (keys, of) = (range(&[key_begin, key_end]), range(&[slot_begin, slot_end]));
        prefix_writes[keys.clone()].iter_mut().for_each(|n| *n += 1);
        for slot in of {
            reduced[slot] += 1;
            assert_eq!(slots[slot], Some(keys.clone()), "the rows of slot {slot}");
        }
    }
    assert!(reduced.iter().all(|n| *n == 1), "every slot is added up once: {reduced:?}");
    if grad_rows.prefix.is_none() {
        own_writes.iter_mut().zip(&prefix_writes).for_each(|(own, prefix)| *own += prefix);
    } else {
        assert!(prefix_writes.iter().all(|n| *n == 1), "every prefix row is written once");
    }
    assert!(own_writes.iter().all(|n| *n == 1), "every row is written once: {own_writes:?}");
    let mut expected = allowed(segments);
    let rows = |in_prefix: bool| if in_prefix { prefix_writes.len() } else { grad_rows.keys };
    expected.retain(|(_, key, in_prefix), _| *key < rows(*in_prefix));
    assert_eq!(pairs, expected);
}

/// Prefixes, then sequences (prefix, rows, queries among them), as a batch is packed.
fn packed(prefixes: &[(usize, usize)], sequences: &[(usize, usize, usize)]) -> Vec<Segment> {
    let (mut segments, mut row, mut query, mut ranges) = (Vec::new(), 0, 0, Vec::new());
    let mut push = |rows: usize, queries: usize, prefix| {
        let first = rows - queries;
        segments.push(Segment { queries: query..query + queries, keys: row..row + rows, first, prefix });
        row += rows;
        query += queries;
        row
    };
    for &(rows, queries) in prefixes {
        let end = push(rows, queries.min(rows), None);
        ranges.push(end - rows..end);
    }
    for &(prefix, rows, queries) in sequences {
        push(rows, queries.min(rows), ranges.get(prefix).cloned());
    }
    segments
}

/// The sequences alone, with their prefixes in another matrix of `rows` rows.
fn after_another_pass(segments: &[Segment], prefixes: usize, rows: usize) -> Vec<Segment> {
    let query = segments[..prefixes].last().map_or(0, |s| s.queries.end);
    let moved = |s: &Segment| Segment {
        queries: s.queries.start - query..s.queries.end - query,
        keys: s.keys.start - rows..s.keys.end - rows,
        ..s.clone()
    };
    segments[prefixes..].iter().map(moved).collect()
}

fn ends(segments: &[Segment]) -> (usize, usize) {
    segments.iter().fold((0, 0), |(q, k), s| (q.max(s.queries.end), k.max(s.keys.end)))
}

fn check(segments: &[Segment], prefixes: usize) {
    let (queries, keys) = ends(segments);
    let (prefix_queries, prefix_rows) = ends(&segments[..prefixes]);
    let sequences = after_another_pass(segments, prefixes, prefix_rows);
    let (sequence_queries, sequence_keys) = ends(&sequences);
    for tiling in &TILINGS {
        check_tiles(segments, tiling, queries);
        check_tiles(segments, tiling, prefix_queries);
        // Two rows more than any segment has: they are written all the same.
        check_items(segments, tiling, &GradRows { queries, keys: keys + 2, prefix: None });
        check_items(segments, tiling, &GradRows { queries, keys: prefix_rows, prefix: None });
        check_tiles(&sequences, tiling, sequence_queries);
        for keys in [0, sequence_keys] {
            let grad_rows = GradRows { queries: sequence_queries, keys, prefix: Some(prefix_rows + 1) };
            check_items(&sequences, tiling, &grad_rows);
        }
    }
}

#[test]
fn batches_are_covered_once() {
    check(&packed(&[(1, 1)], &[(0, 1, 1)]), 1);
    check(&packed(&[(7, 7)], &[]), 1);
    check(&packed(&[], &[(9, 6, 6), (9, 130, 130)]), 0);
    check(&packed(&[(5, 5)], &[(0, 3, 3), (0, 1, 1), (0, 123, 123)]), 1);
    check(
        &packed(&[(123, 123), (4, 4)], &[(0, 40, 40), (0, 60, 60), (0, 70, 70), (1, 2, 2), (1, 300, 300)]),
        2,
    );
    check(&packed(&[(9, 0), (5, 0)], &[(0, 6, 2), (0, 3, 3), (1, 150, 140)]), 2);
}

#[test]
fn prefixes_that_overlap_and_slots_with_gaps_are_covered_once() {
    let segment = |queries, keys, first, prefix| Segment { queries, keys, first, prefix };
    let segments = [
        segment(0..12, 0..12, 0, None),
        segment(12..15, 40..50, 7, Some(0..8)),
        segment(15..20, 20..30, 2, Some(0..12)),
        segment(20..21, 12..16, 1, Some(3..9)),
        segment(21..21, 60..64, 0, Some(3..9)),
        segment(21..25, 64..68, 0, Some(5..5)),
    ];
    for tiling in &TILINGS {
        check_tiles(&segments, tiling, 25);
        check_items(&segments, tiling, &GradRows { queries: 25, keys: 70, prefix: None });
        check_items(&segments[1..1], tiling, &GradRows { queries: 0, keys: 3, prefix: Some(5) });
    }
}

#[test]
fn a_prefix_fills_a_gpu() {
    let tiling = Tiling { query_tile: 64, key_tile: 64, query_chunk: 512 };
    let sequences: Vec<_> = (0..200).map(|i| (0, 38 + i % 5, 38 + i % 5)).collect();
    let segments = packed(&[(100, 100)], &sequences);
    let (queries, keys) = ends(&segments);
    let plan = KeyPlan::new(&segments, &tiling, &GradRows { queries, keys, prefix: None });
    assert_eq!(plan.reductions, [[0, 64, 0, 17], [64, 100, 17, 34]]);
    assert!(plan.items.iter().all(|item| item[3] - item[2] <= 512));
    let tiles = tiles(&segments, &tiling, queries);
    assert!(tiles.len() <= queries.div_ceil(64) + 1, "{} tiles of {queries} queries", tiles.len());
}

#[test]
fn long_prefixes_have_few_slots() {
    let tiling = Tiling { query_tile: 64, key_tile: 64, query_chunk: 512 };
    let segments = packed(&[(4000, 4000)], &[(0, 8000, 8000)]);
    let plan = KeyPlan::new(&segments, &tiling, &GradRows { queries: 12_000, keys: 12_000, prefix: None });
    assert_eq!(plan.reductions.len(), 63);
    assert!(plan.slots <= 63 + 2 * SLOTS, "{} slots", plan.slots);
}

#[test]
fn sequences_far_apart_have_tiles_of_their_own() {
    let tiling = Tiling { query_tile: 64, key_tile: 64, query_chunk: 512 };
    let decoded = |i: usize| Segment {
        queries: i..i + 1,
        keys: 600 * i..600 * i + 500,
        first: 499,
        prefix: Some(0..100),
    };
    assert_eq!(tiles(&(0..8).map(decoded).collect::<Vec<_>>(), &tiling, 8).len(), 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_batch_is_covered_once(
        prefixes in prop::collection::vec((1usize..40, 0usize..40), 0..4),
        sequences in prop::collection::vec((0usize..4, 1usize..90, 0usize..90), 0..7),
    ) {
        let mut sequences = sequences;
        sequences.sort_by_key(|s| s.0);
        check(&packed(&prefixes, &sequences), prefixes.len());
    }
}

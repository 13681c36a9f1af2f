use super::*;
use crate::ops::Segment;
use crate::ops::embed::{virtual_id, virtual_row};
use proptest::prelude::*;

fn example(input: &[u32], target: &[u32]) -> Example {
    Example { input: input.to_vec(), target: target.to_vec(), line: 0 }
}

#[test]
fn the_drawing_of_the_module_holds() {
    let groups = [
        PrefixGroup::new(
            0..3,
            [&example(&[1, 2, 3, 4, 5, 6, 7], &[8, 9]), &example(&[1, 2, 3, 5, 5], &[8, 8, 9])],
        ),
        PrefixGroup::new(3..5, [&example(&[1, 2, 3], &[8, 9])]),
    ];
    let Passes { prefix_pass: lead, example_passes: rest, .. } = Passes::new(&groups, 1000);
    assert!(rest.is_empty());
    let [p0, p1, p2, p3, p4] = [0, 1, 2, 3, 4].map(virtual_id);
    assert_eq!(*lead.ids, [p0, p1, p2, 1, 2, 3, p3, p4, 1, 2, 4, 5, 6, 7, 8, 5, 5, 8, 8, 3, 8]);
    assert_eq!(*lead.position_ids, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 10, 6, 7, 8, 9, 4, 5]);
    assert_eq!(lead.prefix_rows, 10);
    assert_eq!(*lead.target_rows, [13, 14, 16, 17, 18, 19, 20]);
    assert_eq!(*lead.labels, [8, 9, 8, 8, 9, 8, 9]);
    assert_eq!(lead.segments[2], Segment { queries: 10..15, keys: 10..15, first: 0, prefix: Some(0..6) });
    assert_eq!(
        lead.target_segments[2],
        Segment { queries: 0..2, keys: 10..15, first: 3, prefix: Some(0..6) }
    );
    assert_eq!(lead.target_segments[0], Segment { queries: 0..0, keys: 0..6, first: 6, prefix: None });
}

#[test]
fn prompt_after_a_head_stands_between_its_tokens() {
    let examples = [example(&[1, 2, 3, 4], &[8, 9]), example(&[1, 2, 3, 5, 6], &[7])];
    let groups = [
        PrefixGroup::after(&[1, 2], 0..2, &examples).unwrap(),
        PrefixGroup::after(&[], 2..3, &examples[..1]).unwrap(),
    ];
    assert_eq!((&groups[0].before, &groups[0].head, groups[0].prefix_rows()), (&vec![1, 2], &vec![3], 5));
    let [v, w, x] = [0, 1, 2].map(virtual_id);
    for max_rows in [100, 9] {
        let passes = Passes::new(&groups, max_rows);
        let prefixes = &passes.prefix_pass.ids[..passes.prefix_pass.prefix_rows];
        assert_eq!(prefixes, [1, 2, v, w, 3, x, 1, 2, 3]);
        let positions: Vec<u32> =
            passes.iter().flat_map(|batch| batch.position_ids.iter().copied()).collect();
        assert_eq!(positions, [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 5, 6, 4, 5]);
        let ids: Vec<u32> = passes.iter().flat_map(|batch| batch.ids.iter().copied()).skip(9).collect();
        assert_eq!(ids, [4, 8, 5, 6, 4, 8]);
    }
    let inputs: Vec<Vec<u32>> = groups[0].unpack().map(|(input, _)| input).collect();
    assert_eq!(inputs, [&examples[0].input[..], &examples[1].input[..]]);
    for before in [&[1, 3][..], &[1, 2, 3, 4]] {
        let message = PrefixGroup::after(before, 0..2, &examples).unwrap_err().to_string();
        assert!(message.contains(&format!("{before:?}")), "{message}");
    }
}

#[test]
fn short_and_long_sequences_have_a_prefix_each() {
    let examples = [example(&[1, 2, 3], &[8, 9]), example(&[1, 2, 4, 5], &[8, 9]), example(&[1, 2, 6], &[7])];
    let groups = [PrefixGroup::new(0..2, &examples), PrefixGroup::new(2..3, &examples[..1])];
    // Lengths 7, 8 and 6, and 6 in the other group: more than 7 is long.
    let Passes { prefix_pass: lead, .. } = Passes::with_long_rope(&groups, 1000, Some(7));
    let [v, w, x] = [0, 1, 2].map(virtual_id);
    assert_eq!(*lead.ids, [v, w, 1, 2, v, w, 1, 2, x, 1, 2, 3, 8, 4, 5, 8, 6, 3, 8]);
    assert_eq!(*lead.position_ids, [0, 1, 2, 3, 7, 8, 9, 10, 0, 1, 2, 4, 5, 11, 12, 13, 4, 3, 4]);
    assert_eq!(lead.prefix_rows, 11);
    let prefixes: Vec<_> = lead.segments.iter().filter_map(|s| s.prefix.clone()).collect();
    assert_eq!(prefixes, [0..4, 4..8, 0..4, 8..11]);
    assert_eq!(*lead.labels, [8, 9, 8, 9, 7, 8, 9], "in the order of the examples");
    let split = Passes::with_long_rope(&groups, 5, Some(7));
    assert_eq!((split.prefix_pass.prefix_rows, split.prefix_pass.ids.len()), (11, 11));
    let of_prefix =
        split.example_passes.iter().flat_map(|b| b.segments.iter().filter_map(|s| s.prefix.clone()));
    assert_eq!(of_prefix.collect::<Vec<_>>(), [0..4, 4..8, 0..4, 8..11]);
    let positions = split.example_passes.iter().flat_map(|b| b.position_ids.iter().copied());
    assert_eq!(positions.collect::<Vec<_>>(), [4, 5, 11, 12, 13, 4, 3, 4]);
    let all_short = Passes::with_long_rope(&groups, 1000, Some(8));
    assert_eq!(all_short, Passes::new(&groups, 1000));
}

#[test]
fn an_input_that_others_begin_with_keeps_its_last_token() {
    let examples = [example(&[7], &[1, 2]), example(&[7, 1], &[2])];
    let group = PrefixGroup::new(0..2, &examples);
    assert!(group.head.is_empty());
    assert_eq!(group.sequences[0].input, [7]);
}

#[test]
fn a_budget_splits_sequences_and_not_prefixes() {
    let examples: Vec<_> = (0..10).map(|i| example(&[9, 9, i, i, i], &[1, 2])).collect();
    let groups = [PrefixGroup::new(0..6, &examples)];
    let passes = Passes::new(&groups, 9);
    assert_eq!(passes.prefix_pass.ids.len(), 8);
    assert_eq!(passes.prefix_pass.prefix_rows, 8);
    assert_eq!(passes.example_passes.iter().map(|b| b.examples).collect::<Vec<_>>(), [2, 2, 2, 2, 2]);
    assert!(passes.example_passes.iter().all(|b| b.prefix_rows == 0 && b.segments[0].prefix == Some(0..8)));
    assert_eq!(passes.target_tokens(), 20);
}

fn examples() -> impl Strategy<Value = Vec<Example>> {
    let tokens = |n| prop::collection::vec(0u32..3, n);
    prop::collection::vec((tokens(1..8), tokens(1..4)), 0..6)
        .prop_map(|all| all.iter().map(|(i, t)| example(i, t)).collect())
}

#[test]
fn a_prefix_pass_takes_sequences_until_it_is_full() {
    // 8 prefix rows, and sequences of 4 rows each.
    let examples: Vec<_> = (0..10).map(|i| example(&[9, 9, i, i, i], &[1, 2])).collect();
    let groups = [PrefixGroup::new(0..6, &examples)];
    let packed = |max_rows, prefix_pass_rows| {
        let passes = Passes::packed(&groups, Packing { max_rows, prefix_pass_rows, long_above: None });
        assert_eq!(passes.prefix_pass.shares_prefixes, !passes.example_passes.is_empty());
        assert_eq!(passes.prefix_pass.prefix_rows, 8);
        assert_eq!((passes.rows(), passes.target_tokens()), (48, 20));
        let rest = passes.example_passes.iter().map(|b| b.examples).collect::<Vec<_>>();
        (passes.prefix_pass.examples, passes.prefix_pass.ids.len(), rest)
    };
    assert_eq!(packed(48, 16), (10, 48, vec![]));
    assert_eq!(packed(47, 0), (0, 8, vec![10]));
    assert_eq!(packed(47, 8), (0, 8, vec![10]), "the prefixes alone are enough");
    assert_eq!(packed(47, 9), (1, 12, vec![9]));
    assert_eq!(packed(47, 16), (2, 16, vec![8]));
    assert_eq!(packed(20, 16), (2, 16, vec![4, 4]));
    assert_eq!(packed(15, 16), (1, 12, vec![3, 3, 3]), "no pass has more than 15 rows");
    assert_eq!(packed(20, usize::MAX), (3, 20, vec![4, 3]));
    assert_eq!(packed(4, usize::MAX), (0, 8, vec![1; 10]), "a pass of one sequence each");
    // A sequence of 40 rows would make more than twice 16.
    let long = [example(&[9; 43], &[1]), example(&[9, 9, 9, 1], &[1])];
    let passes = Passes::packed(
        &[PrefixGroup::new(0..6, &long)],
        Packing { max_rows: 48, prefix_pass_rows: 16, long_above: None },
    );
    assert_eq!((passes.prefix_pass.examples, passes.example_passes.len()), (0, 1));
}

proptest! {
    #[test]
    fn unpacking_gives_back_every_example(
        all in prop::collection::vec(examples(), 1..4),
        budget in 1usize..40,
        prefix_pass_rows in 0usize..40,
    ) {
        let groups: Vec<_> =
            all.iter().enumerate().map(|(g, e)| PrefixGroup::new(g as u32 * 3..g as u32 * 3 + 3, e)).collect();
        for (group, examples) in groups.iter().zip(&all) {
            let expected: Vec<_> = examples.iter().map(|e| (e.input.clone(), e.target.clone())).collect();
            prop_assert_eq!(group.unpack().collect::<Vec<_>>(), expected);
        }
        let passes = Passes::packed(&groups, Packing { max_rows: budget, prefix_pass_rows, long_above: None });
        let prefixes = passes.prefix_pass.prefix_rows;
        let mut found = Vec::new();
        for batch in passes.iter() {
            prop_assert!(batch.rest_fits(budget, prefixes));
            for (segment, targets) in batch.segments.iter().zip(batch.target_segments.iter()) {
                let Some(prefix) = &segment.prefix else { continue };
                let own = &batch.ids[segment.keys.clone()];
                let before = &passes.prefix_pass.ids[prefix.clone()];
                let tokens: Vec<u32> = before.iter().chain(own).copied().filter(|id| virtual_row(*id).is_none()).collect();
                let labels = batch.labels[targets.queries.clone()].to_vec();
                let input = tokens.len() + 1 - labels.len();
                prop_assert_eq!(&tokens[input..], &labels[..labels.len() - 1]);
                let positions: Vec<u32> = (prefix.len() as u32..).take(own.len()).collect();
                prop_assert_eq!(&batch.position_ids[segment.keys.clone()], &positions[..]);
                found.push((tokens[..input].to_vec(), labels));
            }
        }
        let expected: Vec<_> = all.iter().flatten().map(|e| (e.input.clone(), e.target.clone())).collect();
        prop_assert_eq!(found, expected);
    }
}

impl PackedBatch {
    fn rest_fits(&self, budget: usize, prefixes: usize) -> bool {
        self.examples <= 1 || self.ids.len() <= budget.max(prefixes)
    }
}

//! The packed batch: every row of every prefix and sequence in one matrix, without padding.
//!
//! ```text
//! row   0 ...... P0 ...... P0+P1 ......                                          T
//!       ┌ prefix 0 ┐┌ prefix 1 ┐┌ seq 0 of 0 ┐┌ seq 1 of 0 ┐┌ seq 0 of 1 ┐ ...
//!       p p p h h h  p p h h     i i i i t     i i t t       i i i t
//! pos   0 1 2 3 4 5  0 1 2 3     6 7 8 9 10    6 7 8 9       4 5 6 7
//!
//! p  a virtual token                     t  a target token; the last one predicts nothing and has no row
//! h  a token that all inputs of the group begin with        i  the rest of an input
//! ```
//!
//! A row that predicts a target token is a *target row*: the last input row of a sequence and its t rows.
//!
//! Where a model turns the positions of long sequences by other frequencies ([`crate::model::Rope::long_above`]), a group
//! with sequences of both kinds has two prefixes, one for each. So no sequence changes what another one gives. A
//! sequence's length is that of its prefix, input and target, the target's end included, as transformers counts it.

use super::Example;
use crate::ops::embed::virtual_id;
use crate::ops::{Indices, Segment, Segments};
use std::ops::Range;

/// A prefix and the sequences that hang on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixGroup {
    /// Rows of the matrix of prompts that are this group's soft prompt; empty for the base model.
    pub prompt: Range<u32>,
    /// Tokens that all inputs begin with; they belong to the prefix.
    pub head: Vec<u32>,
    /// What each example has of its own.
    pub sequences: Vec<Sequence>,
}

/// One example's own tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The rest of the input; at least one token.
    pub input: Vec<u32>,
    /// The target, whose end is not a row.
    pub target: Vec<u32>,
}

impl Sequence {
    /// Rows that it takes in a batch.
    pub fn rows(&self) -> usize {
        self.input.len() + self.target.len().saturating_sub(1)
    }

    /// Its last rows that predict: one for each target token, or the one behind which a target would be
    /// generated.
    fn target_rows(&self) -> usize {
        self.target.len().max(1)
    }
}

impl PrefixGroup {
    /// Moves the longest common beginning of the inputs into the prefix, but for one token of each input:
    /// its last row predicts the target, and is the example's own.
    pub fn new<'a>(prompt: Range<u32>, examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let examples: Vec<&Example> = examples.into_iter().collect();
        let head = common_head(examples.iter().map(|e| e.input.as_slice())).to_vec();
        Self::with_head(prompt, head, examples)
    }

    /// A group whose shared tokens are known to be `head`; inputs must begin with it and have more.
    pub fn with_head<'a>(
        prompt: Range<u32>,
        head: Vec<u32>,
        examples: impl IntoIterator<Item = &'a Example>,
    ) -> Self {
        let sequence =
            |e: &Example| Sequence { input: e.input[head.len()..].to_vec(), target: e.target.clone() };
        let sequences = examples.into_iter().map(sequence).collect();
        Self { prompt, sequences, head }
    }

    /// Rows of the prefix, P.
    pub fn prefix_rows(&self) -> usize {
        self.prompt.len() + self.head.len()
    }

    /// The examples again: inputs and targets.
    pub fn unpack(&self) -> impl Iterator<Item = (Vec<u32>, Vec<u32>)> + '_ {
        self.sequences.iter().map(|s| ([self.head.as_slice(), &s.input].concat(), s.target.clone()))
    }
}

/// The longest common beginning of `inputs`, less one token of the shortest.
pub fn common_head<'a>(mut inputs: impl Iterator<Item = &'a [u32]>) -> &'a [u32] {
    let Some(first) = inputs.next() else { return &[] };
    let mut n = first.len().saturating_sub(1);
    for input in inputs {
        n = n.min(input.len().saturating_sub(1));
        n = first[..n].iter().zip(input).take_while(|(a, b)| a == b).count();
    }
    &first[..n]
}

/// Rows that go through the model together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedBatch {
    /// A token of the vocabulary, or a virtual token ([`virtual_id`]); `[T]`.
    pub ids: Indices,
    /// Row of the rotary table for each row: its position behind the beginning of its prefix, and in a sequence of more
    /// than [`crate::model::Rope::long_above`] positions that many more; `[T]`.
    pub position_ids: Indices,
    /// Leading rows of the batch that are prefixes.
    pub prefix_rows: usize,
    /// Who sees whom, all rows being queries.
    pub segments: Segments,
    /// The same with the target rows as the only queries.
    pub target_segments: Segments,
    /// Rows that predict, in order.
    pub target_rows: Indices,
    /// `position_ids` of `target_rows`.
    pub target_positions: Indices,
    /// The token that each of them predicts; empty where there is nothing to compare with.
    pub labels: Indices,
    /// Examples in the batch.
    pub examples: usize,
}

/// A batch in one pass, or in several that share the prefixes of the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passes {
    /// The prefixes, and all sequences where they fit.
    pub lead: PackedBatch,
    /// Sequences that see the lead's prefixes.
    pub rest: Vec<PackedBatch>,
}

impl Passes {
    /// Packs `groups`; where that makes more than `max_rows` rows, the prefixes get a pass of their own and the
    /// sequences as many as they need.
    pub fn new(groups: &[PrefixGroup], max_rows: usize) -> Self {
        Self::with_long_rope(groups, max_rows, None)
    }

    /// As [`Passes::new`], for a model that turns sequences of more than `long_above` positions by other frequencies.
    pub fn with_long_rope(groups: &[PrefixGroup], max_rows: usize, long_above: Option<usize>) -> Self {
        let sequences: Vec<(usize, &Sequence)> = groups
            .iter()
            .enumerate()
            .flat_map(|(g, group)| group.sequences.iter().map(move |s| (g, s)))
            .collect();
        let rows: usize = sequences.iter().map(|(_, s)| s.rows()).sum();
        let packer = Packer { groups, long_above };
        let prefixes: usize = groups.iter().map(|g| packer.kinds(g).count() * g.prefix_rows()).sum();
        if prefixes + rows <= max_rows || sequences.len() <= 1 {
            return Self { lead: packer.pack(true, &sequences), rest: Vec::new() };
        }
        let passes = rows.div_ceil(max_rows);
        let (mut rest, mut from, mut taken, mut all) = (Vec::new(), 0, 0, 0);
        for (i, (_, sequence)) in sequences.iter().enumerate() {
            // Passes of about equal size, none above the budget but for a sequence that is alone.
            let full = taken + sequence.rows() > max_rows || all >= rows * (rest.len() + 1) / passes;
            if i > from && full {
                rest.push(packer.pack(false, &sequences[from..i]));
                (from, taken) = (i, 0);
            }
            taken += sequence.rows();
            all += sequence.rows();
        }
        rest.push(packer.pack(false, &sequences[from..]));
        Self { lead: packer.pack(true, &[]), rest }
    }

    /// All passes, the lead first.
    pub fn iter(&self) -> impl Iterator<Item = &PackedBatch> {
        std::iter::once(&self.lead).chain(&self.rest)
    }

    /// Target tokens of all passes.
    pub fn target_tokens(&self) -> usize {
        self.iter().map(|b| b.labels.len()).sum()
    }

    /// Rows of all passes.
    pub fn rows(&self) -> usize {
        self.iter().map(|b| b.ids.len()).sum()
    }
}

struct Packer<'a> {
    groups: &'a [PrefixGroup],
    /// Positions above which a sequence is long.
    long_above: Option<usize>,
}

impl Packer<'_> {
    fn is_long(&self, group: &PrefixGroup, sequence: &Sequence) -> bool {
        let positions = group.prefix_rows() + sequence.input.len() + sequence.target.len();
        self.long_above.is_some_and(|most| positions > most)
    }

    /// Whether a group has short and long sequences; one without sequences counts as short.
    fn kinds(&self, group: &PrefixGroup) -> impl Iterator<Item = bool> {
        let has = |long| group.sequences.iter().any(|sequence| self.is_long(group, sequence) == long);
        let (short, long) = (has(false) || group.sequences.is_empty(), has(true));
        [(false, short), (true, long)].into_iter().filter(|(_, present)| *present).map(|(kind, _)| kind)
    }

    /// The first row of the rotary table for sequences of a kind.
    fn first_position(&self, long: bool) -> usize {
        self.long_above.filter(|_| long).unwrap_or(0)
    }

    /// Packs the prefixes, where they are wanted, and `sequences` (group, sequence).
    fn pack(&self, with_prefixes: bool, sequences: &[(usize, &Sequence)]) -> PackedBatch {
        let mut batch = PackedBatch {
            ids: Indices::default(),
            position_ids: Indices::default(),
            prefix_rows: 0,
            segments: Segments::default(),
            target_segments: Segments::default(),
            target_rows: Indices::default(),
            target_positions: Indices::default(),
            labels: Indices::default(),
            examples: sequences.len(),
        };
        // Of each group, by kind.
        let mut prefixes = Vec::new();
        let mut row = 0;
        for group in self.groups {
            let mut of_kind = [0..0, 0..0];
            for long in self.kinds(group) {
                let prefix = row..row + group.prefix_rows();
                row = prefix.end;
                if with_prefixes && !prefix.is_empty() {
                    let virtual_ids = group.prompt.clone().map(virtual_id);
                    let ids = virtual_ids.chain(group.head.iter().copied());
                    batch.push(ids, self.first_position(long), None, 0);
                }
                of_kind[usize::from(long)] = prefix;
            }
            prefixes.push(of_kind);
        }
        batch.prefix_rows = batch.ids.len();
        for (g, sequence) in sequences {
            let group = &self.groups[*g];
            let long = self.is_long(group, sequence);
            let prefix = Some(prefixes[*g][usize::from(long)].clone()).filter(|p| !p.is_empty());
            let rows = sequence.input.iter().chain(&sequence.target).copied().take(sequence.rows());
            let position = self.first_position(long) + group.prefix_rows();
            batch.push(rows, position, prefix, sequence.target_rows());
            batch.labels.extend(sequence.target.iter().copied());
        }
        batch
    }
}

impl PackedBatch {
    fn push(
        &mut self,
        ids: impl Iterator<Item = u32>,
        position: usize,
        prefix: Option<Range<usize>>,
        targets: usize,
    ) {
        let start = self.ids.len();
        self.ids.extend(ids);
        let rows = start..self.ids.len();
        self.position_ids.extend((position as u32..).take(rows.len()));
        let first = rows.len() - targets;
        let queries = self.target_rows.len()..self.target_rows.len() + targets;
        self.target_rows.extend((rows.start + first) as u32..rows.end as u32);
        self.target_positions.extend(((position + first) as u32..).take(targets));
        self.target_segments.push(Segment { queries, keys: rows.clone(), first, prefix: prefix.clone() });
        self.segments.push(Segment { queries: rows.clone(), keys: rows, first: 0, prefix });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::embed::virtual_row;
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
        let Passes { lead, rest } = Passes::new(&groups, 1000);
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
    fn short_and_long_sequences_have_a_prefix_each() {
        let examples =
            [example(&[1, 2, 3], &[8, 9]), example(&[1, 2, 4, 5], &[8, 9]), example(&[1, 2, 6], &[7])];
        let groups = [PrefixGroup::new(0..2, &examples), PrefixGroup::new(2..3, &examples[..1])];
        // Lengths 7, 8 and 6, and 6 in the other group: more than 7 is long.
        let Passes { lead, .. } = Passes::with_long_rope(&groups, 1000, Some(7));
        let [v, w, x] = [0, 1, 2].map(virtual_id);
        assert_eq!(*lead.ids, [v, w, 1, 2, v, w, 1, 2, x, 1, 2, 3, 8, 4, 5, 8, 6, 3, 8]);
        assert_eq!(*lead.position_ids, [0, 1, 2, 3, 7, 8, 9, 10, 0, 1, 2, 4, 5, 11, 12, 13, 4, 3, 4]);
        assert_eq!(lead.prefix_rows, 11);
        let prefixes: Vec<_> = lead.segments.iter().filter_map(|s| s.prefix.clone()).collect();
        assert_eq!(prefixes, [0..4, 4..8, 0..4, 8..11]);
        assert_eq!(*lead.labels, [8, 9, 8, 9, 7, 8, 9], "in the order of the examples");
        let split = Passes::with_long_rope(&groups, 5, Some(7));
        assert_eq!((split.lead.prefix_rows, split.lead.ids.len()), (11, 11));
        let of_prefix = split.rest.iter().flat_map(|b| b.segments.iter().filter_map(|s| s.prefix.clone()));
        assert_eq!(of_prefix.collect::<Vec<_>>(), [0..4, 4..8, 0..4, 8..11]);
        let positions = split.rest.iter().flat_map(|b| b.position_ids.iter().copied());
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
        assert_eq!(passes.lead.ids.len(), 8);
        assert_eq!(passes.lead.prefix_rows, 8);
        assert_eq!(passes.rest.iter().map(|b| b.examples).collect::<Vec<_>>(), [2, 2, 2, 2, 2]);
        assert!(passes.rest.iter().all(|b| b.prefix_rows == 0 && b.segments[0].prefix == Some(0..8)));
        assert_eq!(passes.target_tokens(), 20);
    }

    fn examples() -> impl Strategy<Value = Vec<Example>> {
        let tokens = |n| prop::collection::vec(0u32..3, n);
        prop::collection::vec((tokens(1..8), tokens(1..4)), 0..6)
            .prop_map(|all| all.iter().map(|(i, t)| example(i, t)).collect())
    }

    proptest! {
        #[test]
        fn unpacking_gives_back_every_example(all in prop::collection::vec(examples(), 1..4), budget in 1usize..40) {
            let groups: Vec<_> =
                all.iter().enumerate().map(|(g, e)| PrefixGroup::new(g as u32 * 3..g as u32 * 3 + 3, e)).collect();
            for (group, examples) in groups.iter().zip(&all) {
                let expected: Vec<_> = examples.iter().map(|e| (e.input.clone(), e.target.clone())).collect();
                prop_assert_eq!(group.unpack().collect::<Vec<_>>(), expected);
            }
            let passes = Passes::new(&groups, budget);
            let prefixes = passes.lead.prefix_rows;
            let mut found = Vec::new();
            for batch in passes.iter() {
                prop_assert!(batch.rest_fits(budget, prefixes));
                for (segment, targets) in batch.segments.iter().zip(batch.target_segments.iter()) {
                    let Some(prefix) = &segment.prefix else { continue };
                    let own = &batch.ids[segment.keys.clone()];
                    let before = &passes.lead.ids[prefix.clone()];
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
}

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
//! Where a model turns the positions of long sequences by other frequencies ([`crate::ops::rope::Rope::long_above`]), a group
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
    /// than [`crate::ops::rope::Rope::long_above`] positions that many more; `[T]`.
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
    /// Whether other passes read the keys and values of its prefix rows.
    pub shares_prefixes: bool,
}

/// How a batch is cut into passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Rows of a pass at most, but for a sequence that is longer.
    pub max_rows: usize,
    /// Rows that a prefix pass should have at least: it takes sequences until it has so many, and none that would make
    /// more than twice as many or more than `max_rows`. With 0 it takes none.
    pub prefix_pass_rows: usize,
    /// Positions above which a sequence is long ([`crate::ops::rope::Rope::long_above`]).
    pub long_above: Option<usize>,
}

/// A batch in one pass, or in several that share the prefixes of the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passes {
    /// The prefix pass: the prefixes and the first sequences, all of them if they fit.
    pub lead: PackedBatch,
    /// The example passes: the other sequences, which see the prefixes of the prefix pass.
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
        Self::packed(groups, Packing { max_rows, prefix_pass_rows: 0, long_above })
    }

    /// Packs `groups`, in one pass if they have at most `max_rows` rows.
    pub fn packed(groups: &[PrefixGroup], packing: Packing) -> Self {
        let Packing { max_rows, prefix_pass_rows, long_above } = packing;
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
        let (mut with_prefixes, mut taken) = (0, prefixes);
        let most = prefix_pass_rows.saturating_mul(2).min(max_rows);
        while taken < prefix_pass_rows && taken + sequences[with_prefixes].1.rows() <= most {
            taken += sequences[with_prefixes].1.rows();
            with_prefixes += 1;
        }
        let (with_prefixes, others) = sequences.split_at(with_prefixes);
        let mut lead = packer.pack(true, with_prefixes);
        lead.shares_prefixes = true;
        Self { lead, rest: packer.example_passes(others, max_rows) }
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

    /// Packs `sequences` (group, sequence) in passes without their prefixes, of about equal size, none above `max_rows`
    /// rows but for a sequence that is alone.
    fn example_passes(&self, sequences: &[(usize, &Sequence)], max_rows: usize) -> Vec<PackedBatch> {
        let rows: usize = sequences.iter().map(|(_, s)| s.rows()).sum();
        let passes = rows.div_ceil(max_rows);
        let (mut packed, mut from, mut taken, mut all) = (Vec::new(), 0, 0, 0);
        for (i, (_, sequence)) in sequences.iter().enumerate() {
            let full = taken + sequence.rows() > max_rows || all >= rows * (packed.len() + 1) / passes;
            if i > from && full {
                packed.push(self.pack(false, &sequences[from..i]));
                (from, taken) = (i, 0);
            }
            taken += sequence.rows();
            all += sequence.rows();
        }
        packed.push(self.pack(false, &sequences[from..]));
        packed
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
            shares_prefixes: false,
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
mod tests;

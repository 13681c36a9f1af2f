//! A batch in one pass, or in several.

use super::{PackedBatch, PrefixGroup, Sequence};
use crate::ops::embed::virtual_id;
use crate::ops::ssd::{ScanPlan, ScanSegment, ScanStart};
use crate::ops::{Indices, Segments};
use std::ops::Range;

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
    pub prefix_pass: PackedBatch,
    /// The example passes: the other sequences, which see the prefixes of the prefix pass.
    pub example_passes: Vec<PackedBatch>,
    /// Number of prefix groups.
    pub groups: usize,
    /// How prompts that are keys and values go into the passes; `None` for prompts of embeddings.
    pub given: Option<GivenPrompts>,
    /// In a distillation, the same sequences after the teacher's prefix, which is in another pass: one batch for each of the
    /// passes, the prefix pass first. Empty otherwise.
    pub teacher_passes: Vec<PackedBatch>,
}

/// Prompts that are keys and values: each pass is given them, and none has rows for them.
///
/// ```text
/// given               ┌ prompt 0 ┐┌ prompt 1 ┐
/// prefix pass         ┌ head 0 ┐┌ head 1 ┐                     each reads its prompt
/// example passes read ┌ prompt 0 ┐┌ head 0 ┐┌ prompt 1 ┐┌ head 1 ┐
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenPrompts {
    /// Rows of the matrices that hold the prompts of all groups.
    pub rows: usize,
    /// The prefixes that the example passes read, in order; empty if no group has a head: then all passes read the given
    /// matrices.
    pub joined: Vec<JoinedPrefix>,
}

/// A prefix whose first rows are given and whose other rows the prefix pass computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedPrefix {
    /// Rows of the given matrices.
    pub given: Range<usize>,
    /// Rows of the prefix pass.
    pub computed: Range<usize>,
}

impl JoinedPrefix {
    /// Rows of the prefix.
    pub fn rows(&self) -> usize {
        self.given.len() + self.computed.len()
    }
}

impl Passes {
    /// Packs `groups`; if that makes more than `max_rows` rows, the prefixes get a pass of their own and the
    /// sequences as many as they need.
    pub fn new(groups: &[PrefixGroup], max_rows: usize) -> Self {
        Self::with_long_rope(groups, max_rows, None)
    }

    /// As [`Passes::new`], for a model that rotates sequences of more than `long_above` positions by other frequencies.
    pub fn with_long_rope(groups: &[PrefixGroup], max_rows: usize, long_above: Option<usize>) -> Self {
        Self::packed(groups, Packing { max_rows, prefix_pass_rows: 0, long_above })
    }

    /// Packs `groups`, in one pass if they have at most `max_rows` rows.
    pub fn packed(groups: &[PrefixGroup], packing: Packing) -> Self {
        let Packing { max_rows, prefix_pass_rows, long_above } = packing;
        let packer = Packer { groups, long_above, given: false };
        let sequences = packer.sequences();
        let rows: usize = sequences.iter().map(|(_, s)| s.rows()).sum();
        let prefixes: usize = groups.iter().map(|g| packer.kinds(g).count() * g.prefix_rows()).sum();
        if prefixes + rows <= max_rows || sequences.len() <= 1 {
            return packer.passes(packer.pack(PassPrefixes::Own, &sequences), Vec::new());
        }
        let (mut with_prefixes, mut taken) = (0, prefixes);
        let most = prefix_pass_rows.saturating_mul(2).min(max_rows);
        while taken < prefix_pass_rows && taken + sequences[with_prefixes].1.rows() <= most {
            taken += sequences[with_prefixes].1.rows();
            with_prefixes += 1;
        }
        let (with_prefixes, others) = sequences.split_at(with_prefixes);
        let prefix_pass = packer.pack(PassPrefixes::Shared, with_prefixes);
        packer.passes(prefix_pass, packer.example_passes(others, max_rows))
    }

    /// Packs `groups` after prompts that are keys and values, of which a group's `prompt` names rows. If groups have heads, the
    /// prefix pass holds these alone.
    pub fn after_given(groups: &[PrefixGroup], max_rows: usize, long_above: Option<usize>) -> Self {
        let packer = Packer { groups, long_above, given: true };
        let sequences = packer.sequences();
        let examples = |rows| match sequences.len() {
            0 => Vec::new(),
            _ => packer.example_passes(&sequences, rows),
        };
        if packer.has_heads() {
            return packer.passes(packer.pack(PassPrefixes::Shared, &[]), examples(max_rows));
        }
        let mut passes = examples(max_rows);
        let first = if passes.is_empty() { packer.pack(PassPrefixes::Other, &[]) } else { passes.remove(0) };
        packer.passes(first, passes)
    }

    /// A pass of the prefixes of `groups` alone, for other passes that read them.
    pub fn of_prefixes(groups: &[PrefixGroup], long_above: Option<usize>) -> PackedBatch {
        Packer { groups, long_above, given: false }.pack(PassPrefixes::Shared, &[])
    }

    /// The sequences of `group` cut into passes as those of `self` are, after its prefix in another pass.
    pub fn cut_alike(&self, group: &PrefixGroup, long_above: Option<usize>) -> Vec<PackedBatch> {
        let packer = Packer { groups: std::slice::from_ref(group), long_above, given: false };
        let mut sequences = group.sequences.iter().map(|sequence| (0, sequence));
        let pack = |batch: &PackedBatch| {
            let sequences: Vec<_> = sequences.by_ref().take(batch.examples).collect();
            packer.pack(PassPrefixes::Other, &sequences)
        };
        self.iter().map(pack).collect()
    }

    /// All passes, the prefix pass first.
    pub fn iter(&self) -> impl Iterator<Item = &PackedBatch> {
        std::iter::once(&self.prefix_pass).chain(&self.example_passes)
    }

    /// The groups of the target rows of all passes, in order: index of a group, and how many target rows of it follow.
    pub fn target_groups(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.iter().flat_map(|batch| batch.target_groups.iter().copied())
    }

    /// Target tokens of each group.
    pub fn target_tokens_by_group(&self) -> Vec<usize> {
        let mut tokens = vec![0; self.groups];
        self.target_groups().for_each(|(group, rows)| tokens[group] += rows);
        tokens
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

/// Where the prefixes of a pass's sequences are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PassPrefixes {
    /// In the pass, for it alone.
    Own,
    /// In the pass, and other passes read them.
    Shared,
    /// In another pass.
    Other,
}

struct Packer<'a> {
    groups: &'a [PrefixGroup],
    /// Positions above which a sequence is long.
    long_above: Option<usize>,
    /// Whether prompts are keys and values that passes are given.
    given: bool,
}

/// A prefix as the sequences of a group and a kind (short or long) read it.
#[derive(Debug, Clone, Default)]
struct PrefixPlace {
    /// Its rows in the matrix that sequences read.
    rows: Range<usize>,
    /// Which of the prefixes that have rows in a pass it is.
    computed: Option<usize>,
}

impl<'a> Packer<'a> {
    /// All sequences, each with the index of its group.
    fn sequences(&self) -> Vec<(usize, &'a Sequence)> {
        let groups = self.groups.iter().enumerate();
        groups.flat_map(|(g, group)| group.sequences.iter().map(move |s| (g, s))).collect()
    }

    fn has_heads(&self) -> bool {
        self.groups.iter().any(|group| !group.head.is_empty())
    }

    fn passes(&self, prefix_pass: PackedBatch, example_passes: Vec<PackedBatch>) -> Passes {
        let given = self.given.then(|| GivenPrompts {
            rows: self.groups.iter().map(|group| group.prompt.end as usize).max().unwrap_or(0),
            joined: if self.has_heads() { self.joined() } else { Vec::new() },
        });
        let groups = self.groups.len();
        Passes { prefix_pass, example_passes, groups, given, teacher_passes: Vec::new() }
    }

    fn joined(&self) -> Vec<JoinedPrefix> {
        let mut row = 0;
        let all = self.groups.iter().flat_map(|group| self.kinds(group).map(move |_| group));
        all.map(|group| {
            let computed = row..row + group.head.len();
            row = computed.end;
            JoinedPrefix { given: prompt_rows(group), computed }
        })
        .collect()
    }

    /// The prefixes of each group, by kind.
    fn places(&self) -> Vec<[PrefixPlace; 2]> {
        let (mut row, mut next) = (0, 0);
        let given_alone = self.given && !self.has_heads();
        let place = |group: &PrefixGroup| {
            let mut of_kind = [PrefixPlace::default(), PrefixPlace::default()];
            for long in self.kinds(group) {
                let rows = if given_alone { prompt_rows(group) } else { row..row + group.prefix_rows() };
                row = rows.end;
                let has_rows = if self.given { !group.head.is_empty() } else { !rows.is_empty() };
                let computed = has_rows.then_some(next);
                next += usize::from(has_rows);
                of_kind[usize::from(long)] = PrefixPlace { rows, computed };
            }
            of_kind
        };
        self.groups.iter().map(place).collect()
    }

    fn is_long(&self, group: &PrefixGroup, sequence: &Sequence) -> bool {
        let positions = group.prefix_rows() + sequence.input.len() + sequence.target.len();
        self.long_above.is_some_and(|most| positions > most)
    }

    /// Whether a group has short and long sequences; one without sequences counts as short.
    fn kinds(&self, group: &PrefixGroup) -> impl Iterator<Item = bool> + use<> {
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
                packed.push(self.pack(PassPrefixes::Other, &sequences[from..i]));
                (from, taken) = (i, 0);
            }
            taken += sequence.rows();
            all += sequence.rows();
        }
        packed.push(self.pack(PassPrefixes::Other, &sequences[from..]));
        packed
    }

    /// Packs the prefixes, if they belong to the pass, and `sequences` (group, sequence).
    fn pack(&self, pass_prefixes: PassPrefixes, sequences: &[(usize, &Sequence)]) -> PackedBatch {
        let mut batch = PackedBatch {
            ids: Indices::default(),
            position_ids: Indices::default(),
            prefix_rows: 0,
            segments: Segments::default(),
            target_segments: Segments::default(),
            scan: ScanPlan::default(),
            target_rows: Indices::default(),
            target_positions: Indices::default(),
            labels: Indices::default(),
            target_groups: Vec::new(),
            examples: sequences.len(),
            shares_prefixes: pass_prefixes == PassPrefixes::Shared,
        };
        let mut starts = Vec::new();
        if pass_prefixes != PassPrefixes::Other {
            self.push_prefixes(&mut batch);
            starts.resize(batch.segments.len(), ScanStart::Zero);
        }
        let ends = starts.len();
        batch.prefix_rows = batch.ids.len();
        let places = self.places();
        for (g, sequence) in sequences {
            let group = &self.groups[*g];
            let long = self.is_long(group, sequence);
            let PrefixPlace { rows: prefix, computed } = places[*g][usize::from(long)].clone();
            let rows = sequence.input.iter().chain(&sequence.target).copied().take(sequence.rows());
            let position = self.first_position(long) + group.prefix_rows();
            let prefix = Some(prefix).filter(|p| !p.is_empty());
            batch.push(rows, position, prefix, sequence.target_rows());
            starts.push(match (computed, pass_prefixes) {
                (None, _) => ScanStart::Zero,
                (Some(prefix), PassPrefixes::Other) => ScanStart::State(prefix),
                (Some(prefix), _) => ScanStart::Segment(prefix),
            });
            match batch.target_groups.last_mut() {
                Some((last, rows)) if last == g => *rows += sequence.target_rows(),
                _ => batch.target_groups.push((*g, sequence.target_rows())),
            }
            batch.labels.extend(sequence.target.iter().copied());
        }
        // A batch of prefixes alone is made for other passes.
        let shared = pass_prefixes == PassPrefixes::Shared || batch.examples == 0;
        batch.scan = scan(&batch, starts, if shared { ends } else { 0 });
        batch
    }

    /// Adds the rows of the prefixes, one segment each.
    fn push_prefixes(&self, batch: &mut PackedBatch) {
        for group in self.groups {
            for long in self.kinds(group) {
                let first = self.first_position(long);
                let head = group.head.iter().copied();
                match self.given {
                    true if head.len() > 0 => {
                        let prompt = Some(prompt_rows(group)).filter(|rows| !rows.is_empty());
                        batch.push(head, first + group.prompt.len(), prompt, 0);
                    }
                    false if group.prefix_rows() > 0 => {
                        let prompt = group.prompt.clone().map(virtual_id);
                        let before = group.before.iter().copied();
                        batch.push(before.chain(prompt).chain(head), first, None, 0);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Rows of a group's prompt in the matrix of all prompts.
fn prompt_rows(group: &PrefixGroup) -> Range<usize> {
    group.prompt.start as usize..group.prompt.end as usize
}

/// The scan over the rows of a batch, whose segments start from `starts`; the first `ends` hand on a state.
fn scan(batch: &PackedBatch, starts: Vec<ScanStart>, ends: usize) -> ScanPlan {
    let segments = batch.segments.iter().zip(starts).enumerate().map(|(i, (segment, start))| ScanSegment {
        rows: segment.queries.clone(),
        start,
        end: (i < ends).then_some(i),
    });
    segments.collect::<Vec<_>>().into()
}

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
    /// In a distillation, the same sequences after the teacher's prefix, which is in another pass: one batch for each of the
    /// passes, the prefix pass first. Empty otherwise.
    pub teacher_passes: Vec<PackedBatch>,
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
        let sequences: Vec<(usize, &Sequence)> = groups
            .iter()
            .enumerate()
            .flat_map(|(g, group)| group.sequences.iter().map(move |s| (g, s)))
            .collect();
        let rows: usize = sequences.iter().map(|(_, s)| s.rows()).sum();
        let packer = Packer { groups, long_above };
        let prefixes: usize = groups.iter().map(|g| packer.kinds(g).count() * g.prefix_rows()).sum();
        if prefixes + rows <= max_rows || sequences.len() <= 1 {
            return Self {
                prefix_pass: packer.pack(PassPrefixes::Own, &sequences),
                example_passes: Vec::new(),
                groups: groups.len(),
                teacher_passes: Vec::new(),
            };
        }
        let (mut with_prefixes, mut taken) = (0, prefixes);
        let most = prefix_pass_rows.saturating_mul(2).min(max_rows);
        while taken < prefix_pass_rows && taken + sequences[with_prefixes].1.rows() <= most {
            taken += sequences[with_prefixes].1.rows();
            with_prefixes += 1;
        }
        let (with_prefixes, others) = sequences.split_at(with_prefixes);
        let prefix_pass = packer.pack(PassPrefixes::Shared, with_prefixes);
        let example_passes = packer.example_passes(others, max_rows);
        Self { prefix_pass, example_passes, groups: groups.len(), teacher_passes: Vec::new() }
    }

    /// A pass of the prefixes of `groups` alone, for other passes that read them.
    pub fn of_prefixes(groups: &[PrefixGroup], long_above: Option<usize>) -> PackedBatch {
        Packer { groups, long_above }.pack(PassPrefixes::Shared, &[])
    }

    /// The sequences of `group` cut into passes as those of `self` are, after its prefix in another pass.
    pub fn cut_alike(&self, group: &PrefixGroup, long_above: Option<usize>) -> Vec<PackedBatch> {
        let packer = Packer { groups: std::slice::from_ref(group), long_above };
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
        // Of each group, by kind.
        let mut prefixes = Vec::new();
        let mut row = 0;
        for group in self.groups {
            let mut of_kind = [0..0, 0..0];
            for long in self.kinds(group) {
                let prefix = row..row + group.prefix_rows();
                row = prefix.end;
                if pass_prefixes != PassPrefixes::Other && !prefix.is_empty() {
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
            match batch.target_groups.last_mut() {
                Some((last, rows)) if last == g => *rows += sequence.target_rows(),
                _ => batch.target_groups.push((*g, sequence.target_rows())),
            }
            batch.labels.extend(sequence.target.iter().copied());
        }
        let prefixes: Vec<Range<usize>> =
            prefixes.into_iter().flatten().filter(|rows| !rows.is_empty()).collect();
        batch.scan = scan(&batch, pass_prefixes, &prefixes);
        batch
    }
}

/// The scan over the rows of a batch; `prefixes` are the rows of all prefixes, in order, each of which hands on a state.
fn scan(batch: &PackedBatch, pass_prefixes: PassPrefixes, prefixes: &[Range<usize>]) -> ScanPlan {
    let own_prefixes = if pass_prefixes == PassPrefixes::Other { 0 } else { prefixes.len() };
    // A batch of prefixes alone is made for other passes.
    let ends = pass_prefixes == PassPrefixes::Shared || batch.examples == 0;
    let segments = batch.segments.iter().enumerate().map(|(i, segment)| {
        let prefix =
            segment.prefix.as_ref().map(|rows| prefixes.partition_point(|other| other.start < rows.start));
        let start = match (prefix, pass_prefixes) {
            (None, _) => ScanStart::Zero,
            (Some(prefix), PassPrefixes::Other) => ScanStart::State(prefix),
            (Some(prefix), _) => ScanStart::Segment(prefix),
        };
        ScanSegment { rows: segment.queries.clone(), start, end: (ends && i < own_prefixes).then_some(i) }
    });
    segments.collect::<Vec<_>>().into()
}

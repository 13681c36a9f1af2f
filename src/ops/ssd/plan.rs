//! The segments of a batch for the convolution and the scan, and the scan's chunks, which are made once for all layers.
//!
//! ```text
//! rows      ┌ prefix of group 0 ┐┌ seq ┐┌ seq ┐┌ seq ────────┐ ...
//! chunks    ├── 64 ──┼── 64 ──┼─┤├──┤  ├───┤  ├── 64 ──┼─────┤
//! blocks    ├────────┼────────┼─┤├───────────┤├────────┼─────┤     rows with one start state: chunks of several segments, or one
//! runs      ├───────────────────┤├───────────┤├──────────────┤     of one level: a run starts from a state of a lower level
//! ```

use super::gpu::SsdLists;
use crate::ops::conv::ConvLists;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Rows of a chunk at most. Longer chunks lose digits: differences of long sums of decays. In f32, with steps up to 8 and decays to
/// -16, the largest error of 64 rows was 2e-6 and that of 256 rows 1e-5.
pub(crate) const CHUNK: usize = 64;

/// Rows of a block of several segments at most: enough for an efficient product with the start state, few enough that a batch
/// makes tasks for several cores.
const BLOCK: usize = 256;

/// Consecutive rows of a batch that are one sequence or one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanSegment {
    /// Rows of the batch; the next segment begins with the row after them.
    pub rows: Range<usize>,
    /// The state before the first row.
    pub start: ScanStart,
    /// Row of the returned [`ScanStates`] that gets the state after the last row, if it is wanted.
    pub end: Option<usize>,
}

/// The state before the first row of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanStart {
    /// Zeros.
    Zero,
    /// Row of the given states: a prefix of another pass, or a slot of a cache.
    State(usize),
    /// The state after the last row of an earlier segment of this batch, by its index.
    Segment(usize),
}

/// The state of a Mamba2 layer at the borders of segments.
#[derive(Debug, Clone)]
pub struct ScanStates {
    /// State of the scan, [n, I, N], in f32 or f64.
    pub ssm: Tensor,
    /// The last W - 1 rows of the convolution's input, oldest first, and zeros before the first row of a sequence: [n, W - 1, X],
    /// in the dtype of that input.
    pub conv: Tensor,
}

/// The segments of a batch, in the order of their rows. Clones share the chunks, and the lists of the GPU's kernels.
#[derive(Clone, Default)]
pub struct ScanPlan {
    list: Vec<ScanSegment>,
    plans: Arc<ScanPlans>,
}

#[derive(Default)]
struct ScanPlans {
    chunks: OnceLock<ChunkPlan>,
    ssd: OnceLock<SsdLists>,
    conv: Mutex<HashMap<(usize, usize), Arc<ConvLists>>>,
}

impl ScanPlan {
    /// Segments of these lengths with their starts, one after another; their end states are numbered in the order of `ends`.
    pub(crate) fn with_lengths(segments: &[(usize, ScanStart)], ends: &[usize]) -> Self {
        let mut first = 0;
        let segments = segments.iter().enumerate().map(|(i, &(len, start))| {
            let rows = first..first + len;
            first = rows.end;
            ScanSegment { rows, start, end: ends.iter().position(|end| *end == i) }
        });
        segments.collect::<Vec<_>>().into()
    }

    /// Number of segments whose end state is wanted.
    pub fn ends(&self) -> usize {
        self.list.iter().filter(|segment| segment.end.is_some()).count()
    }

    /// Returns an error if the segments are not those of `rows` rows and `states` given states.
    pub(in crate::ops) fn check(&self, op: &'static str, rows: usize, states: usize) -> Result<()> {
        let fail = |expected: String, found: String| Err(Error::Shape { op, expected, found });
        let mut next = 0;
        for (i, segment) in self.list.iter().enumerate() {
            let ScanSegment { rows: own, start, .. } = segment;
            let start_exists = match *start {
                ScanStart::Zero => true,
                ScanStart::State(state) => state < states,
                ScanStart::Segment(earlier) => earlier < i,
            };
            if own.start != next || own.end < next || !start_exists {
                let expected = format!("rows from {next}, and a start of {states} states or {i} segments");
                return fail(expected, format!("{segment:?}"));
            }
            next = own.end;
        }
        if next != rows {
            return fail(format!("segments of {rows} rows"), format!("{next}"));
        }
        let mut ends: Vec<usize> = self.list.iter().filter_map(|segment| segment.end).collect();
        ends.sort_unstable();
        match ends.iter().enumerate().all(|(i, end)| i == *end) {
            true => Ok(()),
            false => fail(format!("the ends 0..{}", ends.len()), format!("{ends:?}")),
        }
    }

    /// The chunks; the segments must have been checked.
    pub(super) fn chunks(&self) -> &ChunkPlan {
        self.plans.chunks.get_or_init(|| ChunkPlan::new(&self.list))
    }

    /// The lists of the scan's kernels; the segments must have been checked.
    pub(super) fn ssd_lists(&self) -> &SsdLists {
        self.plans.ssd.get_or_init(|| SsdLists::new(&self.list))
    }

    /// The lists of the convolution's kernels for numbers of taps and given states, which `make` makes.
    pub(in crate::ops) fn conv_lists(
        &self,
        (taps, states): (usize, usize),
        make: impl FnOnce() -> ConvLists,
    ) -> Arc<ConvLists> {
        let mut lists = self.plans.conv.lock().unwrap_or_else(PoisonError::into_inner);
        lists.entry((taps, states)).or_insert_with(|| Arc::new(make())).clone()
    }
}

impl From<Vec<ScanSegment>> for ScanPlan {
    fn from(list: Vec<ScanSegment>) -> Self {
        Self { list, plans: Arc::default() }
    }
}

impl Deref for ScanPlan {
    type Target = [ScanSegment];
    fn deref(&self) -> &[ScanSegment] {
        &self.list
    }
}

impl fmt::Debug for ScanPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.list.fmt(f)
    }
}

impl PartialEq for ScanPlan {
    fn eq(&self, other: &Self) -> bool {
        self.list == other.list
    }
}

impl Eq for ScanPlan {}

/// The state from which rows start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateSource {
    Zero,
    /// Row of the given states.
    Given(usize),
    /// The end state of a chunk.
    Chunk(usize),
}

/// The memory of an end state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateSlot {
    /// Row of the returned end states.
    End(usize),
    /// Row of the op's own memory.
    Scratch(usize),
}

/// Up to [`CHUNK`] rows of one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) rows: Range<usize>,
    /// Whether it is the last chunk of its segment.
    pub(super) is_last: bool,
    /// Whether another chunk starts from its end state.
    pub(super) is_start: bool,
    /// Where the forward pass writes its end state, if that is needed: all chunks of a segment write to one place.
    pub(super) forward_slot: Option<StateSlot>,
    /// Where the backward pass writes its end state if another chunk starts from it: each chunk has a place of its own.
    pub(super) backward_slot: Option<StateSlot>,
}

/// Consecutive chunks that start from one state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) rows: Range<usize>,
    pub(super) start: StateSource,
    pub(super) chunks: Range<usize>,
}

/// One block of segments of one chunk each, or the blocks of one segment. The runs of a level do not depend on each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockRun {
    pub(super) blocks: Range<usize>,
    pub(super) start: StateSource,
    level: usize,
}

/// How the rows of a batch are cut.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ChunkPlan {
    pub(super) chunks: Vec<Chunk>,
    pub(super) blocks: Vec<Block>,
    pub(super) runs: Vec<BlockRun>,
    /// The runs of each level.
    pub(super) levels: Vec<Vec<usize>>,
    /// The source of each wanted end state.
    pub(super) ends: Vec<StateSource>,
    /// Numbers of the scratch slots of the forward and of the backward pass.
    pub(super) slots: [usize; 2],
}

impl ChunkPlan {
    fn new(list: &[ScanSegment]) -> Self {
        let mut plan = Self::default();
        let ends = list.iter().filter(|segment| segment.end.is_some()).count();
        plan.ends = vec![StateSource::Zero; ends];
        // The state after each segment, the run of each chunk, and the chunks of each segment.
        let (mut states, mut run_of, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for segment in list {
            let start = match segment.start {
                ScanStart::Zero => StateSource::Zero,
                ScanStart::State(state) => StateSource::Given(state),
                ScanStart::Segment(earlier) => states[earlier],
            };
            let own = plan.push_chunks(segment, start);
            if !own.is_empty() {
                let level = match start {
                    StateSource::Chunk(chunk) => plan.level_of(run_of[chunk]) + 1,
                    StateSource::Zero | StateSource::Given(_) => 0,
                };
                plan.push_blocks(own.clone(), start, level);
                run_of.resize(own.end, plan.runs.len() - 1);
            }
            let end = if own.is_empty() { start } else { StateSource::Chunk(own.end - 1) };
            if let Some(i) = segment.end {
                plan.ends[i] = end;
            }
            states.push(end);
            chunks.push(own);
        }
        for (i, run) in plan.runs.iter().enumerate() {
            plan.levels.resize_with(plan.levels.len().max(run.level + 1), Vec::new);
            plan.levels[run.level].push(i);
        }
        plan.place_states(list, &chunks);
        plan
    }

    fn level_of(&self, run: usize) -> usize {
        self.runs[run].level
    }

    /// Cuts a segment into chunks, and returns their range.
    fn push_chunks(&mut self, segment: &ScanSegment, start: StateSource) -> Range<usize> {
        let (first, rows) = (self.chunks.len(), segment.rows.clone());
        if let (StateSource::Chunk(chunk), false) = (start, rows.is_empty()) {
            self.chunks[chunk].is_start = true;
        }
        for row in rows.clone().step_by(CHUNK) {
            let (end, is_last) = ((row + CHUNK).min(rows.end), row + CHUNK >= rows.end);
            self.chunks.push(Chunk {
                rows: row..end,
                is_last,
                is_start: !is_last,
                forward_slot: None,
                backward_slot: None,
            });
        }
        first..self.chunks.len()
    }

    /// Adds the blocks and the run of one segment's chunks, or adds its chunk to the last block.
    fn push_blocks(&mut self, chunks: Range<usize>, start: StateSource, level: usize) {
        let rows = self.chunks[chunks.start].rows.clone();
        if chunks.len() == 1
            && let (Some(run), Some(block)) = (self.runs.last(), self.blocks.last_mut())
            && run.blocks.len() == 1
            && (run.start, run.level) == (start, level)
            && block.rows.len() + rows.len() <= BLOCK
        {
            block.rows.end = rows.end;
            block.chunks.end = chunks.end;
            return;
        }
        let first = self.blocks.len();
        for chunk in chunks.clone() {
            let start = if chunk == chunks.start { start } else { StateSource::Chunk(chunk - 1) };
            self.blocks.push(Block {
                rows: self.chunks[chunk].rows.clone(),
                start,
                chunks: chunk..chunk + 1,
            });
        }
        self.runs.push(BlockRun { blocks: first..self.blocks.len(), start, level });
    }

    /// Gives every end state that is needed its place.
    fn place_states(&mut self, list: &[ScanSegment], chunks: &[Range<usize>]) {
        let [forward, backward] = &mut self.slots;
        for (segment, own) in list.iter().zip(chunks) {
            // A segment without rows ends as an earlier one does, so that the end of that one may be wanted in its place.
            let is_end = |source: &StateSource| *source == StateSource::Chunk(own.end.wrapping_sub(1));
            let end = segment.end.or_else(|| self.ends.iter().position(is_end));
            let own = &mut self.chunks[own.clone()];
            let slot = match end {
                Some(end) => Some(StateSlot::End(end)),
                None if own.iter().any(|chunk| chunk.is_start) => {
                    *forward += 1;
                    Some(StateSlot::Scratch(*forward - 1))
                }
                None => None,
            };
            for chunk in own {
                chunk.forward_slot = slot.filter(|_| end.is_some() || chunk.is_start);
                if chunk.is_start {
                    chunk.backward_slot = Some(StateSlot::Scratch(*backward));
                    *backward += 1;
                }
            }
        }
    }
}

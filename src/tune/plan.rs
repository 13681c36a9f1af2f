//! How a run fits into a device's memory: rows that go through the model at a time, and layers whose tape is made
//! again in the backward pass.
//!
//! Recomputing a layer costs its forward pass again, which is nearly half of what the layer costs in all; a smaller
//! pass costs next to nothing while its rows still fill the device. So rows go first, down to as many as fill it,
//! then layers are recomputed, as few as fit, and then rows go down to a single sequence.

use crate::batch::{Example, common_head};
use crate::config::PromptKind;
use crate::device::{Shortage, free_memory};
use crate::model::TuningMemory;
use crate::prompt::PromptLayout;
use crate::{Error, Result};
use candle_core::Device;

/// How much goes through the model at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a pass, a single sequence at the least; the prefixes count if they are in the same pass.
    pub max_rows: usize,
    /// Layers from the first on of which only the input is saved: the backward pass runs them again.
    pub recompute: usize,
}

impl Limits {
    /// Passes of at most `max_rows` rows, of which the whole tape is kept.
    pub fn rows(max_rows: usize) -> Self {
        Self { max_rows, recompute: 0 }
    }

    /// What to try after a step of `rows` rows ran out of memory in a model of `layers` layers: half the rows, and half of the
    /// layers whose whole tape was kept. `None` after single sequences with all layers recomputed.
    pub fn less(self, rows: usize, layers: usize) -> Option<Self> {
        let (rows, most) = (self.max_rows.min(rows), layers.saturating_sub(1));
        let kept = most.saturating_sub(self.recompute);
        if rows <= 1 && kept == 0 {
            return None;
        }
        Some(Self { max_rows: (rows / 2).max(1), recompute: self.recompute + kept.div_ceil(2) })
    }
}

/// The largest optimizer step that a run can meet, in whatever order the examples come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestStep {
    /// What the prompt puts in front of sequences.
    pub kind: PromptKind,
    /// Virtual tokens.
    pub virtual_tokens: usize,
    /// Rows of the prefix: the virtual tokens if they are embeddings, and the tokens that all inputs begin with.
    pub prefix_rows: usize,
    /// Rows of all sequences of the step.
    pub sequence_rows: usize,
    /// Rows of the longest sequence.
    pub longest: usize,
    /// Sequences of the step.
    pub sequences: usize,
    /// Target rows of the step.
    pub targets: usize,
    /// Rows of a teacher's prefix, whose states are kept for the run; 0 without a teacher.
    pub teacher_rows: usize,
    /// Trainable values of a prompt's reparameterization, beside those of its rows.
    pub network_values: usize,
}

impl LargestStep {
    /// The largest step of a run over `train` with `examples` examples a step, after so many virtual tokens of `kind`.
    pub fn new(train: &[Example], kind: PromptKind, virtual_tokens: usize, examples: usize) -> Self {
        let head = common_head(train.iter().map(|e| e.input.as_slice())).len();
        let rows_of = |e: &Example| e.input.len() - head + e.target.len().saturating_sub(1);
        let mut rows: Vec<usize> = train.iter().map(rows_of).collect();
        let mut targets: Vec<usize> = train.iter().map(|e| e.target.len()).collect();
        let largest = |all: &mut Vec<usize>| {
            all.sort_unstable_by(|a, b| b.cmp(a));
            all.iter().take(examples).sum()
        };
        let rows_of_tokens = if kind == PromptKind::Embeddings { virtual_tokens } else { 0 };
        Self {
            kind,
            virtual_tokens,
            prefix_rows: rows_of_tokens + head,
            sequence_rows: largest(&mut rows),
            longest: rows.first().copied().unwrap_or(0),
            sequences: train.len().min(examples),
            targets: largest(&mut targets),
            teacher_rows: 0,
            network_values: 0,
        }
    }

    /// The step of two prompts of one kind together.
    pub fn and(self, other: Self) -> Self {
        Self {
            kind: self.kind,
            virtual_tokens: self.virtual_tokens + other.virtual_tokens,
            prefix_rows: self.prefix_rows + other.prefix_rows,
            sequence_rows: self.sequence_rows + other.sequence_rows,
            longest: self.longest.max(other.longest),
            sequences: self.sequences + other.sequences,
            targets: self.targets + other.targets,
            teacher_rows: self.teacher_rows + other.teacher_rows,
            network_values: self.network_values + other.network_values,
        }
    }

    /// The same step of a distillation whose teacher's prefix has so many rows.
    pub fn with_teacher(self, teacher_rows: usize) -> Self {
        Self { teacher_rows, ..self }
    }

    /// The same step of a prompt whose trainable values are those of `layout`.
    pub fn with_layout(self, layout: &PromptLayout) -> Self {
        let rows = layout.trainable_rows() * layout.width;
        Self { network_values: layout.values_shape().elem_count().saturating_sub(rows), ..self }
    }

    /// Rows of the step, prefix and sequences.
    pub fn rows(&self) -> usize {
        self.prefix_rows + self.sequence_rows
    }

    /// Rows of a split step's prefix pass at most.
    fn prefix_pass_rows(&self, memory: &TuningMemory, max_rows: usize) -> usize {
        match memory.prefix_pass_rows(max_rows) {
            wanted if wanted <= self.prefix_rows => self.prefix_rows,
            wanted => self.prefix_rows.max((wanted - 1 + self.longest).min(2 * wanted)),
        }
    }

    /// Bytes of tape and of workspace that are alive at once under `limits`: of the only pass, or of the prefix pass
    /// and the largest example pass.
    fn pass(&self, memory: &TuningMemory, limits: Limits) -> (usize, usize) {
        let Limits { max_rows, recompute } = limits;
        let workspace = |rows: usize| memory.workspace(rows, self.targets.min(rows), recompute);
        let tape = |rows: usize| memory.tape(rows, self.targets.min(rows), recompute);
        let given = self.given(memory) + self.teacher(memory);
        let is_one_pass = match self.kind {
            PromptKind::Embeddings => self.rows() <= max_rows || self.sequences <= 1,
            PromptKind::Prefix => self.prefix_rows == 0 && self.rows() <= max_rows,
        };
        if is_one_pass {
            return (tape(self.rows()), workspace(self.rows()) + given);
        }
        let prefix_pass = match self.kind {
            PromptKind::Embeddings => self.prefix_pass_rows(memory, max_rows),
            // Without a head the first of the example passes.
            PromptKind::Prefix if self.prefix_rows == 0 => self.sequence_rows.min(max_rows.max(self.longest)),
            PromptKind::Prefix => self.prefix_rows,
        };
        let largest = self.sequence_rows.min(max_rows.max(self.longest));
        let targets = self.targets.min(prefix_pass.saturating_sub(self.prefix_rows) + largest);
        let both = memory.tapes([prefix_pass, largest], targets, recompute)
            + memory.prefix_keys_values(self.prefix_rows, recompute)
            + memory.states_per_prefix;
        // While the prefix pass runs backwards, the tape of the example pass is gone.
        let backward = workspace(prefix_pass).saturating_sub(tape(largest));
        let split = self.prefix_rows * memory.split_per_row + memory.split_per_prefix;
        (both, workspace(largest).max(backward) + split + given)
    }

    /// Bytes of what passes read of a prompt that is keys and values: the prompt, the same with a head's, and the gradients of
    /// both.
    fn given(&self, memory: &TuningMemory) -> usize {
        match self.kind {
            PromptKind::Embeddings => 0,
            PromptKind::Prefix => self.virtual_tokens * (2 * memory.given_per_token + memory.split_per_row),
        }
    }

    /// Bytes of what a teacher adds: the states of its prefix, its hidden states of the target rows, and its logits. Its passes
    /// are forward alone, and each runs before the tape of the student's.
    fn teacher(&self, memory: &TuningMemory) -> usize {
        match self.teacher_rows {
            0 => 0,
            rows => {
                rows * memory.given_per_token
                    + memory.states_per_prefix
                    + self.targets * memory.input_per_row
                    + memory.head
            }
        }
    }

    /// Bytes of the prompt and its moments.
    fn prompt(&self, memory: &TuningMemory) -> usize {
        let per_token = match self.kind {
            PromptKind::Embeddings => memory.prompt_per_token,
            PromptKind::Prefix => memory.keys_values_per_token,
        };
        // Values and AdamW's two moments, f32.
        self.virtual_tokens * per_token + 3 * size_of::<f32>() * self.network_values
    }
}

/// What a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes; `None` if the system does not say what is free.
    pub bytes: Option<usize>,
    /// Whether the configuration says so, rather than the device.
    pub configured: bool,
    /// Whether the weights have to fit in it: they do unless they are on the device already, and it is what the
    /// device has free beside them.
    pub with_weights: bool,
}

impl Budget {
    /// What the configuration says, else what `device` has free; `loaded` says whether the weights are there yet.
    pub fn new(configured: Option<usize>, device: &Device, loaded: bool) -> Result<Self> {
        Ok(match configured {
            Some(bytes) => Self { bytes: Some(bytes), configured: true, with_weights: true },
            None => Self { bytes: free_memory(device)?, configured: false, with_weights: !loaded },
        })
    }
}

/// How many rows a pass may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRange {
    /// Rows that fill the device: before there are fewer, layers are recomputed.
    pub full: usize,
    /// Rows at most.
    pub most: usize,
}

/// What the backward pass reads of the layers' frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackwardWeights {
    /// What the forward pass reads; no product here gains by a second copy.
    Shared,
    /// A second copy, packed as transposes.
    Copied {
        /// Its bytes.
        bytes: usize,
        /// Whether it is in memory already.
        is_packed: bool,
    },
    /// What the forward pass reads, transposed again in each product: a second copy does not fit.
    TransposedEachTime,
}

impl BackwardWeights {
    /// Bytes of the second copy.
    pub fn bytes(self) -> usize {
        match self {
            Self::Copied { bytes, .. } => bytes,
            Self::Shared | Self::TransposedEachTime => 0,
        }
    }
}

/// How a run fits into the memory it may take; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What it may take.
    pub budget: Budget,
    /// Of the frozen weights.
    pub weights: usize,
    /// What the backward pass reads of them.
    pub backward_weights: BackwardWeights,
    /// Of the largest pass's tape.
    pub tape: usize,
    /// Of the backward pass, beside the tape.
    pub workspace: usize,
    /// Of the prompt and its moments.
    pub prompt: usize,
    /// Kept free: what the estimate does not count, and what the allocator loses.
    pub reserve: usize,
    /// Rows of a pass and layers that are recomputed.
    pub limits: Limits,
    /// Layers of the model.
    pub layers: usize,
}

impl MemoryPlan {
    /// The plan that costs the least time of those that fit into `budget`; the smallest if none does. A second copy of the
    /// weights saves less time a byte than the tape of a layer, so it gets what memory is left.
    pub fn new(memory: &TuningMemory, work: &LargestStep, budget: Budget, rows: RowRange) -> Self {
        let plan = Self::with_one_copy(memory, work, budget, rows);
        if plan.backward_weights != BackwardWeights::TransposedEachTime {
            return plan;
        }
        let backward_weights = BackwardWeights::Copied { bytes: memory.transposes, is_packed: false };
        Some(Self { backward_weights, ..plan }).filter(Self::fits).unwrap_or(plan)
    }

    /// As [`MemoryPlan::new`], but no copy of the weights is made.
    fn with_one_copy(memory: &TuningMemory, work: &LargestStep, budget: Budget, rows: RowRange) -> Self {
        let all = memory.most_recomputed();
        let plan = |max_rows: usize, recompute: usize| {
            Self::with_limits(memory, work, budget, Limits { max_rows: max_rows.max(1), recompute })
        };
        let most = rows.most.min(work.rows());
        let full = rows.full.min(most);
        let least = work.longest.min(full);
        largest(full, most, |rows| plan(rows, 0))
            .or_else(|| (0..=all).map(|recompute| plan(full, recompute)).find(Self::fits))
            .or_else(|| largest(least, full, |rows| plan(rows, all)))
            .unwrap_or_else(|| {
                // Splitting a batch costs room for the prefixes: one pass may be smaller.
                let (split, one) = (plan(least, all), plan(full, all));
                if split.missing() < one.missing() { split } else { one }
            })
    }

    fn with_limits(memory: &TuningMemory, work: &LargestStep, budget: Budget, limits: Limits) -> Self {
        let (tape, workspace) = work.pass(memory, limits);
        Self {
            budget,
            weights: memory.weights,
            backward_weights: match (memory.transposes, memory.has_transposes) {
                (0, _) => BackwardWeights::Shared,
                (_, false) => BackwardWeights::TransposedEachTime,
                (bytes, true) => BackwardWeights::Copied { bytes, is_packed: true },
            },
            tape,
            workspace,
            prompt: work.prompt(memory),
            reserve: memory.reserve(tape + workspace),
            limits,
            layers: memory.layers(),
        }
    }

    /// Bytes that have to fit into the budget.
    pub fn total(&self) -> usize {
        let weights = if self.budget.with_weights { self.weights } else { 0 };
        let copy = match self.backward_weights {
            BackwardWeights::Copied { is_packed: true, .. } if !self.budget.with_weights => 0,
            other => other.bytes(),
        };
        weights + copy + self.tape + self.workspace + self.prompt + self.reserve
    }

    /// Bytes beyond the budget; 0 if the plan fits.
    pub fn missing(&self) -> usize {
        self.budget.bytes.map_or(0, |bytes| self.total().saturating_sub(bytes))
    }

    fn fits(&self) -> bool {
        self.missing() == 0
    }
}

/// The plan of most rows from `least` to `most` that fits; more rows need more memory.
fn largest(least: usize, most: usize, plan_of: impl Fn(usize) -> MemoryPlan) -> Option<MemoryPlan> {
    let plan = plan_of(most);
    if plan.fits() {
        return Some(plan);
    }
    let (mut low, mut high) = (least, most);
    let mut best = Some(plan_of(low)).filter(MemoryPlan::fits)?;
    while high - low > 1 {
        let middle = low.midpoint(high);
        let plan = plan_of(middle);
        if plan.fits() {
            (low, best) = (middle, plan);
        } else {
            high = middle;
        }
    }
    Some(best)
}

/// Runs `step` under `limits`. If the memory of `device` does not suffice, it is retried with `less(limits)`; `on_retry` is
/// called before every retry. Returns the limits under which it succeeded.
///
/// # Errors
/// Returns [`Error::OutOfMemory`] if nothing less is left to try, and any other error of `step` or `on_retry`.
pub(crate) fn within_memory<T>(
    device: &Device,
    mut limits: Limits,
    less: impl Fn(Limits) -> Option<Limits>,
    mut step: impl FnMut(Limits) -> Result<T>,
    mut on_retry: impl FnMut(Limits) -> Result<()>,
) -> Result<(T, Limits)> {
    let mut shortage = Shortage::new(device);
    loop {
        let error = match step(limits) {
            Err(error) if shortage.caused(&error) => error,
            other => return Ok((other?, limits)),
        };
        let Some(next) = less(limits) else {
            return Err(Error::OutOfMemory { problem: error.to_string() });
        };
        limits = next;
        on_retry(limits)?;
    }
}

#[cfg(test)]
mod tests;

//! How a run fits into a device's memory: rows that go through the model at a time, and blocks whose tape is made
//! again in the backward pass.
//!
//! Recomputing a block costs its forward pass again, which is nearly half of what the block costs in all; a smaller
//! pass costs next to nothing while its rows still fill the device. So rows go first, down to as many as fill it,
//! then blocks are recomputed, as few as fit, and then rows go down to a single sequence.

use crate::data::Example;
use crate::data::pack::common_head;
use crate::model::TuningMemory;
use crate::{Error, Result};
use candle_core::Device;

/// How much goes through the model at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a pass, a single sequence at the least; the prefixes count where they are in the same pass.
    pub max_rows: usize,
    /// Blocks from the first on that keep their input alone and run again in the backward pass.
    pub recompute: usize,
}

impl Limits {
    /// Passes of at most `max_rows` rows, whose whole tape is kept.
    pub fn rows(max_rows: usize) -> Self {
        Self { max_rows, recompute: 0 }
    }

    /// What to try after a step of `rows` rows found too little memory in a model of `blocks` blocks: half the rows,
    /// and half of the blocks that were kept whole. `None` after single sequences with all blocks recomputed.
    pub fn less(self, rows: usize, blocks: usize) -> Option<Self> {
        let (rows, most) = (self.max_rows.min(rows), blocks.saturating_sub(1));
        let kept = most.saturating_sub(self.recompute);
        if rows <= 1 && kept == 0 {
            return None;
        }
        Some(Self { max_rows: (rows / 2).max(1), recompute: self.recompute + kept.div_ceil(2) })
    }
}

/// The largest optimizer step that a run can meet, in whatever order the examples come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Virtual tokens.
    pub virtual_tokens: usize,
    /// Rows of the prefix: the virtual tokens, and the tokens that all inputs begin with.
    pub prefix_rows: usize,
    /// Rows of all sequences of the step.
    pub sequence_rows: usize,
    /// Rows of the longest sequence.
    pub longest: usize,
    /// Sequences of the step.
    pub sequences: usize,
    /// Target rows of the step.
    pub targets: usize,
}

impl Work {
    /// Of a run over `train` with `examples` of them a step.
    pub fn of(train: &[Example], virtual_tokens: usize, examples: usize) -> Self {
        let head = common_head(train.iter().map(|e| e.input.as_slice())).len();
        let rows_of = |e: &Example| e.input.len() - head + e.target.len().saturating_sub(1);
        let mut rows: Vec<usize> = train.iter().map(rows_of).collect();
        let mut targets: Vec<usize> = train.iter().map(|e| e.target.len()).collect();
        let largest = |all: &mut Vec<usize>| {
            all.sort_unstable_by(|a, b| b.cmp(a));
            all.iter().take(examples).sum()
        };
        Self {
            virtual_tokens,
            prefix_rows: virtual_tokens + head,
            sequence_rows: largest(&mut rows),
            longest: rows.first().copied().unwrap_or(0),
            sequences: train.len().min(examples),
            targets: largest(&mut targets),
        }
    }

    /// Rows of the step, prefix and sequences.
    pub fn rows(&self) -> usize {
        self.prefix_rows + self.sequence_rows
    }

    /// Bytes of tape and of workspace that are alive at once under `limits`.
    fn pass(&self, memory: &TuningMemory, limits: Limits) -> (usize, usize) {
        let Limits { max_rows, recompute } = limits;
        let of = |rows: usize| {
            let targets = self.targets.min(rows);
            (memory.tape(rows, targets, recompute), memory.workspace(rows, targets, recompute))
        };
        if self.rows() <= max_rows || self.sequences <= 1 {
            return of(self.rows());
        }
        let (tape, workspace) = of(self.sequence_rows.min(max_rows.max(self.longest)));
        let prefix = memory.prefix_tape(self.prefix_rows, recompute);
        (tape + prefix, workspace + self.prefix_rows * memory.split_per_row)
    }
}

/// What a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes; `None` where the system does not say what is free.
    pub bytes: Option<usize>,
    /// Whether the configuration says so, rather than the device.
    pub configured: bool,
    /// Whether the weights have to fit in it: they do unless they are on the device already, and it is what the
    /// device has free beside them.
    pub with_weights: bool,
}

impl Budget {
    /// What the configuration says, else what `device` has free; `loaded` says whether the weights are there yet.
    ///
    /// # Errors
    /// The device's.
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
    /// Rows that fill the device: before there are fewer, blocks are recomputed.
    pub full: usize,
    /// Rows at most.
    pub most: usize,
}

/// How a run fits into the memory it may take; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What it may take.
    pub budget: Budget,
    /// Of the frozen weights.
    pub weights: usize,
    /// Of the largest pass's tape.
    pub tape: usize,
    /// Of the backward pass beside it.
    pub workspace: usize,
    /// Of the prompt and its moments.
    pub prompt: usize,
    /// Kept free: what the estimate does not count, and what the allocator loses.
    pub reserve: usize,
    /// Rows of a pass and blocks that are recomputed.
    pub limits: Limits,
    /// Blocks of the model.
    pub blocks: usize,
}

impl MemoryPlan {
    /// The plan that costs the least time of those that fit into `budget`; the smallest where none does.
    pub fn new(memory: &TuningMemory, work: &Work, budget: Budget, rows: RowRange) -> Self {
        let all = memory.most_recomputed();
        let at = |max_rows: usize, recompute: usize| {
            Self::at(memory, work, budget, Limits { max_rows: max_rows.max(1), recompute })
        };
        let most = rows.most.min(work.rows());
        let full = rows.full.min(most);
        let least = work.longest.min(full);
        largest(full, most, |rows| at(rows, 0))
            .or_else(|| (0..=all).map(|recompute| at(full, recompute)).find(Self::fits))
            .or_else(|| largest(least, full, |rows| at(rows, all)))
            .unwrap_or_else(|| {
                // Splitting a batch costs room for the prefixes: one pass may be smaller.
                let (split, one) = (at(least, all), at(full, all));
                if split.missing() < one.missing() { split } else { one }
            })
    }

    fn at(memory: &TuningMemory, work: &Work, budget: Budget, limits: Limits) -> Self {
        let (tape, workspace) = work.pass(memory, limits);
        Self {
            budget,
            weights: memory.weights,
            tape,
            workspace,
            prompt: work.virtual_tokens * memory.prompt_per_token,
            reserve: memory.reserve(tape + workspace),
            limits,
            blocks: memory.blocks,
        }
    }

    /// Bytes that have to fit into the budget.
    pub fn total(&self) -> usize {
        let weights = if self.budget.with_weights { self.weights } else { 0 };
        weights + self.tape + self.workspace + self.prompt + self.reserve
    }

    /// Bytes beyond the budget; 0 where the plan fits.
    pub fn missing(&self) -> usize {
        self.budget.bytes.map_or(0, |bytes| self.total().saturating_sub(bytes))
    }

    fn fits(&self) -> bool {
        self.missing() == 0
    }
}

/// The plan of most rows from `least` to `most` that fits, where more rows need more memory.
fn largest(least: usize, most: usize, at: impl Fn(usize) -> MemoryPlan) -> Option<MemoryPlan> {
    let plan = at(most);
    if plan.fits() {
        return Some(plan);
    }
    let (mut low, mut high) = (least, most);
    let mut found = Some(at(low)).filter(MemoryPlan::fits)?;
    while high - low > 1 {
        let middle = low.midpoint(high);
        let plan = at(middle);
        if plan.fits() {
            (low, found) = (middle, plan);
        } else {
            high = middle;
        }
    }
    Some(found)
}

/// Memory that `device` has free, bytes; `None` where the system does not say.
///
/// # Errors
/// The device's.
pub fn free_memory(device: &Device) -> Result<Option<usize>> {
    match device {
        Device::Cpu => Ok(std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in(&text))),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Some(crate::ops::gpu::cuda::memory(cuda)?.0)),
        #[cfg(feature = "metal")]
        Device::Metal(metal) => {
            let device = metal.metal_device();
            let advised = device.recommended_max_working_set_size();
            Ok(Some(advised.saturating_sub(device.current_allocated_size())))
        }
        #[allow(unreachable_patterns)]
        _ => Ok(None),
    }
}

/// `MemAvailable` of Linux's `/proc/meminfo`, bytes.
fn available_in(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib << 10)
}

/// Whether a device said that its memory is used up. candle passes on what the driver's library says, as text.
pub fn is_out_of_memory(error: &Error) -> bool {
    // In turn: CUDA's driver, cuBLAS, a Metal buffer that there was no room for, a Metal command that ran into it.
    const SIGNS: [&str; 4] = [
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "Failed to create metal resource: Buffer",
        "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    ];
    let Error::Candle(error) = error else { return false };
    let text = error.to_string();
    SIGNS.iter().any(|sign| text.contains(sign))
}

/// Runs `step` under `limits`; where the device's memory does not suffice, again under what `less` makes of them,
/// which `told` hears first. Gives back under which limits it worked.
///
/// # Errors
/// [`Error::OutOfMemory`] where nothing less is left to try; any other error of `step` or `told` as it is.
pub(super) fn within_memory<T>(
    mut limits: Limits,
    less: impl Fn(Limits) -> Option<Limits>,
    mut step: impl FnMut(Limits) -> Result<T>,
    mut told: impl FnMut(Limits) -> Result<()>,
) -> Result<(T, Limits)> {
    loop {
        let error = match step(limits) {
            Err(error) if is_out_of_memory(&error) => error,
            other => return Ok((other?, limits)),
        };
        let Some(next) = less(limits) else {
            return Err(Error::OutOfMemory { problem: error.to_string() });
        };
        limits = next;
        told(limits)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dtypes;
    use crate::model::memory::granite_8b;
    use candle_core::{DType, DeviceLocation};

    const GIB: usize = 1 << 30;

    fn memory() -> TuningMemory {
        let dtypes = Dtypes { weights: DType::BF16, activations: DType::BF16 };
        TuningMemory::of(&granite_8b(), dtypes, DeviceLocation::Cuda { gpu_id: 0 })
    }

    /// The tutorial's step at accumulation 16: 128 reviews of 40 rows behind 100 virtual tokens.
    const WORK: Work = Work {
        virtual_tokens: 100,
        prefix_rows: 108,
        sequence_rows: 128 * 40,
        longest: 90,
        sequences: 128,
        targets: 256,
    };

    fn budget(bytes: usize) -> Budget {
        Budget { bytes: Some(bytes), configured: true, with_weights: true }
    }

    fn plan(gib: f64, full: usize, most: usize) -> MemoryPlan {
        MemoryPlan::new(&memory(), &WORK, budget((gib * GIB as f64) as usize), RowRange { full, most })
    }

    #[test]
    fn an_8b_model_tunes_in_24_gib_at_2048_rows() {
        let plan = plan(24.0, 2048, 2048);
        assert_eq!(plan.missing(), 0);
        assert_eq!(plan.limits.max_rows, 2048);
        let recompute = plan.limits.recompute;
        assert!((1..20).contains(&recompute), "{recompute} blocks are recomputed");
        let sum = plan.weights + plan.tape + plan.workspace + plan.prompt + plan.reserve;
        assert!(sum == plan.total() && sum <= 24 * GIB);
        assert!(plan.weights > 16 * 1_000_000_000 && plan.reserve > GIB);
        // One block less does not fit.
        let one_less = Limits { recompute: recompute - 1, ..plan.limits };
        assert!(MemoryPlan::at(&memory(), &WORK, plan.budget, one_less).missing() > 0);
    }

    #[test]
    fn rows_go_before_blocks_and_again_behind_them() {
        let limits = |gib| plan(gib, 2048, 8192).limits;
        assert_eq!(limits(80.0), Limits { max_rows: WORK.rows(), recompute: 0 });
        // Room for some rows more than fill the device.
        let fewer = limits(30.0);
        assert!((2048..WORK.rows()).contains(&fewer.max_rows) && fewer.recompute == 0, "{fewer:?}");
        let recomputed = limits(24.0);
        assert!(recomputed.max_rows == 2048 && recomputed.recompute > 0, "{recomputed:?}");
        let small = limits(18.0);
        assert!((90..2048).contains(&small.max_rows) && small.recompute == 39, "{small:?}");
        let plan = plan(18.0, 2048, 8192);
        assert_eq!(plan.missing(), 0);
        let more = Limits { max_rows: small.max_rows + 1, ..small };
        assert!(MemoryPlan::at(&memory(), &WORK, plan.budget, more).missing() > 0);
        // Rows that are asked for stay: blocks are recomputed for them.
        let asked = self::plan(30.0, 8192, 8192).limits;
        assert!(asked.max_rows == WORK.rows() && asked.recompute > 0, "{asked:?}");
    }

    #[test]
    fn what_does_not_fit_gets_the_smallest_plan() {
        let plan = plan(16.0, 2048, 8192);
        assert_eq!(plan.limits, Limits { max_rows: 90, recompute: 39 });
        assert_eq!(plan.missing(), plan.total() - 16 * GIB);
    }

    #[test]
    fn an_unknown_budget_limits_nothing_and_loaded_weights_do_not_count() {
        let rows = RowRange { full: 512, most: 512 };
        let unknown = Budget { bytes: None, configured: false, with_weights: false };
        let plan = MemoryPlan::new(&memory(), &WORK, unknown, rows);
        assert_eq!((plan.limits, plan.missing()), (Limits::rows(512), 0));
        assert_eq!(plan.total(), plan.tape + plan.workspace + plan.prompt + plan.reserve);
        let loaded = Budget { bytes: Some(4 * GIB), ..unknown };
        assert_eq!(MemoryPlan::new(&memory(), &WORK, loaded, rows).limits, Limits::rows(512));
    }

    /// All example orders are held against the bound: the largest step is that of the longest examples.
    #[test]
    fn the_largest_step_is_counted() {
        let example = |input: usize, target: usize| Example {
            input: [vec![7, 8], vec![input as u32; input - 2]].concat(),
            target: vec![1; target],
            line: 0,
        };
        let train = [example(5, 1), example(9, 2), example(3, 4), example(6, 1)];
        let work = Work::of(&train, 10, 2);
        let expected = Work {
            virtual_tokens: 10,
            prefix_rows: 12,
            sequence_rows: 8 + 4,
            longest: 8,
            sequences: 2,
            targets: 6,
        };
        assert_eq!((work, work.rows()), (expected, 24));
        assert_eq!(Work::of(&train, 10, 100).sequences, 4);
    }

    #[test]
    fn a_split_batch_holds_the_prefixes_beside_a_pass() {
        let memory = memory();
        let whole = WORK.pass(&memory, Limits { max_rows: WORK.rows(), recompute: 3 });
        let rows = WORK.rows();
        assert_eq!(whole, (memory.tape(rows, 256, 3), memory.workspace(rows, 256, 3)));
        let split = WORK.pass(&memory, Limits { max_rows: 1000, recompute: 3 });
        assert_eq!(split.0, memory.tape(1000, 256, 3) + memory.prefix_tape(108, 3));
        assert_eq!(split.1, memory.workspace(1000, 256, 3) + 108 * memory.split_per_row);
        // A sequence is never cut.
        let tiny = |max_rows| WORK.pass(&memory, Limits { max_rows, recompute: 3 });
        assert_eq!(tiny(1), tiny(90));
        // A single sequence never makes two passes.
        let one = Work { sequences: 1, sequence_rows: 90, ..WORK };
        assert_eq!(one.pass(&memory, Limits::rows(1)), one.pass(&memory, Limits::rows(1000)));
    }

    #[test]
    fn less_ends_at_single_sequences_with_all_recomputed() {
        assert_eq!(Limits::rows(usize::MAX).less(1000, 40), Some(Limits { max_rows: 500, recompute: 20 }));
        let (mut limits, mut tries) = (Limits::rows(8192), 0);
        while let Some(less) = limits.less(3000, 40) {
            assert!(less.max_rows <= limits.max_rows && less.recompute >= limits.recompute && less != limits);
            (limits, tries) = (less, tries + 1);
        }
        assert_eq!((limits, tries), (Limits { max_rows: 1, recompute: 39 }, 11));
        assert_eq!(Limits::rows(1).less(1, 1), None);
    }

    fn candle(text: &str) -> Error {
        Error::Candle(candle_core::Error::Msg(text.into()))
    }

    #[test]
    fn out_of_memory_is_known_by_its_text() {
        let cuda =
            candle_core::Error::Cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        assert!(is_out_of_memory(&Error::Candle(cuda.bt())));
        assert!(is_out_of_memory(&candle("CublasError(CUBLAS_STATUS_ALLOC_FAILED)")));
        assert!(is_out_of_memory(&candle("Metal error Failed to create metal resource: Buffer")));
        let insufficient = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)";
        assert!(is_out_of_memory(&candle(insufficient)));
        assert!(!is_out_of_memory(&candle("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"...\")")));
        assert!(!is_out_of_memory(&Error::Invalid("CUDA_ERROR_OUT_OF_MEMORY".into())));
    }

    #[test]
    fn a_step_is_tried_again_under_less() {
        let (mut tried, mut heard) = (Vec::new(), Vec::new());
        let found = within_memory(
            Limits::rows(800),
            |limits| limits.less(1000, 5),
            |limits| {
                tried.push(limits);
                let fits = limits.max_rows <= 200 && limits.recompute >= 3;
                if fits { Ok(limits.max_rows) } else { Err(candle("CUDA_ERROR_OUT_OF_MEMORY")) }
            },
            |limits| {
                heard.push(limits);
                Ok(())
            },
        );
        let steps =
            [(800, 0), (400, 2), (200, 3)].map(|(max_rows, recompute)| Limits { max_rows, recompute });
        assert_eq!(found.unwrap(), (200, steps[2]));
        assert_eq!((&tried[..], &heard[..]), (&steps[..], &steps[1..]));
    }

    #[test]
    fn a_step_that_never_fits_is_an_error_with_a_hint() {
        let (limits, mut last) = (Limits::rows(64), Limits::rows(64));
        let less = |limits: Limits| limits.less(64, 3);
        let always = |_| Err::<(), _>(candle("CUDA_ERROR_OUT_OF_MEMORY"));
        let told = |limits| {
            last = limits;
            Ok(())
        };
        let error = within_memory(limits, less, always, told).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }) && !error.is_bad_input());
        let text = error.to_string();
        for part in ["CUDA_ERROR_OUT_OF_MEMORY", "single sequence", "max_input_tokens", "model.dtype"] {
            assert!(text.contains(part), "expected {part:?} in {text}");
        }
        assert_eq!(last, Limits { max_rows: 1, recompute: 2 });

        let mut calls = 0;
        let other = |_| {
            calls += 1;
            Err::<(), _>(candle("CUDA_ERROR_ILLEGAL_ADDRESS"))
        };
        let error = within_memory(limits, less, other, |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::Candle(_)) && calls == 1);
        // Whoever hears of it may end the run.
        let error =
            within_memory(limits, less, always, |_| Err(Error::Invalid("enough".into()))).unwrap_err();
        assert_eq!(error.to_string(), "enough");
    }

    #[test]
    fn free_memory_is_what_linux_calls_available() {
        let text = "MemTotal:       24684084 kB\nMemFree:        21530104 kB\nMemAvailable:   22622332 kB\n";
        assert_eq!(available_in(text), Some(22_622_332 * 1024));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free_memory(&Device::Cpu).unwrap().unwrap() > 1_000_000);
        }
    }
}

//! How a tuning run fits into a device's memory.

use super::{BackwardWeights, Budget, LargestStep, MemoryPlan, PromptRun, RowRange, TeacherExamples};
use crate::batch::Example;
use crate::config::TrainOptions;
use crate::device::Shortage;
use crate::model::{Decoder, Dtypes, GPU_FULL_ROWS, TuningMemory};
use crate::ops::gpu;
use crate::prompt::Prompt;
use crate::{Error, Result};
use candle_core::Device;

/// Rows of a pass on the CPU if the configuration names none. SmolLM2-135M in f32 keeps 0.7 MB of tape a
/// row; with this budget a step over 128 examples peaked at 1.05 GB, weights included, at 10.1 examples/s on 2
/// cores of a Zen 4 (LOG.md, 2026-11-22).
const CPU_MAX_ROWS: usize = 512;

/// Rows of a pass on a GPU if the configuration names none.
const GPU_MAX_ROWS: usize = 8192;

/// Rows of a pass of a tuning step on a GPU at most, if the configuration names none and the memory suffices: a
/// quarter more. [`GPU_MAX_ROWS`] is no limit of the hardware, and a step that has a few rows more is faster in one pass
/// than in two, each of which reads all weights.
const GPU_MOST_ROWS: usize = GPU_MAX_ROWS + GPU_MAX_ROWS / 4;

/// Rows of a pass: what the configuration says, else what suits the device.
pub fn max_rows(configured: usize, device: &Device) -> usize {
    match configured {
        0 if device.is_cpu() => CPU_MAX_ROWS,
        0 => GPU_MAX_ROWS,
        rows => rows,
    }
}

/// How a run fits into the memory of `device`; `loaded` says whether the weights are there yet.
pub fn plan(
    options: &TrainOptions,
    memory: &TuningMemory,
    work: &LargestStep,
    device: &Device,
    loaded: bool,
) -> Result<MemoryPlan> {
    let budget = Budget::new(options.memory_budget.bytes, device, loaded)?;
    Ok(MemoryPlan::new(memory, work, budget, row_range(options.max_rows, device.is_cpu())))
}

/// Rows of a pass of a tuning step: what the configuration says is the limit of every pass.
fn row_range(configured: usize, on_cpu: bool) -> RowRange {
    match configured {
        0 if on_cpu => RowRange { full: CPU_MAX_ROWS, most: CPU_MAX_ROWS },
        0 => RowRange { full: GPU_FULL_ROWS, most: GPU_MOST_ROWS },
        rows => RowRange { full: rows, most: rows },
    }
}

/// As [`plan`], for a run of `prompt` over `train`, towards a teacher if there is one, in a model that is on its device. A second copy of the model's
/// weights is made if the plan says so; what does not tune makes none.
pub fn plan_run(
    options: &TrainOptions,
    model: &Decoder,
    train: &[Example],
    prompt: &Prompt,
    teacher: Option<TeacherExamples>,
) -> Result<MemoryPlan> {
    if !model.device().is_cpu() && options.memory_budget.bytes.is_none() {
        warm_up(model, train, prompt)?;
    }
    let dtypes = Dtypes { weights: model.embedding().dtype(), activations: model.dtype() };
    let mut memory = TuningMemory::new(model.config(), dtypes, model.device().location());
    memory.has_transposes = memory.transposes > 0 && model.has_transposes();
    let teacher_rows = teacher.map_or(0, |examples| examples.head().len());
    let work = step_of(options, train, prompt).with_teacher(teacher_rows);
    let plan = plan(options, &memory, &work, model.device(), true)?;
    copy_weights(model, &plan);
    Ok(plan)
}

/// How the steps of `runs` together fit into memory, under the options of the first.
///
/// # Errors
/// Returns an error if there are no runs, or if the device does not say what is free.
pub fn plan_pack(model: &Decoder, runs: &[PromptRun]) -> Result<MemoryPlan> {
    let Some(first) = runs.first() else {
        return Err(Error::Invalid("tune: expected at least one prompt, found none".into()));
    };
    let dtypes = Dtypes { weights: model.embedding().dtype(), activations: model.dtype() };
    let mut memory = TuningMemory::new(model.config(), dtypes, model.device().location());
    memory.has_transposes = memory.transposes > 0 && model.has_transposes();
    let work = runs.iter().map(largest_step).reduce(LargestStep::and).unwrap_or(largest_step(first));
    plan(first.options(), &memory, &work, model.device(), true)
}

/// How many of the largest of the steps `works` go through the model in one pass whose whole tape fits into memory; 1 at
/// least.
///
/// # Errors
/// Returns an error if the device does not say what is free.
pub fn prompts_in_a_pass(
    model: &Decoder,
    options: &TrainOptions,
    mut works: Vec<LargestStep>,
) -> Result<usize> {
    works.sort_by_key(|work| std::cmp::Reverse(work.rows()));
    let dtypes = Dtypes { weights: model.embedding().dtype(), activations: model.dtype() };
    let memory = TuningMemory::new(model.config(), dtypes, model.device().location());
    let budget = Budget::new(options.memory_budget.bytes, model.device(), true)?;
    let rows = row_range(options.max_rows, model.device().is_cpu());
    let fits = |prompts: &usize| {
        let work = works[..*prompts].iter().copied().reduce(LargestStep::and);
        work.is_some_and(|work| {
            let plan = MemoryPlan::new(&memory, &work, budget, rows);
            plan.missing() == 0 && plan.limits.recompute == 0 && plan.limits.max_rows >= work.rows()
        })
    };
    Ok((1..=works.len()).rev().find(fits).unwrap_or(1))
}

/// The largest step that `run` can meet.
pub fn largest_step(run: &PromptRun) -> LargestStep {
    step_of(run.options(), run.examples().train, run.prompt())
}

/// The largest step of a run, without a teacher.
fn step_of(options: &TrainOptions, train: &[Example], prompt: &Prompt) -> LargestStep {
    let examples = options.batch_size * options.accumulate_steps;
    LargestStep::new(train, prompt.kind(), prompt.num_virtual_tokens(), examples).with_layout(prompt.layout())
}

/// Makes the second copy of the weights that a plan has room for.
fn copy_weights(model: &Decoder, plan: &MemoryPlan) {
    if let BackwardWeights::Copied { is_packed: false, .. } = plan.backward_weights {
        model.pack_transposes();
    }
}

/// Takes one example through the model and back, so that kernels, cuBLAS's own among them, are loaded before anybody asks how
/// much memory is free. A device that has no memory for the example is left to the plan.
///
/// # Errors
/// Returns an error if a device operation fails for another reason than too little memory.
fn warm_up(model: &Decoder, train: &[Example], prompt: &Prompt) -> Result<()> {
    let rows = |example: &&Example| example.input.len() + example.target.len();
    let Some(example) = train.iter().min_by_key(rows) else { return Ok(()) };
    let prompts = prompt.prefix()?.to_dtype(model.prompt_dtype())?;
    let prompts = prompts.with_values(gpu::to_device(prompts.values(), model.device())?);
    let group = prompts.group([example])?;
    match super::gradient(model, &prompts, &[group], super::Limits::rows(usize::MAX))
        .and_then(|found| found.loss())
    {
        Err(error) if Shortage::new(model.device()).caused(&error) => Ok(()),
        outcome => outcome.map(drop),
    }
}

#[cfg(test)]
mod tests;

//! Measures one case: a run of the real trainer, timed from outside.

use super::MatmulPeak;
use super::canary::{Canary, Reading, Selection};
use super::examples::{self, Lengths};
use super::measured::{Figures, Measured, OpShare, Profile, StepContent, Timed};
use crate::batch::{Example, Passes, PrefixGroup};
use crate::config::{Keep, PromptKind, Schedule, TrainOptions};
use crate::device::PeakMemory;
use crate::model::{Decoder, Flops};
use crate::ops::profile;
use crate::prompt::{Prefix, Prompt};
use crate::tune::{Limits, Observer, PromptRun, RunExamples, StepRecord, Trainer, plan_pack};
use crate::{Error, Result};
use candle_core::{DType, Device};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::time::Instant;

/// Optimizer steps with different examples; after them they repeat. With four, no step finds its own rows in a cache.
const MADE_STEPS: usize = 4;

/// Seed of the prompt's first rows.
const SEED: u64 = 42;

/// The source of the examples.
pub enum ExampleSource {
    /// Generated from random tokens.
    Made(Lengths),
    /// These examples, in their order.
    Given(Vec<Example>),
}

/// The common settings of all cases.
pub struct Bench<'a> {
    /// The frozen model.
    pub model: &'a Decoder,
    /// The examples.
    pub source: ExampleSource,
    /// Most rows in one pass through the model; 0 for the number that suits the device and its memory.
    pub max_rows: usize,
    /// Number of counted optimizer steps.
    pub steps: usize,
    /// Number of warm-up steps.
    pub warmup: usize,
    /// The peak rate to which the useful floating-point operations are compared.
    pub peak: MatmulPeak,
    /// Tells quiet steps from disturbed ones on a CPU; `None` counts all steps, as on a GPU, where a CPU's rate says
    /// little.
    pub canary: Option<&'a Canary>,
}

/// The settings of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Case {
    /// Examples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub accumulate_steps: usize,
    /// What the prompt puts in front of examples.
    pub prompt_kind: PromptKind,
    /// Rows of the prompt.
    pub num_virtual_tokens: usize,
    /// Prompts that are tuned in one step, each with so many examples.
    pub prompts: usize,
}

impl Case {
    /// Examples of an optimizer step of one prompt.
    pub fn examples(&self) -> usize {
        self.batch_size * self.accumulate_steps
    }

    /// The same with one prompt in a step.
    pub fn alone(self) -> Self {
        Self { prompts: 1, ..self }
    }
}

impl Bench<'_> {
    /// Measures `case` in a run of its own, with the device idle at the end of every step.
    ///
    /// # Errors
    /// Returns an error if the case has more positions than the model, or if the run fails.
    pub fn measure(&self, case: Case, memory: &mut dyn PeakMemory) -> Result<Measured> {
        let examples = self.examples(case);
        memory.forget();
        let limits = self.limits(case, &examples)?;
        let ran = self.run(case, &examples, self.warmup + self.steps, &mut |_| memory.step())?;
        let peak_memory_bytes = memory.peak();
        let contents = self.contents(case, &examples);
        let steps = &ran.steps;
        let counted: Vec<(&Timed, &StepContent)> =
            steps.iter().zip(contents.iter().cycle()).skip(self.warmup).collect();
        let (selection, canary) = match self.canary {
            Some(canary) => {
                let (readings, seconds) = ran.steps_from(self.warmup);
                (canary.select(readings, &seconds), canary.seen(readings, &seconds))
            }
            None => (Selection { used: vec![true; counted.len()], disturbed: 0 }, None),
        };
        let figures = Figures::new(&counted, &selection, case.prompts * case.examples());
        let share_of = |most: f64| figures.flops_per_second / most;
        Ok(Measured {
            case,
            figures,
            share_of_peak: share_of(self.peak.flops_per_second),
            share_of_data_sheet: self.peak.data_sheet_flops_per_second.map(share_of),
            disturbed_steps: self.canary.map(|_| selection.disturbed),
            used_steps: selection.used.iter().filter(|used| **used).count(),
            canary,
            peak_memory_bytes,
            max_rows: limits.max_rows,
            recompute: limits.recompute,
            first_loss: steps[0].loss,
            last_loss: steps[steps.len() - 1].loss,
        })
    }

    /// Time per op over `steps` steps after one warm-up step, the longest first and the time outside of all ops last.
    /// Except on CUDA, the device is idle at the beginning and end of every op, so the step is slower than a measured
    /// one.
    ///
    /// # Errors
    /// Returns the errors of [`Bench::measure`].
    pub fn profile(&self, case: Case, steps: usize) -> Result<Profile> {
        let examples = self.examples(case);
        let outcome = self.run(case, &examples, 1 + steps, &mut |step| {
            if step == 1 {
                profile::start();
            }
        });
        let times = profile::finish();
        let (ran, times) = (outcome?, times?);
        let (readings, seconds) = ran.steps_from(1);
        let total: f64 = seconds.iter().sum();
        let share = |op: &str, seconds: f64, calls: u64| OpShare {
            op: op.to_owned(),
            seconds_per_step: seconds / steps as f64,
            calls_per_step: calls as f64 / steps as f64,
            share: seconds / total,
        };
        let inside: f64 = times.iter().map(|time| time.seconds).sum();
        let mut ops: Vec<_> = times.iter().map(|time| share(time.op, time.seconds, time.calls)).collect();
        ops.push(share("outside of ops", total - inside, 0));
        let disturbed_steps = self.canary.map(|canary| canary.select(readings, &seconds).disturbed);
        Ok(Profile { ops, disturbed_steps })
    }

    fn examples(&self, case: Case) -> Vec<Example> {
        match &self.source {
            ExampleSource::Made(lengths) => {
                lengths.examples(MADE_STEPS * case.examples(), self.model.config().vocab_size)
            }
            ExampleSource::Given(examples) => examples::whole_steps(examples, case.examples()),
        }
    }

    fn contents(&self, case: Case, examples: &[Example]) -> Vec<StepContent> {
        let of = |chunk: &[Example]| {
            let virtual_tokens = case.num_virtual_tokens as u32;
            let group =
                |prompt: u32| PrefixGroup::new(prompt * virtual_tokens..(prompt + 1) * virtual_tokens, chunk);
            let groups: Vec<PrefixGroup> = (0..case.prompts as u32).map(group).collect();
            let passes = match case.prompt_kind {
                PromptKind::Embeddings => Passes::new(&groups, usize::MAX),
                PromptKind::Prefix => Passes::after_given(&groups, usize::MAX, None),
            };
            StepContent {
                tokens: case.prompts * chunk.iter().map(|e| e.input.len() + e.target.len()).sum::<usize>(),
                flops: Flops::of_step(self.model.config(), &passes).total(),
            }
        };
        examples.chunks(case.examples()).map(of).collect()
    }

    /// Runs the trainer for `steps` steps over the examples in their order; `after` is called at the end of each step.
    /// The canary runs between the steps, outside of their times.
    fn run(
        &self,
        case: Case,
        examples: &[Example],
        steps: usize,
        after: &mut dyn FnMut(usize),
    ) -> Result<Ran> {
        self.check_positions(case, examples)?;
        let options = TrainOptions {
            batch_size: case.batch_size,
            accumulate_steps: case.accumulate_steps,
            max_steps: steps,
            shuffle: false,
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            keep: Keep::Last,
            ..TrainOptions::default()
        };
        let runs = self.prompt_runs(case, examples, &options)?;
        let mut trainer = Trainer::with_runs(self.model, self.limits(case, examples)?, runs)?;
        let device = self.model.device();
        device.synchronize()?;
        let readings = self.canary.iter().map(|canary| canary.read()).collect();
        let ran = Ran { steps: Vec::with_capacity(steps), readings };
        let mut clock = StepClock { device, after, canary: self.canary, last: Instant::now(), ran };
        // A step ends when the observer of its last run is called.
        let mut others: Vec<NoClock> = (1..case.prompts).map(|_| NoClock).collect();
        let others = others.iter_mut().map(|other| other as &mut dyn Observer);
        let mut observers: Vec<&mut dyn Observer> = others.collect();
        observers.push(&mut clock);
        trainer.run_all(&mut observers)?.into_iter().try_for_each(|outcome| outcome.map(drop))?;
        Ok(clock.ran)
    }

    /// A run of each prompt of `case`, all over the same examples.
    fn prompt_runs<'e>(
        &self,
        case: Case,
        examples: &'e [Example],
        options: &'e TrainOptions,
    ) -> Result<Vec<PromptRun<'e>>> {
        let prompt = self.prompt(case)?;
        let run = |_| {
            let examples = RunExamples { train: examples, validation: &[], teacher: None };
            PromptRun::new(self.model, examples, options, &prompt)
        };
        (0..case.prompts).map(run).collect()
    }

    fn check_positions(&self, case: Case, examples: &[Example]) -> Result<()> {
        let longest = examples.iter().map(|e| e.input.len() + e.target.len()).max().unwrap_or(0);
        let (found, limit) = (case.num_virtual_tokens + longest, self.model.config().max_position_embeddings);
        if found <= limit {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "expected at most {limit} positions, the model's max_position_embeddings, found {found}: {} \
             virtual tokens and {longest} tokens of the longest example",
            case.num_virtual_tokens
        )))
    }

    /// The limits under which the case's steps fit into the device's memory.
    fn limits(&self, case: Case, examples: &[Example]) -> Result<Limits> {
        let options = TrainOptions {
            batch_size: case.batch_size,
            accumulate_steps: case.accumulate_steps,
            max_rows: self.max_rows,
            ..TrainOptions::default()
        };
        if case.prompts > 1 {
            return Ok(plan_pack(self.model, &self.prompt_runs(case, examples, &options)?)?.limits);
        }
        Ok(crate::tune::plan_run(&options, self.model, examples, &self.prompt(case)?, None)?.limits)
    }

    /// Embeddings of random tokens, or their keys and values: the values of a prompt do not change the cost of a step.
    fn prompt(&self, case: Case) -> Result<Prompt> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let vocab_size = self.model.config().vocab_size as u32;
        let ids: Vec<u32> = (0..case.num_virtual_tokens).map(|_| rng.random_range(0..vocab_size)).collect();
        let ids = crate::ops::gpu::upload(&ids, self.model.device())?;
        let embeddings = self.model.embedding().index_select(&ids, 0)?.to_dtype(DType::F32)?;
        Prompt::new(&match case.prompt_kind {
            PromptKind::Embeddings => Prefix::Embeddings(embeddings),
            PromptKind::Prefix => Prefix::KeysValues(self.model.keys_values(&embeddings)?),
        })
    }
}

/// The steps of a run.
struct Ran {
    steps: Vec<Timed>,
    /// One reading before the first step and one after each step; empty without a canary.
    readings: Vec<Reading>,
}

impl Ran {
    /// The readings around the steps from `first` on, and the times of these steps.
    fn steps_from(&self, first: usize) -> (&[Reading], Vec<f64>) {
        let seconds = self.steps[first..].iter().map(|step| step.seconds).collect();
        (self.readings.get(first..).unwrap_or_default(), seconds)
    }
}

/// Measures the times.
struct StepClock<'a> {
    device: &'a Device,
    after: &'a mut dyn FnMut(usize),
    canary: Option<&'a Canary>,
    last: Instant,
    ran: Ran,
}

impl Observer for StepClock<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.device.synchronize()?;
        let seconds = self.last.elapsed().as_secs_f64();
        self.ran.steps.push(Timed { seconds, rows: record.rows, loss: record.loss });
        (self.after)(self.ran.steps.len());
        self.ran.readings.extend(self.canary.map(Canary::read));
        self.last = Instant::now();
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        NoClock.skipped(step, what, value)
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        NoClock.out_of_memory(limits)
    }
}

/// The observer of a run whose steps end with those of another one.
struct NoClock;

impl Observer for NoClock {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        unreachable!("step {step}: {what} is {value}, which ends a run by default")
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        let problem =
            format!("a step did not fit into what was planned; {} rows a pass may", limits.max_rows);
        Err(Error::OutOfMemory { problem })
    }
}

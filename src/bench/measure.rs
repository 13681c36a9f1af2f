//! One case measured: a run of the real trainer, timed from outside.

use super::examples::{self, Lengths};
use super::{Flops, MatmulPeak, PeakMemory};
use crate::config::{Keep, Schedule, TrainOptions};
use crate::data::{Example, PrefixGroup};
use crate::model::Granite;
use crate::ops::profile;
use crate::setup;
use crate::tune::{EpochRecord, Limits, Observer, StepRecord, Task, Trainer};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::time::Instant;

/// Optimizer steps whose examples are made; after them they come again. Four, so that no step finds its own
/// rows in a cache.
const MADE_STEPS: usize = 4;

/// Seed of the prompt's first rows.
const SEED: u64 = 42;

/// Where the examples come from.
pub enum Source {
    /// Made of random tokens.
    Made(Lengths),
    /// These, in their order.
    Given(Vec<Example>),
}

/// What all cases share.
pub struct Bench<'a> {
    /// The frozen model.
    pub model: &'a Granite,
    /// The examples.
    pub source: Source,
    /// Rows that go through the model at a time; 0 for as many as suit the device and its memory.
    pub max_rows: usize,
    /// Optimizer steps that count.
    pub steps: usize,
    /// Optimizer steps before them.
    pub warmup: usize,
    /// What the useful floating-point operations are held against.
    pub peak: MatmulPeak,
}

/// What differs from case to case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Case {
    /// Examples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub accumulate_steps: usize,
    /// Rows of the prompt.
    pub num_virtual_tokens: usize,
}

/// Median with the 10th and 90th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 90th percentile.
    pub p90: f64,
}

/// What a case came to. Rates are medians over the steps; tokens are the examples' own, without the prompt's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// The case.
    #[serde(flatten)]
    pub case: Case,
    /// Wall time of an optimizer step, s.
    pub step_seconds: Spread,
    /// Examples a second.
    pub examples_per_second: Spread,
    /// Tokens of inputs and targets a second.
    pub tokens_per_second: f64,
    /// Packed rows a second, prompt and template once a step.
    pub rows_per_second: f64,
    /// Tokens of inputs and targets of a step, mean.
    pub tokens_per_step: f64,
    /// Packed rows of a step, mean.
    pub rows_per_step: f64,
    /// Useful floating-point operations of a step, mean ([`Flops`]).
    pub flops_per_step: f64,
    /// Useful floating-point operations a second.
    pub flops_per_second: f64,
    /// That, as a part of the device's [`MatmulPeak`], which a GPU sustains.
    pub share_of_peak: f64,
    /// As a part of what the card's data sheet says; `None` of devices whose data sheet is not known.
    pub share_of_data_sheet: Option<f64>,
    /// The most memory that was held, bytes.
    pub peak_memory_bytes: Option<u64>,
    /// Rows of a pass at most.
    pub max_rows: usize,
    /// Blocks that are computed again in the backward pass.
    pub recompute: usize,
    /// Loss of the first step, nats a target token.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
}

/// Time of one op in a profiled step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpShare {
    /// The op's name; `outside of ops` is what no op counted.
    pub op: String,
    /// Time a step, s: the device's on CUDA, wall time elsewhere.
    pub seconds_per_step: f64,
    /// Calls a step.
    pub calls_per_step: f64,
    /// Part of the profiled step.
    pub share: f64,
}

impl Case {
    /// Examples of an optimizer step.
    pub fn examples(&self) -> usize {
        self.batch_size * self.accumulate_steps
    }
}

impl Spread {
    /// Of at least one value; percentiles between two values are interpolated.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Self { median: at(0.5), p10: at(0.1), p90: at(0.9) }
    }
}

/// What a step consists of, whenever it comes.
struct Content {
    tokens: usize,
    flops: f64,
}

/// A counted step.
struct Timed {
    seconds: f64,
    rows: usize,
    loss: f64,
}

impl Bench<'_> {
    /// Measures `case`: its time in a run of its own, with the device idle at the end of every step.
    ///
    /// # Errors
    /// More positions than the model has; those of the run.
    pub fn measure(&self, case: Case, memory: &mut dyn PeakMemory) -> Result<Measured> {
        let examples = self.examples(case);
        memory.forget();
        let limits = self.limits(case, &examples)?;
        let steps = self.run(case, &examples, self.warmup + self.steps, &mut |_| memory.step())?;
        let peak_memory_bytes = memory.peak();
        let contents = self.contents(case, &examples);
        let counted: Vec<(&Timed, &Content)> =
            steps.iter().zip(contents.iter().cycle()).skip(self.warmup).collect();
        let mean = |f: &dyn Fn(&Timed, &Content) -> f64| {
            counted.iter().map(|(t, c)| f(t, c)).sum::<f64>() / counted.len() as f64
        };
        let rate = |f: &dyn Fn(&Timed, &Content) -> f64| {
            Spread::of(counted.iter().map(|(timed, content)| f(timed, content) / timed.seconds))
        };
        let flops_per_second = rate(&|_, content| content.flops).median;
        Ok(Measured {
            case,
            step_seconds: Spread::of(counted.iter().map(|(timed, _)| timed.seconds)),
            examples_per_second: rate(&|_, _| case.examples() as f64),
            tokens_per_second: rate(&|_, content| content.tokens as f64).median,
            rows_per_second: rate(&|timed, _| timed.rows as f64).median,
            tokens_per_step: mean(&|_, content| content.tokens as f64),
            rows_per_step: mean(&|timed, _| timed.rows as f64),
            flops_per_step: mean(&|_, content| content.flops),
            flops_per_second,
            share_of_peak: flops_per_second / self.peak.flops_per_second,
            share_of_data_sheet: self.peak.data_sheet_flops_per_second.map(|most| flops_per_second / most),
            peak_memory_bytes,
            max_rows: limits.max_rows,
            recompute: limits.recompute,
            first_loss: steps[0].loss,
            last_loss: steps[steps.len() - 1].loss,
        })
    }

    /// Time per op over `steps` steps behind one that warms up, the longest first; what lies outside of all
    /// ops is the last. But on CUDA the device is idle at every op's ends, so that the step is slower than a
    /// measured one.
    ///
    /// # Errors
    /// As [`Bench::measure`].
    pub fn profile(&self, case: Case, steps: usize) -> Result<Vec<OpShare>> {
        let examples = self.examples(case);
        let outcome = self.run(case, &examples, 1 + steps, &mut |step| {
            if step == 1 {
                profile::start();
            }
        });
        let times = profile::finish();
        let (outcome, times) = (outcome?, times?);
        let total: f64 = outcome.iter().skip(1).map(|step| step.seconds).sum();
        let share = |op: &str, seconds: f64, calls: u64| OpShare {
            op: op.to_owned(),
            seconds_per_step: seconds / steps as f64,
            calls_per_step: calls as f64 / steps as f64,
            share: seconds / total,
        };
        let inside: f64 = times.iter().map(|time| time.seconds).sum();
        let mut shares: Vec<_> = times.iter().map(|time| share(time.op, time.seconds, time.calls)).collect();
        shares.push(share("outside of ops", total - inside, 0));
        Ok(shares)
    }

    fn examples(&self, case: Case) -> Vec<Example> {
        match &self.source {
            Source::Made(lengths) => {
                lengths.examples(MADE_STEPS * case.examples(), self.model.config().vocab_size)
            }
            Source::Given(examples) => examples::whole_steps(examples, case.examples()),
        }
    }

    fn contents(&self, case: Case, examples: &[Example]) -> Vec<Content> {
        let of = |chunk: &[Example]| {
            let group = PrefixGroup::new(0..case.num_virtual_tokens as u32, chunk);
            Content {
                tokens: chunk.iter().map(|e| e.input.len() + e.target.len()).sum(),
                flops: Flops::of_step(self.model.config(), &[group]).total(),
            }
        };
        examples.chunks(case.examples()).map(of).collect()
    }

    /// Runs the trainer for `steps` steps over the examples in their order; `after` is told of each step's
    /// end.
    fn run(
        &self,
        case: Case,
        examples: &[Example],
        steps: usize,
        after: &mut dyn FnMut(usize),
    ) -> Result<Vec<Timed>> {
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
        let task = Task {
            model: self.model,
            train: examples,
            validation: &[],
            options: &options,
            limits: self.limits(case, examples)?,
        };
        let mut trainer = Trainer::new(task, &self.prompt(case)?)?;
        let device = self.model.device();
        device.synchronize()?;
        let mut clock = Clock { device, after, last: Instant::now(), steps: Vec::with_capacity(steps) };
        trainer.run(&mut clock)?;
        Ok(clock.steps)
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

    /// How the case's steps fit into the device's memory.
    fn limits(&self, case: Case, examples: &[Example]) -> Result<Limits> {
        let options = TrainOptions {
            batch_size: case.batch_size,
            accumulate_steps: case.accumulate_steps,
            max_rows: self.max_rows,
            ..TrainOptions::default()
        };
        Ok(setup::plan_run(&options, self.model, examples, case.num_virtual_tokens)?.limits)
    }

    /// Embeddings of random tokens, f32: what a prompt holds makes no difference to what a step costs.
    fn prompt(&self, case: Case) -> Result<Tensor> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let vocab_size = self.model.config().vocab_size as u32;
        let ids: Vec<u32> = (0..case.num_virtual_tokens).map(|_| rng.random_range(0..vocab_size)).collect();
        let ids = crate::ops::gpu::upload(&ids, self.model.device())?;
        Ok(self.model.embedding().index_select(&ids, 0)?.to_dtype(DType::F32)?)
    }
}

/// Takes the times.
struct Clock<'a> {
    device: &'a Device,
    after: &'a mut dyn FnMut(usize),
    last: Instant,
    steps: Vec<Timed>,
}

impl Observer for Clock<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.device.synchronize()?;
        let seconds = self.last.elapsed().as_secs_f64();
        self.steps.push(Timed { seconds, rows: record.rows, loss: record.loss });
        (self.after)(self.steps.len());
        self.last = Instant::now();
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

    fn epoch(&mut self, _record: &EpochRecord) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        // numpy.percentile([5, 1, 4, 2], [50, 10, 90]).
        let spread = Spread::of([5.0, 1.0, 4.0, 2.0]);
        for (found, expected) in [(spread.median, 3.0), (spread.p10, 1.3), (spread.p90, 4.7)] {
            assert!((found - expected).abs() < 1e-12, "{spread:?}");
        }
        assert_eq!(Spread::of([7.0]), Spread { median: 7.0, p10: 7.0, p90: 7.0 });
    }
}

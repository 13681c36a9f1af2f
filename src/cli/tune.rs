//! `gneiss tune`: a run, from a configuration to an adapter.

mod order;

use super::interrupt::{self, Interrupted};
use super::{launch, process, progress, stderr, text};
use clap::Args;
use gneiss::config::{Config, SweepOptions};
use gneiss::data::{Encoded, LengthStats};
use gneiss::device::{DeviceMemory, PeakMemory};
use gneiss::ranks::Ranks;
use gneiss::run::{self, Agreement, LossKind, Run, RunFolder, Summary, Tuning};
use gneiss::session::Session;
use gneiss::tune::{Ended, EpochRecord, Limits, Observer, State, StepRecord, Trainer};
use gneiss::{Error, layout, report};
use indicatif::ProgressBar;
pub(super) use order::{Order, RunArgs};
use std::path::{Path, PathBuf};

/// Tunes a soft prompt and writes a run folder: configuration, metrics, checkpoint, adapter, report.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["config", "resume"]))]
pub struct Tune {
    /// Tune as many prompts, from seed train.seed on, and keep the best: a sweep over train.seed without pruning.
    #[arg(long, value_name = "N", conflicts_with_all = ["resume", "find_lr"], value_parser = clap::value_parser!(u16).range(2..=999))]
    seeds: Option<u16>,
    #[command(flatten)]
    run: RunArgs,
}

impl Tune {
    /// Runs the subcommand, on one or several ranks.
    pub fn run(self) -> anyhow::Result<()> {
        launch::with_ranks(|ranks| self.run_on(ranks))
    }

    fn run_on(self, ranks: &dyn Ranks) -> anyhow::Result<()> {
        let RunArgs { find_lr, json, .. } = self.run;
        let mut order = launch::all(ranks, self.order(ranks))?;
        if let Some(seeds) = self.seeds {
            order.config.sweep = SweepOptions::seeds(order.config.train.seed, seeds.into());
            return super::sweep::run(&order.config, None, json, ranks);
        }
        // The GPU of each rank is not in the run's configuration, in which the device is the one that was asked for.
        let session = launch::open(&order.config.model, ranks)?;
        if find_lr {
            let (found, folder) = super::find_lr::run(&order.config, &session)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&found)?);
            } else {
                super::find_lr::print(&found, &folder);
            }
            return Ok(());
        }
        let Some((folder, summary)) = tune(&order, &session, ranks)? else { return Ok(()) };
        if json {
            println!("{}", serde_json::to_string(&TuneOutcome::new(&folder, &summary))?);
        } else {
            print(&folder, &summary);
        }
        go_on("tune", &folder, &summary)?;
        if !json {
            hint(&folder, &order.config);
        }
        Ok(())
    }

    /// The run that the arguments ask for.
    fn order(&self, ranks: &dyn Ranks) -> anyhow::Result<Order> {
        if self.run.find_lr && ranks.size() > 1 {
            let size = ranks.size();
            return Err(Error::Invalid(format!("--find-lr: expected one process, found {size} ranks")).into());
        }
        let order = self.run.order(Path::new(""))?;
        if ranks.rank() == 0 && !self.run.find_lr {
            order.check_folder()?;
        }
        Ok(order)
    }
}

/// What to do with a run, by the configuration in its folder.
pub(super) fn hint(folder: &Path, config: &Config) {
    let path = folder.display();
    if config.data.test.is_empty() {
        stderr::hint(format_args!("gneiss generate --model {} --adapter {path} TEXT", config.model.id));
    } else {
        stderr::hint(format_args!("gneiss eval {} --adapter {path}", folder.join(layout::CONFIG).display()));
    }
}

/// An interrupted run is an error; the message says how to continue.
pub(super) fn go_on(command: &str, folder: &Path, summary: &Summary) -> anyhow::Result<()> {
    if summary.status != run::Status::Interrupted {
        return Ok(());
    }
    let (step, folder) = (summary.steps, folder.display());
    let text = format!("interrupted after step {step}; go on with: gneiss {command} --resume {folder}");
    Err(Interrupted(text).into())
}

/// Tunes, and writes the run folder with its report, also if the run fails. `None` on the ranks that only compute.
pub(super) fn tune(
    order: &Order,
    session: &Session,
    ranks: &dyn Ranks,
) -> anyhow::Result<Option<(PathBuf, Summary)>> {
    let config = &order.config;
    let toml = ranks.all(config.to_toml())?;
    let state = order.resume.as_ref().map(|(_, state)| state.clone());
    let tuning = ranks.all(Tuning::prepare(config, session, state))?;
    let mut trainer = ranks.all(tuning.trainer())?.with_ranks(ranks)?;
    if ranks.size() > 1 {
        let own = Agreement::new(&tuning, &trainer, session, &toml);
        Agreement::check(own, ranks)?.iter().for_each(super::warn);
    }
    if ranks.rank() > 0 {
        return follow(&mut trainer).map(|()| None);
    }
    describe(&tuning, config);
    let mut folder = match &order.resume {
        Some((path, state)) => RunFolder::reopen(path, &state.position, &toml)?,
        None => RunFolder::create(Path::new(&config.runs), &config.name, &toml)?,
    };
    describe_start(order, &folder, &trainer, ranks);
    let start = TuneStart {
        run: folder.path.display().to_string(),
        steps: trainer.first().total_steps(),
        done: trainer.first().position().step,
    };
    stderr::event("start", None, &start);
    let _guard = interrupt::Guard::new()?;
    let device = session.model.device();
    let (mut process, mut gpu) = (process::ProcessMemory, DeviceMemory::new(device));
    let memory: &mut dyn PeakMemory = if device.is_cpu() { &mut process } else { &mut gpu };
    let mut watch = TuneProgress::new(&trainer, &folder);
    let outcome = tuning.run(&mut trainer, &mut folder, memory, &mut watch);
    watch.bar.finish_and_clear();
    // Also after an error: the report shows the run up to there.
    let report = Run::read(&folder.path).and_then(|run| report::write(&run));
    let summary = outcome?;
    report?;
    Ok(Some((folder.path, summary)))
}

/// Runs a rank's share of each step; rank 0 prints and writes.
fn follow(trainer: &mut Trainer) -> anyhow::Result<()> {
    let _guard = interrupt::Guard::new()?;
    match trainer.run(&mut Follower)? {
        Ended::Interrupted => Err(Interrupted("interrupted".into()).into()),
        Ended::Completed | Ended::StoppedEarly | Ended::Paused => Ok(()),
    }
}

/// Prints where the run begins, and on how many ranks.
fn describe_start(order: &Order, folder: &RunFolder, trainer: &Trainer, ranks: &dyn Ranks) {
    folder.lock.warning.iter().for_each(super::warn);
    if let Some(moved) = &folder.moved {
        status!("run        an earlier run of this name is now {}", moved.display());
    }
    if ranks.size() > 1 {
        status!("ranks      {}, which share the examples of each step", ranks.size());
    }
    let Some((_, state)) = &order.resume else { return };
    let run = trainer.first();
    status!("resumed    after step {} of {}", run.position().step, run.total_steps());
    if state.ranks != ranks.size() {
        status!(
            "note       the run had {} ranks before and has {} now: sums in another order have other last digits",
            state.ranks,
            ranks.size()
        );
    }
}

/// Prints the settings of the run.
fn describe(tuning: &Tuning, config: &Config) {
    examples("train", &config.data.train, &tuning.data.train.1, config);
    if let Some((_, validation)) = &tuning.data.validation {
        examples("validation", &config.data.validation, validation, config);
    }
    if let Some(teacher) = &tuning.data.teacher {
        status!(
            "teacher    {} tokens before every input; the loss is the KL divergence from the base model's distribution \
             after them",
            teacher.text_tokens
        );
    }
    for note in &tuning.data.notes {
        status!("note       {note}");
    }
    let [needs, limits] = text::plan(&tuning.plan);
    status!("memory     {needs}\n           {limits}");
    if let Some(shortage) = text::shortage(&tuning.plan) {
        super::warn(format_args!("memory: {shortage}; the run goes on and may fail"));
    }
    status!(
        "prompt     {} virtual tokens, init {}{}; {} trainable values",
        tuning.initial.num_virtual_tokens(),
        config.prompt.init_method,
        tuning.initial.layout(),
        tuning.initial.elem_count()
    );
}

fn examples(what: &str, file: &str, encoded: &Encoded, config: &Config) {
    let lengths = LengthStats::from_lengths(encoded.examples.iter().map(|e| e.input.len()));
    status!(
        "{what:<10} {file}: {} examples, inputs of {} to {} tokens (median {}), {} inputs cut to {}, {} targets cut to {}",
        encoded.examples.len(),
        lengths.min,
        lengths.max,
        lengths.median,
        encoded.inputs_cut,
        config.data.max_input_tokens,
        encoded.targets_cut,
        config.data.max_output_tokens,
    );
}

/// The beginning of a run's steps, for `--progress json`.
#[derive(serde::Serialize)]
struct TuneStart {
    run: String,
    /// Optimizer steps of the whole run.
    steps: usize,
    /// Optimizer steps of the run's earlier parts.
    done: usize,
}

/// The result of a run as JSON.
#[derive(serde::Serialize)]
pub(super) struct TuneOutcome<'a> {
    run: String,
    adapter: String,
    report: String,
    #[serde(flatten)]
    summary: &'a Summary,
}

impl<'a> TuneOutcome<'a> {
    pub(super) fn new(folder: &Path, summary: &'a Summary) -> Self {
        let path = |name: &str| folder.join(name).display().to_string();
        let run = folder.display().to_string();
        Self { run, adapter: path(layout::ADAPTER), report: path(layout::REPORT), summary }
    }
}

/// The result of a run as text.
pub(super) fn print(folder: &Path, summary: &Summary) {
    let Summary { model, .. } = summary;
    let loss = |loss: Option<f64>| loss.map_or("none".into(), |l| format!("{l:.4}"));
    let of_kind = match summary.loss {
        LossKind::CrossEntropy => "",
        LossKind::KlDivergence => " (KL divergence from the teacher)",
    };
    let share = 100.0 * summary.trainable_parameters as f64 / model.parameters as f64;
    let mut rows = vec![
        ("status", summary.status.to_string()),
        ("adapter", folder.join(layout::ADAPTER).display().to_string()),
        ("report", folder.join(layout::REPORT).display().to_string()),
        ("model", format!("{} ({}), {} on {}", model.id, model.format, model.dtype, model.device)),
        (
            "virtual tokens",
            format!(
                "{}, init {}{}",
                summary.num_virtual_tokens,
                summary.init_method,
                summary.prompt_settings()
            ),
        ),
        (
            "trainable",
            format!(
                "{} of {} parameters ({share:.4} %)",
                text::grouped(summary.trainable_parameters),
                text::grouped(model.parameters)
            ),
        ),
        ("epochs", format!("{}, {} of {} steps", summary.epochs, summary.steps, summary.total_steps)),
        ("kept", format!("after epoch {}, step {}", summary.kept_epoch, summary.kept_step)),
        ("training loss", loss(summary.train_loss) + of_kind),
        ("validation loss", loss(summary.validation_loss) + of_kind),
        ("wall time", gneiss::text::duration(summary.seconds)),
        ("throughput", format!("{:.2} examples/s", summary.examples_per_second)),
    ];
    if summary.skipped_steps > 0 {
        rows.push(("steps skipped", summary.skipped_steps.to_string()));
    }
    if let Some(bytes) = summary.peak_memory_bytes {
        rows.push(("peak memory", text::bytes(bytes)));
    }
    for (key, value) in rows {
        println!("{key:<16} {value}");
    }
}

/// Shows the progress.
struct TuneProgress {
    bar: ProgressBar,
    examples: usize,
    seconds: f64,
    /// The file that a signal writes.
    checkpoint: PathBuf,
}

impl TuneProgress {
    fn new(trainer: &Trainer, folder: &RunFolder) -> Self {
        let (steps, done) = (trainer.first().total_steps(), trainer.first().position().attempts());
        let template = "{prefix:>10} {bar:30} {pos}/{len} {msg}, {eta} left";
        let bar = progress::bar(steps, "tuning", template).with_position(done as u64);
        bar.reset_eta();
        Self { bar, examples: 0, seconds: 0.0, checkpoint: folder.path.join(layout::CHECKPOINT) }
    }
}

impl Observer for TuneProgress {
    fn step(&mut self, record: &StepRecord) -> gneiss::Result<()> {
        stderr::event("step", None, record);
        self.examples += record.examples;
        self.seconds += record.seconds;
        let speed = self.examples as f64 / self.seconds;
        self.bar.set_message(format!(
            "loss {:.4}, lr {:.2e}, {speed:.2} examples/s",
            record.loss, record.learning_rate
        ));
        self.bar.inc(1);
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> gneiss::Result<()> {
        self.bar.inc(1);
        progress::line(&self.bar, &format!("step {step}: skipped, {what} is {value}"));
        Ok(())
    }

    fn out_of_memory(&mut self, limits: Limits) -> gneiss::Result<()> {
        progress::out_of_memory(&self.bar, limits);
        Ok(())
    }

    fn epoch(&mut self, record: &EpochRecord) -> gneiss::Result<()> {
        if stderr::is_json() {
            stderr::event("epoch", None, record);
            return Ok(());
        }
        let validation =
            record.validation_loss.map_or(String::new(), |l| format!(", validation loss {l:.4}"));
        let best = if record.best { ", best so far" } else { "" };
        let train = record.train_loss.map_or("none".into(), |l| format!("{l:.4}"));
        let text = format!(
            "epoch {:<4} step {}: training loss {train}{validation}{best}, {:.1} s",
            record.epoch, record.step, record.seconds
        );
        progress::line(&self.bar, &text);
        Ok(())
    }

    fn warning(&mut self, text: &str) -> gneiss::Result<()> {
        progress::warning(&self.bar, text);
        Ok(())
    }

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }

    fn latest(&mut self, state: &dyn Fn() -> gneiss::Result<State>) -> gneiss::Result<()> {
        interrupt::keep_latest(&self.checkpoint, state()?);
        Ok(())
    }

    fn checkpoint(&mut self, state: &State) -> gneiss::Result<()> {
        interrupt::keep_latest(&self.checkpoint, state.clone());
        Ok(())
    }
}

/// Shows nothing: rank 0 sees the same.
struct Follower;

impl Observer for Follower {
    fn step(&mut self, _: &StepRecord) -> gneiss::Result<()> {
        Ok(())
    }

    fn skipped(&mut self, _: usize, _: &str, _: f64) -> gneiss::Result<()> {
        Ok(())
    }

    fn out_of_memory(&mut self, _: Limits) -> gneiss::Result<()> {
        Ok(())
    }

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }
}

//! `gneiss tune`: a run, from a configuration to an adapter.

use super::interrupt::{self, Interrupted};
use super::{Overrides, process, progress, stderr, text};
use clap::Args;
use gneiss::config::{Config, SweepOptions};
use gneiss::data::{Encoded, LengthStats};
use gneiss::device::{DeviceMemory, PeakMemory};
use gneiss::run::{self, LossKind, Run, RunFolder, Summary, Tuning};
use gneiss::session::Session;
use gneiss::tune::{EpochRecord, Limits, Observer, State, StepRecord};
use gneiss::{layout, report};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};

/// Tunes a soft prompt and writes a run folder: configuration, metrics, checkpoint, adapter, report.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["config", "resume"]))]
pub struct Tune {
    /// Tune as many prompts, from seed train.seed on, and keep the best: a sweep over train.seed without pruning.
    #[arg(long, value_name = "N", conflicts_with_all = ["resume", "find_lr"], value_parser = clap::value_parser!(u16).range(2..=999))]
    seeds: Option<u16>,
    #[command(flatten)]
    run: RunArgs,
}

/// The start of a run.
#[derive(Args)]
pub(super) struct RunArgs {
    /// The configuration, such as configs/tutorial.toml.
    config: Option<PathBuf>,
    /// Continue the run in this folder, such as runs/tutorial, from its last checkpoint.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["config", "find_lr"])]
    resume: Option<PathBuf>,
    /// Try increasing learning rates for a hundred steps and suggest one. `tune` then ends; `tutorial` uses it.
    #[arg(long)]
    pub(super) find_lr: bool,
    #[command(flatten)]
    overrides: Overrides,
    /// Print the result as JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// A requested run.
pub(super) struct Order {
    /// Its configuration.
    pub(super) config: Config,
    /// The folder and the state from which it continues.
    pub(super) resume: Option<(PathBuf, State)>,
}

impl Tune {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let RunArgs { find_lr, json, .. } = self.run;
        let mut order = self.run.order(Path::new(""))?;
        if let Some(seeds) = self.seeds {
            order.config.sweep = SweepOptions::seeds(order.config.train.seed, seeds.into());
            return super::sweep::run(&order.config, None, json);
        }
        let session = progress::open(&order.config.model)?;
        if find_lr {
            let (found, folder) = super::find_lr::run(&order.config, &session)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&found)?);
            } else {
                super::find_lr::print(&found, &folder);
            }
            return Ok(());
        }
        let (folder, summary) = tune(&order, &session)?;
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
}

impl RunArgs {
    /// Whether the arguments name no configuration and no run.
    pub(super) fn takes_default(&self) -> bool {
        self.config.is_none() && self.resume.is_none()
    }

    /// The run that the arguments ask for; with the configuration in `default` if they name none.
    pub(super) fn order(&self, default: &Path) -> anyhow::Result<Order> {
        let Some(folder) = &self.resume else {
            let path = self.config.as_deref().unwrap_or(default);
            let mut config = self.overrides.load(path)?;
            if !config.sweep.is_default() {
                super::warn("[sweep] is for gneiss sweep; this command uses the other tables alone");
                config.sweep = SweepOptions::default();
            }
            return Ok(Order { config, resume: None });
        };
        let (mut config, state) = run::tuning::resumable(folder, &self.overrides.sets)?;
        self.overrides.apply(&mut config);
        Ok(Order { config, resume: Some((folder.clone(), state)) })
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

/// Tunes, and writes the run folder with its report, also if the run fails.
pub(super) fn tune(order: &Order, session: &Session) -> anyhow::Result<(PathBuf, Summary)> {
    let config = &order.config;
    let tuning = Tuning::prepare(config, session, order.resume.as_ref().map(|(_, state)| state.clone()))?;
    describe(&tuning, config);
    let mut trainer = tuning.trainer()?;
    let toml = config.to_toml()?;
    let mut folder = match &order.resume {
        Some((path, state)) => RunFolder::reopen(path, &state.position, &toml)?,
        None => RunFolder::create(Path::new(&config.runs), &config.name, &toml)?,
    };
    if let Some(moved) = &folder.moved {
        status!("run        an earlier run of this name is now {}", moved.display());
    }
    if order.resume.is_some() {
        status!(
            "resumed    after step {} of {}",
            trainer.first().position().step,
            trainer.first().total_steps()
        );
    }
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
    let mut watch = TuneProgress::new(trainer.first().total_steps(), trainer.first().position().attempts());
    let outcome = tuning.run(&mut trainer, &mut folder, memory, &mut watch);
    watch.bar.finish_and_clear();
    // Also after an error: the report shows the run up to there.
    let report = Run::read(&folder.path).and_then(|run| report::write(&run));
    let summary = outcome?;
    report?;
    Ok((folder.path, summary))
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
}

impl TuneProgress {
    fn new(steps: usize, done: usize) -> Self {
        let template = "{prefix:>10} {bar:30} {pos}/{len} {msg}, {eta} left";
        let bar = progress::bar(steps, "tuning", template).with_position(done as u64);
        bar.reset_eta();
        Self { bar, examples: 0, seconds: 0.0 }
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
}

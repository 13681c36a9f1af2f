//! `gneiss tune`: a run from a configuration to an adapter.

use super::{ConfigArgs, process, progress, text};
use anyhow::Context;
use clap::Args;
use gneiss::adapter::{Adapter, AdapterConfig, ModelCard, PromptTuningInit};
use gneiss::config::{Config, InitMethod};
use gneiss::data::{Encoded, LengthStats, Template};
use gneiss::run::RunFolder;
use gneiss::setup::{self, Session};
use gneiss::tune::{EpochRecord, Kept, Limits, MemoryPlan, Observer, StepRecord, Task, Trainer, prompt};
use indicatif::ProgressBar;
use std::path::Path;
use std::time::Instant;

/// Tunes a soft prompt and writes a run folder: configuration, metrics, adapter.
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Tune {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let template = Template::parse(&config.data.verbalizer)?;
        let session = progress::open(&config.model)?;
        let encoder = setup::encoder(&config.data, &session.tokenizer, &template);
        let (_, train) =
            setup::examples(&config.data.train, &config, &encoder)?.context("data.train is required")?;
        let validation =
            setup::examples(&config.data.validation, &config, &encoder)?.map(|(_, encoded)| encoded);
        describe("train", &config.data.train, &train, &config);
        if let Some(validation) = &validation {
            describe("validation", &config.data.validation, validation, &config);
        }
        let initial = prompt::initial(&config.prompt, &session.model, &session.tokenizer, config.train.seed)?;
        let plan = memory_plan(&config, &session, &train, initial.dims()[0])?;
        let task = Task {
            model: &session.model,
            train: &train.examples,
            validation: validation.as_ref().map_or(&[], |v| &v.examples),
            options: &config.train,
            limits: plan.limits,
        };
        let mut trainer = Trainer::new(task, &initial)?;
        let folder = RunFolder::create(Path::new(&config.runs), &config.name, &config.to_toml()?)?;
        if let Some(moved) = &folder.moved {
            eprintln!("run        an earlier run of this name is now {}", moved.display());
        }
        eprintln!(
            "prompt     {} virtual tokens, init {}; {} trainable values",
            initial.dims()[0],
            config.prompt.init_method,
            initial.elem_count()
        );
        let started = Instant::now();
        let mut watch = Watch::new(folder, trainer.total_steps());
        let outcome = trainer.run(&mut watch);
        watch.bar.finish_and_clear();
        // Also after an error: what was learned up to it is kept.
        let kept = trainer.kept()?;
        let adapter = write_adapter(&config, &session, &kept, &watch.folder)?;
        outcome?;
        let result = Summary {
            adapter: adapter.display().to_string(),
            run: watch.folder.path.display().to_string(),
            num_virtual_tokens: initial.dims()[0],
            steps: kept.step,
            epoch: kept.epoch,
            train_loss: kept.train_loss,
            validation_loss: kept.validation_loss,
            skipped_steps: trainer.skipped(),
            seconds: started.elapsed().as_secs_f64(),
            examples_per_second: watch.examples as f64 / watch.seconds,
            peak_memory_bytes: process::peak_bytes(),
        };
        result.print(self.json)
    }
}

/// How the run fits into memory, shown as it is made.
fn memory_plan(
    config: &Config,
    session: &Session,
    train: &Encoded,
    virtual_tokens: usize,
) -> anyhow::Result<MemoryPlan> {
    let plan = setup::plan_run(&config.train, &session.model, &train.examples, virtual_tokens)?;
    let [needs, limits] = text::plan(&plan);
    eprintln!("memory     {needs}\n           {limits}");
    if let Some(shortage) = text::shortage(&plan) {
        eprintln!("           warning: {shortage}; the run goes on and may fail");
    }
    Ok(plan)
}

fn describe(what: &str, file: &str, encoded: &Encoded, config: &Config) {
    let lengths = LengthStats::of(encoded.examples.iter().map(|e| e.input.len()));
    eprintln!(
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

fn write_adapter(
    config: &Config,
    session: &Session,
    kept: &Kept,
    folder: &RunFolder,
) -> gneiss::Result<std::path::PathBuf> {
    let n = kept.prompt.dims()[0];
    let init = match config.prompt.init_method {
        InitMethod::Text => PromptTuningInit::Text,
        InitMethod::Vocab => PromptTuningInit::SampleVocab,
        InitMethod::Random | InitMethod::File => PromptTuningInit::Random,
    };
    let init_text = Some(config.prompt.init_text.as_str()).filter(|_| init == PromptTuningInit::Text);
    let adapter = AdapterConfig::new(&session.id, session.model.config(), n, init, init_text);
    let train = &config.train;
    let settings: [(&str, String); 8] = [
        ("learning rate", train.learning_rate.to_string()),
        ("schedule", format!("{}, warm-up {}", train.schedule, train.warmup_ratio)),
        ("examples per step", (train.batch_size * train.accumulate_steps).to_string()),
        ("epochs", train.num_epochs.to_string()),
        ("weight decay", train.weight_decay.to_string()),
        ("gradient norm limit", train.max_grad_norm.to_string()),
        ("seed", train.seed.to_string()),
        ("init", config.prompt.init_method.to_string()),
    ];
    let card = ModelCard {
        name: config.name.clone(),
        task: config.data.task.to_string(),
        verbalizer: config.data.verbalizer.clone(),
        max_output_tokens: Some(config.data.max_output_tokens),
        hyperparameters: settings.map(|(key, value)| (key.to_owned(), value)).to_vec(),
        num_steps: Some(kept.step),
        train_loss: kept.train_loss,
        validation_loss: kept.validation_loss,
    };
    let path = folder.adapter();
    Adapter { prompt: kept.prompt.clone(), config: adapter }.write(&path, &card)?;
    Ok(path)
}

/// What a run came to.
#[derive(serde::Serialize)]
struct Summary {
    adapter: String,
    run: String,
    num_virtual_tokens: usize,
    steps: usize,
    epoch: usize,
    train_loss: Option<f64>,
    validation_loss: Option<f64>,
    skipped_steps: usize,
    seconds: f64,
    examples_per_second: f64,
    peak_memory_bytes: Option<u64>,
}

impl Summary {
    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        let loss = |loss: Option<f64>| loss.map_or("none".into(), |l| format!("{l:.4}"));
        let mut rows = [
            ["adapter", &self.adapter],
            ["virtual tokens", &self.num_virtual_tokens.to_string()],
            ["kept", &format!("after step {}, epoch {}", self.steps, self.epoch)],
            ["training loss", &loss(self.train_loss)],
            ["validation loss", &loss(self.validation_loss)],
            ["wall time", &format!("{:.1} s", self.seconds)],
            ["throughput", &format!("{:.2} examples/s", self.examples_per_second)],
        ]
        .map(|row| row.map(str::to_owned).to_vec())
        .to_vec();
        if self.skipped_steps > 0 {
            rows.push(vec!["steps skipped".into(), self.skipped_steps.to_string()]);
        }
        if let Some(bytes) = self.peak_memory_bytes {
            rows.push(vec!["peak memory".into(), text::bytes(bytes)]);
        }
        for row in rows {
            println!("{:<16} {}", row[0], row[1]);
        }
        Ok(())
    }
}

/// Writes the metrics and shows the progress.
struct Watch {
    folder: RunFolder,
    bar: ProgressBar,
    examples: usize,
    seconds: f64,
    last: f64,
}

impl Watch {
    fn new(folder: RunFolder, steps: usize) -> Self {
        let template = "{prefix:>10} {bar:30} {pos}/{len} {msg}, {eta} left";
        let bar = progress::bar(steps, "tuning", template);
        Self { folder, bar, examples: 0, seconds: 0.0, last: f64::NAN }
    }
}

impl Observer for Watch {
    fn step(&mut self, record: &StepRecord) -> gneiss::Result<()> {
        self.folder.record(record)?;
        self.examples += record.examples;
        self.seconds += record.seconds;
        self.last = record.loss;
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
        let Limits { max_rows, recompute } = limits;
        let text =
            format!("out of memory: trying again with {max_rows} rows a pass, {recompute} blocks recomputed");
        progress::line(&self.bar, &text);
        Ok(())
    }

    fn epoch(&mut self, record: &EpochRecord) -> gneiss::Result<()> {
        self.folder.record(record)?;
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
}

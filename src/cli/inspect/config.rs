//! A configuration: its problems, the content of its files, and the cost of a run.

use super::batches::Batches;
use super::dataset::DatasetReport;
use super::{Report, line};
use crate::cli::text;
use gneiss::batch::{Example, Packing, common_head};
use gneiss::checkpoint::{Checkpoint, TextTokenizer};
use gneiss::config::{Config, InitMethod, PromptPosition};
use gneiss::data::{Encoder, InputHead, Template};
use gneiss::model::{Dtypes, TuningMemory};
use gneiss::prompt::peft::Adapter;
use gneiss::prompt::{PromptLayout, vocabulary};
use gneiss::tune::{LargestStep, Limits, MemoryPlan, health};
use gneiss::{Error, session};
use serde::Serialize;
use std::collections::HashSet;
use std::path::Path;

/// A configuration.
#[derive(Serialize)]
pub struct ConfigReport {
    config: String,
    model: String,
    virtual_tokens: usize,
    /// What stands before the virtual tokens; `None` if they stand at the start.
    before: Option<Before>,
    /// Tokens of the teacher's text; 0 without one.
    teacher_tokens: usize,
    /// Number of tokens with which all training inputs begin.
    shared_tokens: usize,
    /// Their text.
    shared_text: String,
    /// Positions of the longest example with the prompt before it, and of the model.
    positions: [usize; 2],
    files: Vec<SplitReport>,
    batches: Batches,
    steps_per_epoch: usize,
    steps: usize,
    memory: Vec<Memory>,
    plan: PlanReport,
    #[serde(skip)]
    plan_text: [String; 2],
}

/// The head of the inputs that stands before the virtual tokens.
#[derive(Serialize)]
struct Before {
    tokens: usize,
    text: String,
}

/// The configuration's files.
struct Splits {
    files: Vec<SplitReport>,
    train: Vec<Example>,
    /// Tokens of the longest example.
    longest: usize,
    before: Option<Before>,
}

/// How tuning will fit into the memory of the device, bytes; based on the largest step of any epoch.
#[derive(Serialize)]
struct PlanReport {
    budget: Option<usize>,
    reserve: usize,
    /// With the reserve.
    total: usize,
    /// Memory beyond the budget.
    missing: usize,
    max_rows: usize,
    /// Layers that are recomputed.
    recompute: usize,
}

/// One of the configuration's files.
#[derive(Serialize)]
struct SplitReport {
    split: &'static str,
    /// Rows of the training file whose input is also in this file; `None` for the training file itself.
    inputs_shared_with_train: Option<usize>,
    #[serde(flatten)]
    dataset: DatasetReport,
}

/// The memory for tuning, bytes.
#[derive(Serialize)]
struct Memory {
    what: &'static str,
    rows: usize,
    weights: usize,
    tape: usize,
    workspace: usize,
    prompt: usize,
    total: usize,
}

/// Inspects a configuration; `model` replaces its model.
pub fn inspect(path: &Path, model: Option<&str>) -> anyhow::Result<ConfigReport> {
    let config = load(path, model)?;
    let device = crate::cli::device(config.model.device)?;
    let dtypes = Dtypes::for_weights(session::dtype(config.model.dtype, &device), &device)?;
    let Checkpoint { config: shape, tokenizer, warnings, .. } =
        Checkpoint::open(&session::locate(&config.model.id)?)?;
    warnings.iter().for_each(crate::cli::warn);
    let template = Template::parse(&config.data.verbalizer)?;
    let encoder = session::encoder(&config.data, &tokenizer, &template);
    let Splits { files, train, longest, before } = Splits::read(&config, &encoder)?;
    let virtual_tokens = virtual_tokens(&config, &tokenizer)?;
    let positions = [virtual_tokens + longest, shape.max_position_embeddings];
    warn_about_positions(positions);
    let teacher_tokens = teacher_tokens(&config, &tokenizer)?;
    warn_about_teacher(teacher_tokens, [teacher_tokens + longest, shape.max_position_embeddings]);
    let memory = TuningMemory::new(&shape, dtypes, device.location());
    let layout = gneiss::prompt::init::layout(&config.prompt, &shape, virtual_tokens)?;
    let work = largest_step(&config, &train, &layout, teacher_tokens);
    let plan = gneiss::tune::fit::plan(&config.train, &memory, &work, &device, false)?;
    let prefix_pass_rows = memory.prefix_pass_rows(plan.limits.max_rows);
    let packing = Packing { max_rows: plan.limits.max_rows, prefix_pass_rows, long_above: None };
    let batches = Batches::count(&config, &train, virtual_tokens, packing);
    let steps_per_epoch = batches.rows.len();
    let Limits { max_rows, recompute } = plan.limits;
    let at = |what, rows: usize, targets: usize| {
        let (tape, workspace) =
            (memory.tape(rows, targets, recompute), memory.workspace(rows, targets, recompute));
        let weights = memory.weights + plan.backward_weights.bytes();
        let total = weights + tape + workspace + plan.prompt;
        Memory { what, rows, weights, tape, workspace, prompt: plan.prompt, total }
    };
    let (rows, targets) = batches.largest;
    let targets_at_most = (max_rows as f64 * batches.target_share).ceil() as usize;
    let steps = match config.train.max_steps {
        0 => steps_per_epoch * config.train.num_epochs,
        steps => steps,
    };
    if let Some(problem) = health::schedule(&config.train, steps) {
        crate::cli::warn(problem);
    }
    let shared = common_head(train.iter().map(|e| e.input.as_slice()));
    Ok(ConfigReport {
        config: path.display().to_string(),
        model: config.model.id.clone(),
        virtual_tokens,
        before,
        teacher_tokens,
        shared_tokens: shared.len(),
        shared_text: tokenizer.decode(shared, false)?,
        positions,
        files,
        steps,
        steps_per_epoch,
        memory: vec![at("largest step", rows, targets), at("full pass", max_rows, targets_at_most)],
        batches,
        plan: PlanReport::new(&plan),
        plan_text: text::plan(&plan),
    })
}

/// The configuration with `model`; the number of trials is printed if it has a sweep, whose trials are checked.
fn load(path: &Path, model: Option<&str>) -> anyhow::Result<Config> {
    let mut config = Config::load(path, &[])?;
    if let Some(model) = model {
        config.model.id = model.to_owned();
    }
    if !config.sweep.is_default() {
        let trials = config.trials()?.len();
        status!("sweep      {trials} trials with gneiss sweep; this is the run of the other tables");
    }
    Ok(config)
}

/// The largest step of the configuration's run.
fn largest_step(
    config: &Config,
    train: &[Example],
    layout: &PromptLayout,
    teacher_tokens: usize,
) -> LargestStep {
    let examples = config.train.batch_size * config.train.accumulate_steps;
    let work = LargestStep::new(train, layout.kind, layout.num_virtual_tokens, examples).with_layout(layout);
    work.with_teacher(match teacher_tokens {
        0 => 0,
        tokens => tokens + common_head(train.iter().map(|e| e.input.as_slice())).len(),
    })
}

/// Prints a warning if the longest example has more positions than the model.
fn warn_about_positions(positions: [usize; 2]) {
    if positions[0] > positions[1] {
        status!(
            "positions  {} are more than the model's {}: tuning will refuse them; lower data.max_input_tokens \
             or prompt.num_virtual_tokens",
            positions[0],
            positions[1]
        );
    }
}

/// Prints a warning if the longest example has more positions after the teacher's text than the model.
fn warn_about_teacher(tokens: usize, positions: [usize; 2]) {
    if tokens > 0 && positions[0] > positions[1] {
        status!(
            "positions  {} after data.teacher_text are more than the model's {}: tuning will refuse them; shorten the \
             text, or lower data.max_input_tokens",
            positions[0],
            positions[1]
        );
    }
}

impl PlanReport {
    fn new(plan: &MemoryPlan) -> Self {
        Self {
            budget: plan.budget.bytes,
            reserve: plan.reserve,
            total: plan.total(),
            missing: plan.missing(),
            max_rows: plan.limits.max_rows,
            recompute: plan.limits.recompute,
        }
    }
}

impl Splits {
    /// Reads and encodes all files. Inputs have to begin with the head after which the virtual tokens stand, if they do.
    fn read(config: &Config, encoder: &Encoder) -> anyhow::Result<Self> {
        let data = &config.data;
        let mut splits = Self { files: Vec::new(), train: Vec::new(), longest: 0, before: None };
        let (mut inputs, mut head) = (Vec::new(), None);
        for (split, file) in [("train", &data.train), ("validation", &data.validation), ("test", &data.test)]
        {
            if file.is_empty() {
                continue;
            }
            let dataset = session::dataset(file, data)?;
            let mut report = DatasetReport::new(&dataset);
            report.warn(&format!("data.{split}: "));
            let examples = report.encode(&dataset, encoder)?.examples;
            let longest = examples.iter().map(|e| e.input.len() + e.target.len()).max();
            splits.longest = splits.longest.max(longest.unwrap_or(0));
            if split == "train" && config.prompt.position == PromptPosition::AfterHead {
                head = Some(InputHead::find(encoder, &examples)?);
            }
            if let Some(head) = &head {
                head.check_all(split, &examples)?;
            }
            let inputs_shared_with_train = if split == "train" {
                splits.train = examples;
                inputs = dataset.records.into_iter().map(|r| r.input).collect::<Vec<_>>();
                None
            } else {
                let there: HashSet<&str> = dataset.records.iter().map(|r| r.input.as_str()).collect();
                Some(inputs.iter().filter(|input| there.contains(input.as_str())).count())
            };
            splits.files.push(SplitReport { split, inputs_shared_with_train, dataset: report });
        }
        splits.before = head.map(|head| Before { tokens: head.token_ids.len(), text: head.text });
        Ok(splits)
    }
}

/// Tokens of the teacher's text; 0 without one.
fn teacher_tokens(config: &Config, tokenizer: &TextTokenizer) -> anyhow::Result<usize> {
    let ids = tokenizer.encode(&config.data.teacher_text, false);
    Ok(ids.map_err(|error| error.in_text("data.teacher_text"))?.len())
}

/// Number of rows that the prompt will have.
fn virtual_tokens(config: &Config, tokenizer: &TextTokenizer) -> anyhow::Result<usize> {
    let options = &config.prompt;
    let n = match (options.num_virtual_tokens, options.init_method) {
        (0, InitMethod::Text) => {
            let ids = tokenizer.encode(&options.init_text, true);
            ids.map_err(|error| error.in_text("prompt.init_text"))?.len()
        }
        (0, InitMethod::File) => Adapter::open(Path::new(&options.init_file))?.prompt.num_virtual_tokens(),
        (n, _) => n,
    };
    if n == 0 {
        anyhow::bail!(Error::Invalid("prompt: expected at least one virtual token, found none".into()));
    }
    Ok(n)
}

impl Report for ConfigReport {
    fn print(&self) {
        line("config", format!("{}, valid", self.config));
        line("model", &self.model);
        line("prompt", format!("{} virtual tokens", self.virtual_tokens));
        if let Some(Before { tokens, text }) = &self.before {
            line("position", format!("after {tokens} tokens, {}", vocabulary::visible(text)));
        }
        if self.teacher_tokens > 0 {
            line("teacher", format!("{} tokens of text", self.teacher_tokens));
        }
        let shared = match self.shared_tokens {
            0 => "no token".to_owned(),
            n => format!("{n} tokens, {}", vocabulary::visible(&self.shared_text)),
        };
        line("inputs share", shared);
        line("positions", format!("{} of the model's {}", self.positions[0], self.positions[1]));
        for SplitReport { split, inputs_shared_with_train, dataset } in &self.files {
            println!("\n{split}");
            dataset.print();
            if let Some(n) = inputs_shared_with_train {
                line("leak", format!("{n} training rows have an input of this file"));
            }
        }
        let b = &self.batches;
        println!("\ntraining");
        line("steps", format!("{} in all, {} an epoch", self.steps, self.steps_per_epoch));
        line("rows a step", format!("mean {:.1}, max {}", b.mean_rows, b.max_rows));
        line(
            "padded",
            format!(
                "mean {:.1}, max {}: {:.2} times as many",
                b.mean_padded_rows,
                b.max_padded_rows,
                b.mean_padded_rows / b.mean_rows
            ),
        );
        println!("\nmemory");
        let row = |key: &str, of: &dyn Fn(&Memory) -> String| {
            std::iter::once(key.to_owned()).chain(self.memory.iter().map(of)).collect::<Vec<_>>()
        };
        let bytes = |n: usize| text::bytes(n as u64);
        println!(
            "{}",
            text::table(&[
                row("", &|m| format!("{}, {} rows", m.what, m.rows)),
                row("weights", &|m| bytes(m.weights)),
                row("tape", &|m| bytes(m.tape)),
                row("workspace", &|m| bytes(m.workspace)),
                row("prompt and moments", &|m| bytes(m.prompt)),
                row("total", &|m| bytes(m.total)),
            ])
        );
        let [needs, limits] = &self.plan_text;
        line("plan", needs);
        line("", limits);
        if self.plan.missing > 0 {
            line("", format!("by estimate {} more than is free", bytes(self.plan.missing)));
        }
    }
}

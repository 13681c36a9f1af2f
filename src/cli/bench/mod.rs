//! `gneiss bench`: throughput of tuning.

mod disturbance;
mod packing;
mod report;

use super::{Overrides, PlaceArgs, process, progress, text, warn};
use anyhow::Context;
use clap::{ArgGroup, Args};
use disturbance::{Steps, profile_warning};
use gneiss::bench::examples;
use gneiss::bench::{
    Bench as Runs, Canary, Case, ExampleSource, Launches, Lengths, MatmulPeak, Measured, StepProducts,
};
use gneiss::checkpoint::ModelConfig;
use gneiss::config::{DtypeChoice, PromptKind};
use gneiss::data::Template;
use gneiss::device::{DeviceChoice, DeviceMemory, PeakMemory, is_out_of_memory};
use gneiss::layout::model_folder::CONFIG;
use gneiss::model::{Decoder, Dtypes, Parameters};
use gneiss::prompt::init;
use gneiss::session;
use packing::ByTurns;
use report::{BenchReport, CaseReport};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Steps of a profiled run: the shares of its ops hardly differ from step to step.
const PROFILED_STEPS: usize = 3;

/// Seed of random weights.
const SEED: u64 = 42;

/// Measures the throughput of tuning: step time; examples, tokens and rows per second; useful floating-point operations
/// as a fraction of the matmul peak (which a GPU sustains for two seconds) and of the card's data sheet; memory; time
/// per op.
///
/// Every combination of --batch, --virtual-tokens and --accumulate is a run of the trainer with warm-up steps and
/// counted steps over rotating examples; the device is idle at the end of each step. On a CPU a canary, 0.1 ms of fixed
/// work on every thread, runs between the steps: steps next to a slow canary are left out of times and rates.
#[derive(Args)]
#[command(group(ArgGroup::new("subject").required(true).args(["config", "model_config"])))]
#[command(group(ArgGroup::new("rows").args(["tokens", "data", "examples"])))]
pub struct BenchArgs {
    /// A configuration such as configs/tutorial.toml: its model, examples and template, and its sizes unless they are
    /// given here.
    config: Option<PathBuf>,
    /// The shape of a model, such as configs/models/granite-4.1-8b.json: random weights, nothing is downloaded. The
    /// default sizes are those of the tutorial: batch 8, 100 virtual tokens, accumulation 16.
    #[arg(long, value_name = "FILE.json")]
    model_config: Option<PathBuf>,
    /// Override a key of the configuration, such as `--set train.max_rows=4096`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config", conflicts_with = "model_config")]
    sets: Vec<String>,
    /// Use this model instead of the configuration's: a folder, a .gguf file or org/name[@revision].
    #[arg(long, requires = "config", conflicts_with = "model_config")]
    model: Option<String>,
    #[command(flatten)]
    place: PlaceArgs,
    /// Examples of a micro-batch, such as 8,32,128.
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive)]
    batch: Vec<usize>,
    /// Virtual tokens of the prompt, such as 20,100.
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive)]
    virtual_tokens: Vec<usize>,
    /// What the prompt puts in front of examples, embeddings or prefix; by default the configuration's prompt.kind.
    #[arg(long, value_name = "KIND")]
    prompt_kind: Option<PromptKind>,
    /// Micro-batches of an optimizer step, such as 1,16.
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive)]
    accumulate: Vec<usize>,
    /// Prompts that are tuned in one step, such as 1,4,16, each over the batch of its own; beside the same prompts in one step
    /// after another, which are measured too. On a CPU one step of several prompts gains little.
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive)]
    prompts: Vec<usize>,
    /// Examples of random tokens, N tokens each, 2 of them the target; by default as long as the reviews of data/ (25
    /// to 84, 42.5 on average). The first 10 tokens of all inputs are the same, like those of a template.
    #[arg(long, value_name = "N", value_parser = positive)]
    tokens: Option<usize>,
    /// Examples of this dataset instead of the configuration's data.train; it needs a model with a tokenizer.
    #[arg(long, value_name = "FILE", requires = "config", conflicts_with = "model_config")]
    data: Option<PathBuf>,
    /// Examples in token ids: {"examples": [{"input": [ids], "target": [ids]}, ...]}.
    #[arg(long, value_name = "FILE.json")]
    examples: Option<PathBuf>,
    /// Number of counted optimizer steps.
    #[arg(long, default_value_t = 10, value_parser = positive)]
    steps: usize,
    /// Number of warm-up steps before them.
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Most rows in one pass through the model; by default train.max_rows, or a number that suits the device.
    #[arg(long, value_name = "N", value_parser = positive)]
    max_rows: Option<usize>,
    /// Also measure the time of each op, in separate steps.
    #[arg(long)]
    profile: bool,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Append a row for each combination to this file; a new file gets a header.
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.trim().parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number, 1 or more".into())
}

/// A model, and the measurement for missing options.
struct Subject {
    model: Arc<Decoder>,
    name: String,
    weights: String,
    dtype: &'static str,
    source: ExampleSource,
    /// Description of the examples.
    about: String,
    default: Case,
    max_rows: usize,
}

impl BenchArgs {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let csv = self.csv.as_deref().map(report::Csv::open).transpose().context("--csv")?;
        let subject = match (&self.config, &self.model_config) {
            (Some(config), _) => self.subject_of_config(config)?,
            (None, Some(shape)) => self.subject_of_shape(shape)?,
            (None, None) => unreachable!("clap asks for one of them"),
        };
        let device = subject.model.device().clone();
        let dtype = subject.model.product_dtype();
        let canary = device.is_cpu().then(|| Canary::new(dtype));
        let peak = MatmulPeak::measure(&device, dtype, canary.as_ref())?;
        if peak.quiet == Some(false) {
            warn(
                "matmul peak: the machine was disturbed each time; it may be higher, and shares of it lower",
            );
        }
        let step_products = step_products(&subject.model)?;
        let mut report = BenchReport {
            version: env!("CARGO_PKG_VERSION"),
            date: gneiss::calendar::now(),
            model: subject.name,
            weights: subject.weights,
            parameters: Parameters::new(subject.model.config()).total(),
            weight_bytes: subject.model.weight_bytes(),
            device: gneiss::device::kind(&device),
            device_name: gneiss::device::name(&device),
            dtype: subject.dtype,
            activations: subject.model.dtype().as_str(),
            examples: subject.about,
            steps: self.steps,
            warmup: self.warmup,
            matmul_peak: peak,
            step_products,
            launches: None,
            canary: None,
            cases: Vec::new(),
        };
        let runs = Runs {
            model: &subject.model,
            source: subject.source,
            max_rows: subject.max_rows,
            steps: self.steps,
            warmup: self.warmup,
            peak,
            canary: canary.as_ref(),
        };
        report.launches = Launches::measure(&runs).context("launches")?;
        let outcome = self.measure_all(&runs, subject.default, &mut report, csv.as_ref());
        // Also after an error: the cases measured before it are valid.
        if outcome.is_ok() || !report.cases.is_empty() {
            report.print(self.json)?;
        }
        outcome
    }

    /// Measures every case, up to the first error, and adds it to `report` and `csv`.
    fn measure_all(
        &self,
        runs: &Runs,
        default: Case,
        report: &mut BenchReport,
        csv: Option<&report::Csv>,
    ) -> anyhow::Result<()> {
        for case in self.cases(default) {
            let label = report::label(case);
            status!("{label}: {} + {} steps", self.warmup, self.steps);
            let mut found = self.measure(runs, case).with_context(|| label.clone())?;
            found.by_turns = ByTurns::new(&found.measured, &report.cases);
            report.canary = runs.canary.map(Canary::rate);
            let Measured { disturbed_steps: disturbed, used_steps: used, .. } = found.measured;
            let steps = Steps { counted: self.steps, disturbed, used };
            let step_warning = steps.warning(runs.canary.is_none_or(Canary::was_even));
            let profile_warning = profile_warning(PROFILED_STEPS, found.disturbed_profiled_steps);
            step_warning.iter().chain(&profile_warning).for_each(|text| warn(format!("{label}: {text}")));
            if let Some(csv) = csv {
                csv.append(report, &found).context("--csv")?;
            }
            report.cases.push(found);
        }
        Ok(())
    }

    fn measure(&self, runs: &Runs, case: Case) -> anyhow::Result<CaseReport> {
        let device = runs.model.device();
        let (mut process, mut gpu) = (process::ProcessMemory, DeviceMemory::new(device));
        let memory: &mut dyn PeakMemory = if device.is_cpu() { &mut process } else { &mut gpu };
        let measured = runs.measure(case, memory)?;
        let profile = if self.profile { Some(runs.profile(case, PROFILED_STEPS)?) } else { None };
        let (ops, disturbed) = profile.map(|profile| (profile.ops, profile.disturbed_steps)).unzip();
        let disturbed_profiled_steps = disturbed.flatten();
        let device_memory_bytes = gpu.in_use();
        Ok(CaseReport { measured, by_turns: None, device_memory_bytes, ops, disturbed_profiled_steps })
    }

    /// Every combination of the sizes; missing sizes are those of `default`. Of the numbers of prompts one comes first, to which the
    /// others are compared.
    fn cases(&self, default: Case) -> Vec<Case> {
        let or = |given: &[usize], one: usize| if given.is_empty() { vec![one] } else { given.to_vec() };
        let prompt_kind = self.prompt_kind.unwrap_or(default.prompt_kind);
        let mut cases = Vec::new();
        for accumulate_steps in or(&self.accumulate, default.accumulate_steps) {
            for num_virtual_tokens in or(&self.virtual_tokens, default.num_virtual_tokens) {
                for batch_size in or(&self.batch, default.batch_size) {
                    let sizes =
                        Case { batch_size, accumulate_steps, prompt_kind, num_virtual_tokens, prompts: 1 };
                    cases.push(sizes);
                    let several: BTreeSet<usize> = self.prompts.iter().copied().filter(|n| *n > 1).collect();
                    cases.extend(several.into_iter().map(|prompts| Case { prompts, ..sizes }));
                }
            }
        }
        cases
    }

    /// Examples that the options name, and their description.
    fn named_examples(&self, vocab_size: usize) -> anyhow::Result<Option<(ExampleSource, String)>> {
        Ok(match (self.tokens, &self.examples) {
            (Some(tokens), _) => Some(made(Lengths::uniform(tokens).context("--tokens")?)),
            (None, Some(path)) => {
                let examples = examples::read(path, vocab_size).context("--examples")?;
                let about = format!("{} of {}", examples.len(), path.display());
                Some((ExampleSource::Given(examples), about))
            }
            (None, None) => None,
        })
    }

    fn subject_of_config(&self, path: &Path) -> anyhow::Result<Subject> {
        let overrides = Overrides {
            sets: self.sets.clone(),
            model: self.model.clone(),
            place: PlaceArgs { device: self.place.device, dtype: self.place.dtype },
        };
        let mut config = overrides.load(path)?;
        if let Some(data) = &self.data {
            config.data.train = data.display().to_string();
        }
        if config.distils() {
            crate::cli::warn(
                "data.teacher_text: the benchmark's steps have no teacher: they are those of cross-entropy",
            );
        }
        let session = progress::open(&config.model)?;
        let model = session.model;
        let (source, about) = match self.named_examples(model.config().vocab_size)? {
            Some(named) => named,
            None => {
                let template = Template::parse(&config.data.verbalizer)?;
                let encoder = session::encoder(&config.data, &session.tokenizer, &template);
                let (_, encoded) = session::examples(&config.data.train, &config, &encoder)?
                    .context("data.train is required")?;
                let about = format!("{} of {}", encoded.examples.len(), config.data.train);
                (ExampleSource::Given(encoded.examples), about)
            }
        };
        let num_virtual_tokens = match self.virtual_tokens.first() {
            Some(n) => *n,
            None => init::initial(&config.prompt, &model, &session.tokenizer, config.train.seed)?
                .num_virtual_tokens(),
        };
        Ok(Subject {
            max_rows: self.max_rows.unwrap_or(config.train.max_rows),
            model,
            name: session.id,
            weights: session.format,
            dtype: session.dtype.as_str(),
            source,
            about,
            default: Case {
                batch_size: config.train.batch_size,
                accumulate_steps: config.train.accumulate_steps,
                prompt_kind: config.prompt.kind,
                num_virtual_tokens,
                prompts: 1,
            },
        })
    }

    fn subject_of_shape(&self, path: &Path) -> anyhow::Result<Subject> {
        let config = ModelConfig::from_json(path).context("--model-config")?;
        let (source, about) = match self.named_examples(config.vocab_size)? {
            Some(named) => named,
            None => made(Lengths::reviews()),
        };
        let device = crate::cli::device(self.place.device.unwrap_or(DeviceChoice::Auto))?;
        let dtype = session::dtype(self.place.dtype.unwrap_or(DtypeChoice::Auto), &device);
        let started = Instant::now();
        let model = Decoder::random(&config, Dtypes::for_weights(dtype, &device)?, &device, SEED)?;
        device.synchronize()?;
        status!(
            "model      {}: random weights, {dtype:?} on {}, {} in {:.1} s",
            path.display(),
            gneiss::device::kind(&device),
            text::bytes(model.weight_bytes() as u64),
            started.elapsed().as_secs_f64()
        );
        Ok(Subject {
            model: Arc::new(model),
            name: model_name(path),
            weights: "random".into(),
            dtype: dtype.as_str(),
            source,
            about,
            default: Case {
                batch_size: 8,
                accumulate_steps: 16,
                prompt_kind: PromptKind::Embeddings,
                num_virtual_tokens: 100,
                prompts: 1,
            },
            max_rows: self.max_rows.unwrap_or(0),
        })
    }
}

/// The products of a step at their shapes, on a GPU with enough memory for them in addition to the model.
fn step_products(model: &Decoder) -> anyhow::Result<Option<StepProducts>> {
    if model.device().is_cpu() {
        return Ok(None);
    }
    match StepProducts::measure(model.config(), model.device(), model.product_dtype()) {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_out_of_memory(&error) => {
            status!("products at the step's shapes: not measured, the GPU has too little memory: {error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The name of a shape's file, or of its folder if the file is a checkpoint's config.json.
fn model_name(path: &Path) -> String {
    let named = match path.parent().filter(|_| path.file_name().is_some_and(|name| name == CONFIG)) {
        Some(folder) if folder.file_name().is_some() => folder.file_name(),
        _ => path.file_stem(),
    };
    named.unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn made(lengths: Lengths) -> (ExampleSource, String) {
    let mean = lengths.lengths.iter().sum::<usize>() as f64 / lengths.lengths.len() as f64;
    let Lengths { head, target, .. } = lengths;
    let about = format!("random, {mean:.1} tokens on average, up to {head} shared, targets of {target}");
    (ExampleSource::Made(lengths), about)
}

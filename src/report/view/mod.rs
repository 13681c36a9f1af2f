//! The content of a run's page, in the order of its template.

mod evaluation;
mod tokens;

use super::plot::{self, Size};
use super::{svg, text};
use crate::Result;
use crate::evaluate::Evaluation;
use crate::prompt::peft::{pretrained, quoted, split_revision};
use crate::run::{LossKind, Run, Status, Summary};
use crate::tune::EpochRecord;
pub(super) use evaluation::{ArmScores, EvaluationView, scores};
use serde::Serialize;
use std::path::Path;
use tokens::TokensView;

/// The page.
#[derive(Serialize)]
pub(super) struct RunView<'a> {
    name: &'a str,
    started: Option<String>,
    status: StatusView<'a>,
    tiles: Vec<NumberTile>,
    warnings: &'a [String],
    summary: Vec<Fact>,
    curve: Option<Curve>,
    plots: Vec<String>,
    evaluation: Option<EvaluationView<'a>>,
    tokens: Option<TokensView>,
    epochs: &'a [EpochRecord],
    config: &'a str,
    commands: Vec<[String; 2]>,
    peft: Option<String>,
    version: &'a str,
}

/// The state of a run.
#[derive(Serialize)]
pub(super) struct StatusView<'a> {
    /// Its class in the page's style.
    pub class: &'static str,
    pub text: &'static str,
    pub error: Option<&'a str>,
    /// Share of the steps done, while the run is not complete.
    progress: Option<f64>,
    steps: u64,
    total_steps: u64,
}

/// A number in large letters.
#[derive(Serialize)]
struct NumberTile {
    label: String,
    value: String,
    note: String,
}

/// A row of the summary.
#[derive(Serialize)]
pub(super) struct Fact {
    pub key: &'static str,
    pub value: String,
    /// Text after it in small letters, separator included.
    pub note: String,
}

/// The learning curve in two shapes; a page shows one of them.
#[derive(Serialize)]
struct Curve {
    wide: String,
    phone: String,
}

impl<'a> RunView<'a> {
    pub fn new(run: &'a Run, evaluation: Option<&'a Evaluation>) -> Result<Self> {
        let summary = &run.summary;
        let wide = plot::learning_curve(run, Size::WIDE)?;
        let curve = match (wide, plot::learning_curve(run, Size::PHONE)?) {
            (Some(wide), Some(phone)) => Some(Curve { wide: svg::inline(&wide), phone: svg::inline(&phone) }),
            _ => None,
        };
        let plots = [plot::learning_rate, plot::gradient_norm, plot::loss_over_time, plot::throughput];
        let plots = plots.iter().filter_map(|plot| plot(run, Size::HALF).transpose());
        let plots = plots.map(|svg| svg.map(|svg| svg::inline(&svg))).collect::<Result<_>>()?;
        let evaluation = evaluation.map(EvaluationView::new);
        Ok(Self {
            name: run.name(),
            started: (summary.started > 0).then(|| text::date(summary.started)),
            status: StatusView::new(summary),
            tiles: tiles(run, evaluation.as_ref()),
            warnings: &summary.warnings,
            summary: facts(run),
            curve,
            plots,
            evaluation,
            tokens: run.tokens.as_ref().map(TokensView::new),
            epochs: &run.epochs,
            config: &run.config_toml,
            commands: commands(run),
            peft: run.adapter().map(|adapter| peft(&summary.model.id, &adapter)),
            version: &summary.version,
        })
    }
}

impl<'a> StatusView<'a> {
    pub fn new(summary: &'a Summary) -> Self {
        let (class, text, error) = match &summary.status {
            Status::Running => ("running", "running", None),
            Status::Completed => ("completed", "completed", None),
            Status::StoppedEarly => ("completed", "stopped early", None),
            Status::Interrupted => ("interrupted", "interrupted", None),
            Status::Paused => ("paused", "paused", None),
            Status::Pruned => ("pruned", "pruned", None),
            Status::Failed { error } => ("failed", "failed", Some(error.as_str())),
        };
        let done = (summary.steps + summary.skipped_steps) as f64 / summary.total_steps.max(1) as f64;
        Self {
            class,
            text,
            error,
            progress: (class != "completed").then_some(done),
            steps: summary.steps as u64,
            total_steps: summary.total_steps as u64,
        }
    }
}

/// The most important numbers.
fn tiles(run: &Run, evaluation: Option<&EvaluationView>) -> Vec<NumberTile> {
    let summary = &run.summary;
    let mut tiles: Vec<NumberTile> = evaluation.and_then(EvaluationView::headline).into_iter().collect();
    let mut tile = |label: &str, value: String, note: String| {
        tiles.push(NumberTile { label: label.into(), value, note })
    };
    if summary.validation_loss.is_some() {
        let train = summary.train_loss.map(|loss| format!("training {}", text::number(loss)));
        let label = match summary.loss {
            LossKind::CrossEntropy => "Validation loss",
            LossKind::KlDivergence => "Validation loss (KL divergence)",
        };
        tile(label, text::loss(summary.validation_loss), train.unwrap_or_default());
    } else if let Some(last) = run.steps.last() {
        let (label, loss) = match summary.train_loss {
            Some(loss) => ("Training loss", loss),
            None => ("Loss of the last step", last.loss),
        };
        tile(label, text::number(loss), summary.loss.unit().into());
    }
    let share = summary.trainable_parameters as f64 / summary.model.parameters.max(1) as f64;
    let trained = text::count(summary.trainable_parameters as u64);
    let note = format!("{trained} parameters, {}", text::small_percent(share));
    tile("Virtual tokens", text::count(summary.num_virtual_tokens as u64), note);
    if summary.seconds > 0.0 {
        let rate = format!("{} examples/s", text::three(summary.examples_per_second));
        tile("Wall time", text::duration(summary.seconds), rate);
    }
    if let Some(bytes) = summary.peak_memory_bytes {
        tile("Peak memory", text::bytes(bytes), format!("{}, {}", summary.model.device, summary.model.dtype));
    }
    tiles
}

/// The summary table.
fn facts(run: &Run) -> Vec<Fact> {
    let summary = &run.summary;
    let model = &summary.model;
    let n = |n: usize| text::count(n as u64);
    let mut facts = Vec::new();
    let mut fact = |key, value: String, note: String| facts.push(Fact { key, value, note });
    let shape = format!(
        ", {} layers, width {}, {} tokens",
        n(model.num_hidden_layers),
        n(model.hidden_size),
        n(model.vocab_size)
    );
    fact("Model", model.id.clone(), shape);
    fact("Weights", model.format.clone(), format!(", computed in {}", model.dtype));
    fact("Device", model.device.clone(), String::new());
    fact("Init", summary.init_method.to_string(), String::new());
    fact("Virtual tokens", n(summary.num_virtual_tokens), summary.prompt_settings());
    let share = summary.trainable_parameters as f64 / model.parameters.max(1) as f64;
    let of = format!(", {} of {}", text::small_percent(share), n(model.parameters));
    fact("Trainable parameters", n(summary.trainable_parameters), of);
    let validation = match summary.validation_examples {
        0 => ", none of validation".into(),
        some => format!(", {} of validation", n(some)),
    };
    fact("Training examples", n(summary.train_examples), validation);
    let skipped = match summary.skipped_steps {
        0 => String::new(),
        some => format!(", {} skipped: a value was not finite", n(some)),
    };
    fact("Steps", format!("{} of {}", n(summary.steps), n(summary.total_steps)), skipped);
    let kept = format!(", kept: epoch {}, step {}", n(summary.kept_epoch), n(summary.kept_step));
    fact("Epochs", n(summary.epochs), if summary.kept_step > 0 { kept } else { String::new() });
    let unit = summary.loss.unit();
    let loss = |loss: Option<f64>| loss.map_or_else(String::new, |_| format!(" {unit}"));
    fact("Training loss", text::loss(summary.train_loss), loss(summary.train_loss));
    fact("Validation loss", text::loss(summary.validation_loss), loss(summary.validation_loss));
    let resumed = match summary.resumed {
        0 => String::new(),
        1 => ", resumed once".into(),
        times => format!(", resumed {times} times"),
    };
    fact("Wall time", text::duration(summary.seconds), resumed);
    let rate = format!("{} examples/s", text::three(summary.examples_per_second));
    fact("Throughput", rate, String::new());
    let memory = summary.peak_memory_bytes.map_or_else(|| "not known".into(), text::bytes);
    fact("Peak memory", memory, String::new());
    fact("gneiss", summary.version.clone(), String::new());
    facts
}

/// Descriptions and commands.
fn commands(run: &Run) -> Vec<[String; 2]> {
    let path = |path: &Path| text::shell(&path.display().to_string());
    let config = path(&run.path.join(crate::layout::CONFIG));
    let mut commands = vec![["Tune again".into(), format!("gneiss tune {config}")]];
    if let Some(adapter) = run.adapter() {
        if !run.config.data.test.is_empty() {
            let eval = format!("gneiss eval {config} --adapter {}", path(&adapter));
            commands.push(["Tuned against base".into(), eval]);
        }
        let model = text::shell(&run.summary.model.id);
        let generate = format!("gneiss generate --model {model} --adapter {} TEXT", path(&adapter));
        commands.push(["One answer".into(), generate]);
    }
    // The status of a run that was killed is still "running".
    let ended = matches!(run.summary.status, Status::Completed | Status::StoppedEarly);
    if !ended && run.path.join(crate::layout::CHECKPOINT).is_file() {
        commands.push(["Go on".into(), format!("gneiss tune --resume {}", path(&run.path))]);
    }
    commands.push(["This page again".into(), format!("gneiss report {}", path(&run.path))]);
    commands
}

/// Python that loads the prompt with PEFT.
fn peft(model: &str, adapter: &Path) -> String {
    let (base, revision) = split_revision(model);
    format!(
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
         base = AutoModelForCausalLM.from_pretrained({})\n\
         model = PeftModel.from_pretrained(base, {})\n\
         # how to call generate, so that PEFT uses the prompt: README.md in the folder of the adapter\n",
        pretrained(base, revision),
        quoted(&adapter.display().to_string())
    )
}

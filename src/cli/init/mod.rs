//! `gneiss init`: a configuration for one's own examples.

mod proposal;
mod questions;
mod render;

use super::stderr;
use clap::Args;
use gneiss::checkpoint::TextTokenizer;
use gneiss::config::{Config, Task};
use gneiss::data::dataset::{DataColumn, columns};
use gneiss::data::{Dataset, Encoder, LengthStats, Template};
use gneiss::{Error, session};
use proposal::{Columns, TokenLimits};
use questions::Questions;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Writes a commented configuration for your own examples.
///
/// Reads the columns and labels of the training file and proposes every setting. On a terminal it asks about each one that no
/// flag gives; otherwise, and with --yes, it takes the proposals. An existing file is not overwritten.
#[derive(Args)]
pub struct Init {
    /// The training file, .csv or .tsv; other formats need --input and --output.
    train: Option<PathBuf>,
    /// The file to write; by default NAME.toml.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Name of the runs, by default after the training file.
    #[arg(long)]
    name: Option<String>,
    /// The model: a folder, a .gguf file or org/name[@revision].
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    data: DataFlags,
    /// The text that the model reads, with {{input}} in the place of the input; `\n` stands for a line break.
    #[arg(long, value_name = "TEXT")]
    verbalizer: Option<String>,
    /// The text from which the virtual tokens start: the instruction in words.
    #[arg(long, value_name = "TEXT")]
    init_text: Option<String>,
    /// Take the proposals without asking.
    #[arg(long, short)]
    yes: bool,
}

/// The files and their columns.
#[derive(Args)]
struct DataFlags {
    /// The validation file, or none.
    #[arg(long, value_name = "FILE")]
    validation: Option<String>,
    /// The test file, or none.
    #[arg(long, value_name = "FILE")]
    test: Option<String>,
    /// Column or field that holds the input.
    #[arg(long, value_name = "NAME")]
    input: Option<String>,
    /// Column or field that holds the output.
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
    /// What the outputs are: labels or texts.
    #[arg(long, value_enum)]
    task: Option<TaskFlag>,
}

/// What the outputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TaskFlag {
    /// A label of a few.
    Classification,
    /// A text.
    Generation,
}

/// Every setting that the command decides.
struct Settings {
    name: String,
    model: String,
    train: String,
    validation: String,
    test: String,
    columns: Columns,
    task: Task,
    verbalizer: String,
    init_text: String,
    limits: TokenLimits,
    num_epochs: usize,
}

impl Init {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let asks = !self.yes && std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        let (mut input, mut output) = (std::io::stdin().lock(), std::io::stderr());
        let mut questions = Questions::new(asks.then_some((&mut input as _, &mut output as _)));
        let settings = self.settings(&mut questions)?;
        let out = self.out.clone().unwrap_or_else(|| PathBuf::from(format!("{}.toml", settings.name)));
        let text = render::config(&settings, &out.display().to_string());
        // A value of the user can be wrong, such as a verbalizer without a place for the input.
        Config::parse(&text, &out.display().to_string(), &[])?;
        write_new(&out, &text)?;
        println!("{}", out.display());
        stderr::hint(format_args!("gneiss inspect {}", out.display()));
        stderr::hint(format_args!("gneiss tune {}", out.display()));
        Ok(())
    }

    fn settings(&self, questions: &mut Questions) -> anyhow::Result<Settings> {
        let train = match &self.train {
            Some(path) => path.display().to_string(),
            None => questions.required(
                "training file",
                "init: expected the training file, such as gneiss init train.csv",
            )?,
        };
        let path = Path::new(&train);
        let columns = self.columns(path, questions)?;
        let mut dataset = Dataset::read(path, &columns.input, &columns.output)?;
        let task = match self.data.task {
            Some(TaskFlag::Classification) => Task::Classification,
            Some(TaskFlag::Generation) => Task::Generation,
            None => questions.choose("task", proposal::task(&dataset.records))?,
        };
        if task == Task::Classification {
            dataset.normalize_labels()?;
        }
        dataset.notes.iter().for_each(|note| status!("note       {train}: {note}"));
        dataset.warnings.iter().for_each(|text| super::warn(format_args!("{train}: {text}")));
        let file = |given: &Option<String>, question: &str, names: &[&str], questions: &mut Questions| {
            let proposed = proposal::sibling(path, names).unwrap_or_else(|| NONE.to_owned());
            let file = questions.answer(question, given.as_deref(), &proposed)?;
            anyhow::Ok(if file == NONE { String::new() } else { file })
        };
        let validation = file(
            &self.data.validation,
            "validation file",
            &["validation", "valid", "val", "dev"],
            questions,
        )?;
        let test = file(&self.data.test, "test file", &["test"], questions)?;
        let model = questions.answer("model", self.model.as_deref(), proposal::model())?;
        let name = questions.answer("name of the runs", self.name.as_deref(), &proposal::name(path))?;
        let labels = proposal::labels(&dataset.records, task);
        let verbalizer = proposal::verbalizer(&columns, &labels);
        let verbalizer = questions.text("verbalizer", self.verbalizer.as_deref(), &verbalizer)?;
        let init_text = proposal::init_text(&columns, &labels);
        let init_text = questions.text("init text", self.init_text.as_deref(), &init_text)?;
        let limits = limits(&model, &dataset, &verbalizer)?;
        Ok(Settings {
            num_epochs: proposal::num_epochs(dataset.records.len()),
            name,
            model,
            train,
            validation,
            test,
            columns,
            task,
            verbalizer,
            init_text,
            limits,
        })
    }

    fn columns(&self, path: &Path, questions: &mut Questions) -> anyhow::Result<Columns> {
        if let (Some(input), Some(output)) = (&self.data.input, &self.data.output) {
            return Ok(Columns { input: input.clone(), output: output.clone() });
        }
        let found: Vec<DataColumn> = columns(path)?;
        if found.len() < 2 {
            let problem = format!("{}: expected a column of inputs and a column of outputs", path.display());
            return Err(Error::Invalid(format!("{problem}, found {}", found.len())).into());
        }
        let names: Vec<&str> = found.iter().map(|column| column.name.as_str()).collect();
        status!("columns    {}", names.join(", "));
        let proposed = proposal::columns(&found, self.data.input.as_deref(), self.data.output.as_deref());
        Ok(Columns {
            input: questions.answer("column of the inputs", self.data.input.as_deref(), &proposed.input)?,
            output: questions.answer(
                "column of the outputs",
                self.data.output.as_deref(),
                &proposed.output,
            )?,
        })
    }
}

/// The answer for no file.
const NONE: &str = "none";

/// The limits of the texts: counted if the model's tokenizer is on this machine, otherwise estimated.
fn limits(model: &str, dataset: &Dataset, verbalizer: &str) -> anyhow::Result<TokenLimits> {
    if !Path::new(model).exists() {
        return Ok(TokenLimits::estimate(&dataset.records, verbalizer));
    }
    let tokenizer = TextTokenizer::open(&session::locate(model)?)?;
    let encoder = Encoder {
        tokenizer: &tokenizer.tokenizer,
        template: &Template::parse(verbalizer)?,
        vocab_size: tokenizer.vocab_size,
        eos_token_id: tokenizer.eos_token_id,
        max_input_tokens: usize::MAX,
        max_output_tokens: usize::MAX,
        instruction: None,
    };
    let examples = encoder.encode_dataset(dataset)?.examples;
    let inputs = LengthStats::from_lengths(examples.iter().map(|example| example.input.len()));
    let targets = LengthStats::from_lengths(examples.iter().map(|example| example.target.len()));
    Ok(TokenLimits::counted(inputs.max, targets.max))
}

/// Writes a file that does not exist yet.
fn write_new(path: &Path, text: &str) -> gneiss::Result<()> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    match file {
        Ok(mut file) => file.write_all(text.as_bytes()).map_err(Error::io(path)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::Invalid(format!(
            "{}: expected a file that does not exist, found one; hint: --out FILE writes another, and nothing was changed",
            path.display()
        ))),
        Err(error) => Err(Error::io(path)(error)),
    }
}

//! A complete evaluation: one file, the base model, and every tuned prompt.

use super::exam::{Exam, Progress};
use super::{Answers, Arm, Evaluation};
use crate::config::{Config, Task, other_keys};
use crate::data::labels::distinct;
use crate::data::{Dataset, Encoder, Template};
use crate::prompt::{PromptTask, Tuned};
use crate::ranks::Ranks;
use crate::ranks::agree::{self, SharedValue};
use crate::session::Session;
use crate::{Error, Result, session};
use candle_core::DType;

/// The name of the base model's arm.
const BASE: &str = "base";

/// Receives the events of an evaluation.
pub trait EvaluationObserver {
    /// The progress of the arm `name`.
    fn progress(&mut self, name: &str, progress: Progress);

    /// The file that the configuration's `key` names was read; called before the first arm. The dataset has notes and
    /// warnings.
    fn dataset(&mut self, _key: &str, _dataset: &Dataset) {}

    /// The last arm of `so_far` is done. An implementation can save the result, so that an error in a later arm does
    /// not lose it.
    ///
    /// # Errors
    /// May return any error; it ends the evaluation.
    fn answered(&mut self, so_far: &Evaluation) -> Result<()>;
}

/// The file for the evaluation.
///
/// # Errors
/// Returns [`Error::Invalid`] if the configuration names none.
pub fn test_file(config: &Config) -> Result<&str> {
    match config.data.test.as_str() {
        "" => Err(Error::Invalid("data.test: expected a file to evaluate on, found none".into())),
        file => Ok(file),
    }
}

/// How several tuned prompts go through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// One after another.
    ByTurns,
    /// All in one batch, in which each prompt is a prefix of its own with the rows of the texts after it.
    Together,
}

/// What answers.
#[derive(Clone, Copy)]
pub struct EvaluationPlace<'a> {
    /// The frozen model and its tokenizer.
    pub session: &'a Session,
    /// The rows of the test file are shared among them; the observer of each receives its own progress, and all answers.
    pub ranks: &'a dyn Ranks,
    /// How the prompts go through the model.
    pub batching: Batching,
}

/// Answers the configuration's test file with the base model after the hard prompt ([`Config::hard_prompt`] as plain text),
/// then with each tuned prompt, and compares the answers.
///
/// # Errors
/// Returns an error if there is no test file, rows are malformed or can't be encoded, a prompt has another width than
/// the model, a likelihood is not finite, or a device operation fails; and any error of `observer`.
pub fn run(
    config: &Config,
    place: EvaluationPlace,
    tuned: &[Tuned],
    observer: &mut dyn EvaluationObserver,
) -> Result<Evaluation> {
    let EvaluationPlace { session, ranks, batching } = place;
    let (data, file) = (&config.data, test_file(config)?);
    let fits =
        |tuned: &Tuned| tuned.adapter.check_fits(&tuned.argument(), &session.id, session.model.config());
    ranks.all(tuned.iter().try_for_each(fits))?;
    let (test, labels) = ranks.all(read(config, file, observer))?;
    if ranks.size() > 1 {
        ranks.agree(&SHARED, values(config, session, tuned, &test, &labels))?;
    }
    let template = Template::parse(&data.verbalizer)?;
    let without_prompt = session::encoder(data, &session.tokenizer, &template);
    let hard_prompt = config.hard_prompt();
    let with_hard_prompt =
        Encoder { instruction: Some(hard_prompt).filter(|text| !text.is_empty()), ..without_prompt };
    let model = &session.model;
    let max_rows = crate::tune::max_rows(config.train.max_rows, model.device());
    let exam = Exam {
        model,
        tokenizer: &session.tokenizer,
        dataset: &test,
        task: data.task,
        labels: &labels,
        max_rows,
        ranks,
    };
    let mut evaluation = Evaluation {
        test: file.to_owned(),
        task: data.task,
        labels: labels.clone(),
        hard_prompt: hard_prompt.to_owned(),
        teacher: config.distils(),
        arms: Vec::new(),
        pairs: Vec::new(),
        ensemble: None,
    };
    let answers = exam.answer(None, &with_hard_prompt, &mut |progress| observer.progress(BASE, progress))?;
    evaluation.push(Arm { name: BASE.to_owned(), adapter: None, answers });
    observer.answered(&evaluation)?;
    let batch_size = if batching == Batching::Together { tuned.len().max(1) } else { 1 };
    for batch in tuned.chunks(batch_size) {
        for arm in arms(&exam, batch, &without_prompt, observer)? {
            evaluation.push(arm);
            observer.answered(&evaluation)?;
        }
    }
    Ok(evaluation)
}

/// The test file, and the labels of a classification.
fn read(
    config: &Config,
    file: &str,
    observer: &mut dyn EvaluationObserver,
) -> Result<(Dataset, Vec<String>)> {
    let data = &config.data;
    let test = session::dataset(file, data)?;
    observer.dataset("data.test", &test);
    let labels = match data.task {
        Task::Classification => {
            let train = session::dataset(&data.train, data)?;
            observer.dataset("data.train", &train);
            distinct(test.records.iter().chain(&train.records))
        }
        Task::Generation => Vec::new(),
    };
    Ok((test, labels))
}

/// What must be the same on all ranks, in the order of [`values`].
const SHARED: [SharedValue; 5] = [
    agree::VERSION,
    agree::configuration(other_keys),
    SharedValue {
        what: "rows and labels",
        hint: "the same data files on every machine",
        difference: agree::both,
    },
    SharedValue {
        what: "tuned prompts",
        hint: "the same adapters on every machine, or their folders on a shared file system",
        difference: agree::both,
    },
    SharedValue {
        what: "model, dtype and device",
        hint: "the same model.id, --dtype and --device, which `auto` decides on each machine",
        difference: agree::both,
    },
];

/// This rank's values of [`SHARED`].
fn values(
    config: &Config,
    session: &Session,
    tuned: &[Tuned],
    test: &Dataset,
    labels: &[String],
) -> Result<Vec<String>> {
    let mut rows = 0;
    let mut add =
        |text: &str| rows = crc32c::crc32c_append(crc32c::crc32c_append(rows, text.as_bytes()), &[0]);
    test.records
        .iter()
        .flat_map(|record| [&record.input, &record.output])
        .chain(labels)
        .for_each(|text| add(text));
    let mut prompts = 0;
    for Tuned { adapter, .. } in tuned {
        let values = adapter.prompt.values().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        prompts = values.iter().fold(prompts, |sum, value| crc32c::crc32c_append(sum, &value.to_le_bytes()));
    }
    let device = crate::device::kind(session.model.device());
    Ok(vec![
        env!("CARGO_PKG_VERSION").into(),
        config.to_toml()?,
        format!("{} rows, {} labels, checksum {rows:08x}", test.records.len(), labels.len()),
        format!("{} prompts, checksum {prompts:08x}", tuned.len()),
        format!("{} in {} on {device}", session.id, format!("{:?}", session.dtype).to_lowercase()),
    ])
}

/// The arms of tuned prompts that answer in one batch.
fn arms(
    exam: &Exam,
    batch: &[Tuned],
    encoder: &Encoder,
    observer: &mut dyn EvaluationObserver,
) -> Result<Vec<Arm>> {
    let mut tasks = batch.iter().filter_map(|tuned| tuned.adapter.task.as_ref());
    exam.ranks.all(tasks.try_for_each(|task| check_beginnings(task, encoder, exam.dataset)))?;
    let name = match batch {
        [tuned] => tuned.name.clone(),
        several => format!("{} prompts", several.len()),
    };
    let prompts: Vec<_> = batch.iter().map(|tuned| Some(&tuned.adapter.prompt)).collect();
    let answers =
        exam.answer_after_each(&prompts, encoder, &mut |progress| observer.progress(&name, progress))?;
    let arm = |(tuned, answers): (&Tuned, Answers)| {
        let adapter = Some(tuned.argument().display().to_string());
        Arm { name: tuned.name.clone(), adapter, answers }
    };
    Ok(batch.iter().zip(answers).map(arm).collect())
}

/// Refuses inputs that do not begin with the text after which a prompt stands.
fn check_beginnings(task: &PromptTask, encoder: &Encoder, dataset: &Dataset) -> Result<()> {
    let Some(before) = &task.before else { return Ok(()) };
    for example in encoder.encode_dataset(dataset)?.examples {
        let problem = |problem: String| {
            Error::Invalid(format!("data.verbalizer, data.test line {}: {problem}", example.line))
        };
        before.check(&example.input).map_err(problem)?;
    }
    Ok(())
}

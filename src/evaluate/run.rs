//! A complete evaluation: one file, the base model, and every tuned prompt.

use super::exam::{Exam, Progress};
use super::{Arm, Evaluation};
use crate::config::{Config, Task};
use crate::data::labels::distinct;
use crate::data::{Dataset, Encoder, Template};
use crate::prompt::{PromptTask, Tuned};
use crate::session::Session;
use crate::{Error, Result, session};

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

/// Answers the configuration's test file with the base model after the hard prompt ([`Config::hard_prompt`] as plain text),
/// then with each tuned prompt, and compares the answers.
///
/// # Errors
/// Returns an error if there is no test file, rows are malformed or can't be encoded, a prompt has another width than
/// the model, a likelihood is not finite, or a device operation fails; and any error of `observer`.
pub fn run(
    config: &Config,
    session: &Session,
    tuned: &[Tuned],
    observer: &mut dyn EvaluationObserver,
) -> Result<Evaluation> {
    let (data, file) = (&config.data, test_file(config)?);
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
    let template = Template::parse(&data.verbalizer)?;
    let without_prompt = session::encoder(data, &session.tokenizer, &template);
    let hard_prompt = config.hard_prompt();
    let with_hard_prompt =
        Encoder { instruction: Some(hard_prompt).filter(|text| !text.is_empty()), ..without_prompt };
    let exam = Exam {
        model: &session.model,
        tokenizer: &session.tokenizer,
        dataset: &test,
        task: data.task,
        labels: &labels,
        max_rows: crate::tune::max_rows(config.train.max_rows, session.model.device()),
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
    for tuned in std::iter::once(None).chain(tuned.iter().map(Some)) {
        let name = tuned.map_or("base", |tuned| &tuned.name);
        let encoder = if tuned.is_some() { &without_prompt } else { &with_hard_prompt };
        if let Some(task) = tuned.and_then(|tuned| tuned.adapter.task.as_ref()) {
            check_beginnings(task, &without_prompt, &test)?;
        }
        let prompt = tuned.map(|tuned| &tuned.adapter.prompt);
        let answers = exam.answer(prompt, encoder, &mut |progress| observer.progress(name, progress))?;
        let adapter = tuned.map(|tuned| tuned.argument().display().to_string());
        evaluation.push(Arm { name: name.to_owned(), adapter, answers });
        observer.answered(&evaluation)?;
    }
    Ok(evaluation)
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

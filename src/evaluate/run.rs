//! The whole evaluation: one file, the base model, and every tuned prompt.

use super::exam::{Exam, Progress};
use super::{Arm, Evaluation};
use crate::config::{Config, Task};
use crate::data::labels::distinct;
use crate::data::{Dataset, Encoder, Template};
use crate::prompt::Tuned;
use crate::session;
use crate::session::Session;
use crate::{Error, Result};

/// What is told of an evaluation while it goes on.
pub trait Observer {
    /// The arm `name` got this far.
    fn progress(&mut self, name: &str, progress: Progress);

    /// The configuration's `key` names a file that was read, with its notes and warnings; before the first arm.
    fn dataset(&mut self, _key: &str, _dataset: &Dataset) {}

    /// The last arm of `so_far` is done: a place to keep what is there, lest a later arm's error lose it.
    ///
    /// # Errors
    /// Any; it ends the evaluation.
    fn answered(&mut self, so_far: &Evaluation) -> Result<()>;
}

/// The file that is evaluated on.
///
/// # Errors
/// [`Error::Invalid`] where the configuration names none.
pub fn test_file(config: &Config) -> Result<&str> {
    match config.data.test.as_str() {
        "" => Err(Error::Invalid("data.test: expected a file to evaluate on, found none".into())),
        file => Ok(file),
    }
}

/// Answers the configuration's test file with the base model behind the hard prompt (`prompt.init_text` in plain words),
/// then with each tuned prompt, and compares.
///
/// # Errors
/// No test file; rows that are malformed or can't be encoded; a prompt of another width than the model's; a likelihood
/// that is not finite; the device's; those of `observer`.
pub fn run(
    config: &Config,
    session: &Session,
    tuned: &[Tuned],
    observer: &mut dyn Observer,
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
    let plain = session::encoder(data, &session.tokenizer, &template);
    let hard_prompt = config.prompt.init_text.as_str();
    let behind_words = Encoder { instruction: Some(hard_prompt).filter(|text| !text.is_empty()), ..plain };
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
        arms: Vec::new(),
        pairs: Vec::new(),
    };
    for tuned in std::iter::once(None).chain(tuned.iter().map(Some)) {
        let name = tuned.map_or("base", |tuned| &tuned.name);
        let encoder = if tuned.is_some() { &plain } else { &behind_words };
        let prompt = tuned.map(|tuned| &tuned.adapter.prompt);
        let answers = exam.answer(prompt, encoder, &mut |progress| observer.progress(name, progress))?;
        let adapter = tuned.map(|tuned| tuned.folder.display().to_string());
        evaluation.push(Arm { name: name.to_owned(), adapter, answers });
        observer.answered(&evaluation)?;
    }
    Ok(evaluation)
}

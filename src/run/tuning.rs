//! A complete run, from a configuration to the files in its folder.

use super::position;
use super::recorder::{Rates, Recorder};
use super::teacher::TeacherData;
use super::tensorboard::EventFile;
use super::{LossKind, ModelSummary, Run, RunFolder, Status, Summary};
use crate::config::{Config, InitMethod, PromptKind, Task as TaskKind};
use crate::data::labels::distinct;
use crate::data::{Dataset, Encoded, InputHead, Template};
use crate::device::PeakMemory;
use crate::layout::CHECKPOINT;
use crate::model::memory::Parameters;
use crate::prompt::peft::{Adapter, AdapterConfig, ModelCard, PeftType, PromptTask, PromptTuningInit};
use crate::prompt::vocabulary::Vocabulary;
use crate::prompt::{Prefix, Prompt, init};
use crate::session::Session;
use crate::tune::health::{self, Health};
use crate::tune::{Ended, Kept, MemoryPlan, Observer, State, Task, Trainer};
use crate::{Error, Result, session};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Number of example inputs in a prompt's folder, to try the prompt with.
const EXAMPLES: usize = 8;

/// A run that is ready to start or to continue: data, prompt and memory plan.
pub struct Tuning<'a> {
    config: &'a Config,
    session: &'a Session,
    /// Rows and token ids for the training.
    pub train: (Dataset, Encoded),
    /// Rows and token ids for the validation loss after each epoch.
    pub validation: Option<(Dataset, Encoded)>,
    /// The same files as a teacher reads them, if the run distils one.
    pub teacher: Option<TeacherData>,
    /// The prompt before the first step of this part of the run, on the CPU.
    pub initial: Prompt,
    /// What stands before the virtual tokens; `None` if they stand at the start.
    pub before: Option<InputHead>,
    /// How the run fits into memory.
    pub plan: MemoryPlan,
    /// Warnings about the data, with hints.
    pub warnings: Vec<String>,
    /// Notes about how the files were read.
    pub notes: Vec<String>,
    /// The state from which the run continues.
    pub state: Option<State>,
}

impl<'a> Tuning<'a> {
    /// Reads and encodes the files, makes the first prompt and plans the memory. With `state` the run continues from
    /// there.
    ///
    /// # Errors
    /// Returns an error if a file, the first prompt or the device fails.
    pub fn prepare(config: &'a Config, session: &'a Session, state: Option<State>) -> Result<Self> {
        let (data, options) = (&config.data, &config.train);
        let template = Template::parse(&data.verbalizer)?;
        let encoder = session::encoder(data, &session.tokenizer, &template);
        let Some(train) = session::examples(&data.train, config, &encoder)? else {
            return Err(Error::Invalid(
                "data.train: required; expected a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file".into(),
            ));
        };
        let validation = session::examples(&data.validation, config, &encoder)?;
        let datasets = (&train.0, validation.as_ref().map(|(dataset, _)| dataset));
        let teacher = TeacherData::encode(config, session, &encoder, datasets)?;
        // Read before the first step, so that a mistake in it shows before the run and not after.
        let test = session::examples(&data.test, config, &encoder)?;
        let [of_validation, of_test] =
            [&validation, &test].map(|split| split.as_ref().map(|(dataset, _)| &dataset.records[..]));
        let mut warnings = health::data(config, &train.0.records, of_validation, of_test);
        let mut notes = Vec::new();
        let files = [("train", Some(&train)), ("validation", validation.as_ref()), ("test", test.as_ref())];
        for (split, (dataset, _)) in files.into_iter().filter_map(|(split, file)| Some((split, file?))) {
            warnings.extend(dataset.warnings.iter().map(|text| format!("data.{split}: {text}")));
            notes.extend(dataset.notes.iter().map(|text| format!("data.{split}: {text}")));
        }
        let initial = match &state {
            Some(state) => {
                state.prompt.layout().check_options(&config.prompt)?;
                state.prompt.clone()
            }
            None => init::initial(&config.prompt, &session.model, &session.tokenizer, options.seed)?,
        };
        let before = position::before(config, &encoder, files)?;
        let initial = position::placed(initial, before.as_ref(), state.as_ref())?;
        let of_teacher = teacher.as_ref().map(TeacherData::examples);
        let plan = crate::tune::plan_run(options, &session.model, &train.1.examples, &initial, of_teacher)?;
        Ok(Self {
            config,
            session,
            train,
            validation,
            teacher,
            initial,
            before,
            plan,
            warnings,
            notes,
            state,
        })
    }

    /// The trainer for [`Tuning::run`]; it is made before anything is written, so that data which can't be trained on
    /// is an error first.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::new`] and [`Trainer::resume`].
    pub fn trainer(&self) -> Result<Trainer<'_>> {
        let task = Task {
            model: &self.session.model,
            train: &self.train.1.examples,
            validation: self.validation.as_ref().map_or(&[], |(_, encoded)| &encoded.examples),
            teacher: self.teacher.as_ref().map(TeacherData::examples),
            options: &self.config.train,
            limits: self.plan.limits,
        };
        match &self.state {
            Some(state) => Trainer::resume(task, state),
            None => Trainer::new(task, &self.initial),
        }
    }

    /// Runs `trainer` and writes everything except the report: records, checkpoints, adapter, tokens, summary. All
    /// events are also passed to `watch`; `memory` measures the peak.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::run`], after the prompt learned so far is written, and [`Error::Io`].
    pub fn run(
        &self,
        trainer: &mut Trainer,
        folder: &mut RunFolder,
        memory: &mut dyn PeakMemory,
        watch: &mut dyn Observer,
    ) -> Result<Summary> {
        let records =
            (self.config.data.task == TaskKind::Classification).then_some(&self.train.0.records[..]);
        let mut summary = self.summary(folder, trainer)?;
        let schedule = health::schedule(&self.config.train, trainer.first().total_steps());
        summary.warnings.extend(schedule.filter(|text| !summary.warnings.contains(text)));
        let norms = match self.initial.layout().kind {
            PromptKind::Embeddings => Some(self.vocabulary()?.norms()?),
            PromptKind::Prefix => None,
        };
        let mut health = Health::new(&self.train.1.examples, records, norms);
        if self.teacher.is_some() {
            health = health.of_divergences();
        }
        let health = health.after(&summary.warnings);
        folder.summary(&summary)?;
        let events = match self.config.train.tensorboard {
            true => Some(EventFile::create(&folder.path, trainer.first().position().step)?),
            false => None,
        };
        let rates = Rates::sum(&super::read::steps_and_epochs(&folder.path.join(crate::layout::METRICS))?.0);
        let mut recorder = Recorder { folder, events, health, summary, rates, memory, watch };
        // The session's warnings were printed when it was opened.
        let said = &self.session.warnings;
        let mut new = recorder.summary.warnings.iter().filter(|text| !said.contains(text));
        new.try_for_each(|text| recorder.watch.warning(text))?;
        let outcome = trainer.run(&mut recorder);
        let Recorder { folder, mut summary, rates, memory, watch, .. } = recorder;
        // Also after an error: the prompt learned so far is kept.
        let kept = trainer.kept()?;
        self.write_adapter(&kept, folder)?;
        if kept.step != summary.kept_step {
            folder.set_evaluation_aside()?;
        }
        let initial = trainer.first().initial()?;
        self.write_tokens(&initial, &kept.prompt, folder)?;
        if outcome.is_ok() {
            let ended = health::Outcome {
                moved: has_moved(&initial, &kept.prompt)?,
                kept_step: kept.step,
                taken: trainer.first().position().step,
                skipped: trainer.first().skipped(),
            };
            for text in ended.warnings() {
                watch.warning(&text)?;
                summary.warnings.push(text);
            }
        }
        summary.status = status(&outcome);
        summary.reach(trainer.first().position(), trainer.first().elapsed());
        (summary.kept_step, summary.kept_epoch) = (kept.step, kept.epoch);
        (summary.train_loss, summary.validation_loss) = (kept.train_loss, kept.validation_loss);
        rates.write(&mut summary, memory);
        folder.summary(&summary)?;
        outcome.map(|_| summary)
    }

    /// Made twice: on a GPU it is a copy of the embeddings, which is not needed during the run.
    fn vocabulary(&self) -> Result<Vocabulary<'_>> {
        Vocabulary::new(self.session.model.embedding(), Some(&self.session.tokenizer))
    }

    /// Writes which tokens the virtual tokens are near; keys and values are near none.
    fn write_tokens(&self, initial: &Prefix, kept: &Prefix, folder: &RunFolder) -> Result<()> {
        if kept.kind() == PromptKind::Prefix {
            return Ok(());
        }
        let [before, after] = [initial, kept].map(|prefix| prefix.embeddings("tokens.json"));
        folder.tokens(&self.vocabulary()?.compare(before?, after?)?)
    }

    /// The summary of a run before its first step.
    fn summary(&self, folder: &RunFolder, trainer: &Trainer) -> Result<Summary> {
        let (session, position) = (self.session, trainer.first().position());
        let config = session.model.config();
        let earlier = match &self.state {
            Some(_) => Some(Run::read(&folder.path)?.summary),
            None => None,
        };
        let mut warnings = earlier.as_ref().map_or(Vec::new(), |summary| summary.warnings.clone());
        warnings.retain(|text| !health::is_outdated(text));
        let found = self.session.warnings.iter().chain(&self.warnings);
        warnings.extend(found.filter(|text| !warnings.contains(text)).cloned().collect::<Vec<_>>());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Summary {
            status: Status::Running,
            version: env!("CARGO_PKG_VERSION").into(),
            started: earlier.as_ref().map_or(now, |summary| summary.started),
            model: ModelSummary {
                id: session.id.clone(),
                format: session.format.clone(),
                dtype: format!("{:?}", session.dtype).to_lowercase(),
                device: crate::device::kind(session.model.device()).into(),
                parameters: Parameters::new(config).total(),
                num_hidden_layers: config.num_hidden_layers,
                hidden_size: config.hidden_size,
                vocab_size: config.vocab_size,
            },
            init_method: self.config.prompt.init_method,
            num_virtual_tokens: self.initial.num_virtual_tokens(),
            trainable_parameters: self.initial.elem_count(),
            layout: Some(*self.initial.layout()).filter(|layout| !layout.is_plain_embeddings()),
            train_examples: self.train.1.examples.len(),
            validation_examples: self.validation.as_ref().map_or(0, |(_, encoded)| encoded.examples.len()),
            steps: position.step,
            total_steps: trainer.first().total_steps(),
            skipped_steps: position.skipped,
            epochs: position.last.epoch,
            kept_step: earlier.as_ref().map_or(0, |summary| summary.kept_step),
            kept_epoch: earlier.as_ref().map_or(0, |summary| summary.kept_epoch),
            loss: LossKind::new(self.config),
            train_loss: earlier.as_ref().and_then(|summary| summary.train_loss),
            validation_loss: earlier.as_ref().and_then(|summary| summary.validation_loss),
            seconds: position.elapsed,
            examples_per_second: earlier.as_ref().map_or(0.0, |summary| summary.examples_per_second),
            peak_memory_bytes: earlier.as_ref().and_then(|summary| summary.peak_memory_bytes),
            resumed: earlier.as_ref().map_or(0, |summary| summary.resumed + 1),
            warnings,
        })
    }

    fn write_adapter(&self, kept: &Kept, folder: &RunFolder) -> Result<()> {
        let (config, session) = (self.config, self.session);
        let init = match config.prompt.init_method {
            InitMethod::Text => PromptTuningInit::Text,
            InitMethod::Vocab => PromptTuningInit::SampleVocab,
            InitMethod::Random | InitMethod::File => PromptTuningInit::Random,
        };
        let init_text = Some(config.prompt.init_text.as_str()).filter(|_| init == PromptTuningInit::Text);
        let rows = kept.prompt.num_virtual_tokens();
        let (id, model) = (&session.id, session.model.config());
        let adapter = match &kept.prompt {
            Prefix::Embeddings(_) => AdapterConfig::new(id, model, rows, init, init_text),
            Prefix::EmbeddingsAfter { .. } => AdapterConfig {
                peft_type: PeftType::GneissPromptTuning,
                ..AdapterConfig::new(id, model, rows, init, init_text)
            },
            // The card shows the text; PEFT's configuration of this method has no key for it.
            Prefix::KeysValues(_) => AdapterConfig {
                prompt_tuning_init_text: init_text.map(str::to_owned),
                ..AdapterConfig::keys_values(id, model, rows, config.prompt.frozen_tokens)
            },
        };
        let train = &config.train;
        let settings: [(&str, String); 8] = [
            ("learning rate", train.learning_rate.to_string()),
            ("schedule", format!("{}, warm-up {}", train.schedule, train.warmup_ratio)),
            ("examples per step", (train.batch_size * train.accumulate_steps).to_string()),
            ("epochs", train.num_epochs.to_string()),
            ("weight decay", train.weight_decay.to_string()),
            ("gradient norm limit", train.max_grad_norm.to_string()),
            ("seed", train.seed.to_string()),
            ("init", format!("{}{}", config.prompt.init_method, self.initial.layout())),
        ];
        let mut hyperparameters = settings.map(|(key, value)| (key.to_owned(), value)).to_vec();
        if let Some(teacher) = &self.teacher {
            let loss = format!("{}, a text of {} tokens", LossKind::new(config).unit(), teacher.text_tokens);
            hyperparameters.push(("loss".into(), loss));
        }
        let card = ModelCard {
            name: config.name.clone(),
            task: config.data.task.to_string(),
            verbalizer: config.data.verbalizer.clone(),
            before: self.before.as_ref().map(|before| before.text.clone()),
            max_output_tokens: Some(config.data.max_output_tokens),
            hyperparameters,
            num_steps: Some(kept.step),
            train_loss: kept.train_loss,
            validation_loss: kept.validation_loss,
        };
        let task = Some(self.prompt_task());
        Adapter { prompt: kept.prompt.clone(), config: adapter, task }.write(&folder.adapter(), &card)
    }

    /// The task of the prompt, with the first inputs that it was not trained on.
    fn prompt_task(&self) -> PromptTask {
        let data = &self.config.data;
        let seen = [Some(&self.train.0), self.validation.as_ref().map(|(dataset, _)| dataset)];
        let labels = match data.task {
            TaskKind::Classification => distinct(seen.iter().flatten().flat_map(|dataset| &dataset.records)),
            TaskKind::Generation => Vec::new(),
        };
        let (unseen, _) = self.validation.as_ref().unwrap_or(&self.train);
        PromptTask {
            task: data.task,
            verbalizer: data.verbalizer.clone(),
            labels,
            hard_prompt: self.config.hard_prompt().to_owned(),
            before: self.before.clone(),
            max_output_tokens: data.max_output_tokens,
            examples: unseen.records.iter().take(EXAMPLES).map(|record| record.input.clone()).collect(),
        }
    }
}

/// Whether a prompt has other values than before.
fn has_moved(before: &Prefix, after: &Prefix) -> Result<bool> {
    let [before, after] = [before, after].map(|prefix| prefix.values().flatten_all()?.to_vec1::<f32>());
    Ok(before? != after?)
}

/// The state of the run in `folder`, and its configuration overridden by `sets` (`key=value`).
///
/// # Errors
/// Returns an error if the folder is no run, has no checkpoint, or a setting can't be changed in a started run.
pub fn resumable(folder: &Path, sets: &[String]) -> Result<(Config, State)> {
    let run = Run::read(folder)?;
    let path = folder.join(CHECKPOINT);
    if !path.is_file() {
        return Err(Error::Checkpoint {
            path: folder.to_path_buf(),
            problem: format!(
                "expected a run with {CHECKPOINT}, found none: it ended before its first checkpoint (one an epoch, and \
                 one every train.checkpoint_steps); start it again with gneiss tune {}",
                folder.join(crate::layout::CONFIG).display()
            ),
        });
    }
    let state = State::read(&path)?;
    let config =
        Config::parse(&run.config_toml, &folder.join(crate::layout::CONFIG).display().to_string(), sets)?;
    // Settings that may differ between the parts of a run, because the checkpoint does not depend on them.
    let before = &run.config.train;
    let mut same = config.clone();
    same.data.test.clone_from(&run.config.data.test);
    same.model.clone_from(&run.config.model);
    same.train.num_epochs = before.num_epochs;
    same.train.max_steps = before.max_steps;
    same.train.early_stopping = before.early_stopping;
    same.train.checkpoint_steps = before.checkpoint_steps;
    same.train.tensorboard = before.tensorboard;
    same.train.learning_rate = before.learning_rate;
    same.train.schedule = before.schedule;
    same.train.keep = before.keep;
    same.train.on_not_finite = before.on_not_finite;
    same.train.memory_budget.clone_from(&before.memory_budget);
    if same != run.config {
        return Err(Error::Invalid(format!(
            "--resume: expected the settings that the run began with, found others ({}); a run under way can change \
             train.num_epochs, max_steps, learning_rate, schedule, keep, early_stopping, checkpoint_steps, tensorboard, \
             on_not_finite and memory_budget, model.*, and data.test; start a new run for other changes",
            run.config.changed_keys(&same)?.join(", ")
        )));
    }
    Ok((config, state))
}

/// The status of a run that ended in this way.
fn status(outcome: &Result<Ended>) -> Status {
    match outcome {
        Ok(Ended::Completed) => Status::Completed,
        Ok(Ended::StoppedEarly) => Status::StoppedEarly,
        Ok(Ended::Interrupted) => Status::Interrupted,
        Err(error) => Status::Failed { error: error.to_string() },
    }
}

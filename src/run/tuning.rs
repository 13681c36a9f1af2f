//! A complete run, from a configuration to the files in its folder.

use super::position;
use super::recorder::{Rates, Recorder};
use super::teacher::TeacherData;
use super::tensorboard::EventFile;
use super::{LossKind, ModelSummary, Run, RunFolder, Status, Summary, TuningData};
use crate::Result;
use crate::config::{Config, InitMethod, PromptKind, Task as TaskKind};
use crate::data::labels::distinct;
use crate::data::{InputHead, Template};
use crate::device::PeakMemory;
use crate::model::Decoder;
use crate::model::memory::Parameters;
use crate::prompt::peft::{Adapter, AdapterConfig, ModelCard, PeftType, PromptTask, PromptTuningInit};
use crate::prompt::vocabulary::Vocabulary;
use crate::prompt::{Prefix, Prompt, init};
use crate::session::Session;
use crate::tune::health::{self, Health};
use crate::tune::{Kept, MemoryPlan, Observer, PromptRun, RunExamples, State, Task, Trainer};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Number of example inputs in a prompt's folder, to try the prompt with.
const EXAMPLES: usize = 8;

/// A run that is ready to start or to continue: data, prompt and memory plan.
pub struct Tuning<'a> {
    config: &'a Config,
    session: &'a Session,
    /// The files.
    pub data: Rc<TuningData>,
    /// The prompt before the first step of this part of the run, on the CPU.
    pub initial: Prompt,
    /// What stands before the virtual tokens; `None` if they stand at the start.
    pub before: Option<InputHead>,
    /// How the run fits into memory.
    pub plan: MemoryPlan,
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
        Self::with_data(config, session, Rc::new(TuningData::read(config, session)?), state)
    }

    /// As [`Tuning::prepare`], of files that were read with the same `[data]`.
    ///
    /// # Errors
    /// Returns an error if the first prompt or the device fails.
    pub fn with_data(
        config: &'a Config,
        session: &'a Session,
        data: Rc<TuningData>,
        state: Option<State>,
    ) -> Result<Self> {
        let options = &config.train;
        let initial = match &state {
            Some(state) => {
                state.prompt.layout().check_options(&config.prompt)?;
                state.prompt.clone()
            }
            None => init::initial(&config.prompt, &session.model, &session.tokenizer, options.seed)?,
        };
        let template = Template::parse(&config.data.verbalizer)?;
        let encoder = crate::session::encoder(&config.data, &session.tokenizer, &template);
        let before = position::before(config, &encoder, data.files())?;
        let initial = position::placed(initial, before.as_ref(), state.as_ref())?;
        let teacher = data.teacher.as_ref().map(TeacherData::examples);
        let plan = crate::tune::plan_run(options, &session.model, &data.train.1.examples, &initial, teacher)?;
        Ok(Self { config, session, data, initial, before, plan, state })
    }

    /// The frozen model.
    pub fn model(&self) -> &'a Decoder {
        &self.session.model
    }

    /// The trainer for [`Tuning::run`]; it is made before anything is written, so that data which can't be trained on
    /// is an error first.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::new`] and [`Trainer::resume`].
    pub fn trainer(&self) -> Result<Trainer<'_>> {
        let RunExamples { train, validation, teacher } = self.examples();
        let (model, limits) = (&self.session.model, self.plan.limits);
        let task = Task { model, train, validation, teacher, options: &self.config.train, limits };
        match &self.state {
            Some(state) => Trainer::resume(task, state),
            None => Trainer::new(task, &self.initial),
        }
    }

    /// The run for a trainer of several.
    ///
    /// # Errors
    /// Returns the errors of [`PromptRun::new`] and [`PromptRun::resume`].
    pub fn prompt_run(&self) -> Result<PromptRun<'_>> {
        let (model, options) = (&self.session.model, &self.config.train);
        match &self.state {
            Some(state) => PromptRun::resume(model, self.examples(), options, state),
            None => PromptRun::new(model, self.examples(), options, &self.initial),
        }
    }

    fn examples(&self) -> RunExamples<'_> {
        let TuningData { train, teacher, .. } = &*self.data;
        RunExamples {
            train: &train.1.examples,
            validation: self.data.validation_examples(),
            teacher: teacher.as_ref().map(TeacherData::examples),
        }
    }

    /// Runs `trainer` and writes everything except the report: records, checkpoints, adapter, tokens, summary. All
    /// events are also passed to `watch`; `memory` measures the peak.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::run`], after the prompt learned so far is written, and [`crate::Error::Io`].
    pub fn run(
        &self,
        trainer: &mut Trainer,
        folder: &mut RunFolder,
        memory: &mut dyn PeakMemory,
        watch: &mut dyn Observer,
    ) -> Result<Summary> {
        let mut recorder = self.recorder(trainer.first(), folder, memory, watch)?;
        let outcome = trainer.run(&mut recorder);
        let summary = self.finish(trainer.first(), recorder, Status::new(&outcome))?;
        outcome.map(|_| summary)
    }

    /// The embeddings of the vocabulary. They are made again when they are needed: on a GPU they are a copy, which is not
    /// needed during the run.
    fn vocabulary(&self) -> Result<Vocabulary<'_>> {
        Vocabulary::new(self.session.model.embedding(), Some(&self.session.tokenizer))
    }

    /// The observer that writes the records and checkpoints of `run` into `folder`; all events are also passed to `watch`.
    ///
    /// # Errors
    /// Returns [`crate::Error::Io`] if a file can't be read or written, and the errors of `watch`.
    pub fn recorder<'r>(
        &self,
        run: &PromptRun,
        folder: &'r mut RunFolder,
        memory: &'r mut dyn PeakMemory,
        watch: &'r mut dyn Observer,
    ) -> Result<Recorder<'r>> {
        let (train, encoded) = &self.data.train;
        let records = (self.config.data.task == TaskKind::Classification).then_some(&train.records[..]);
        let mut summary = self.summary(folder, run)?;
        let schedule = health::schedule(&self.config.train, run.total_steps());
        summary.warnings.extend(schedule.filter(|text| !summary.warnings.contains(text)));
        let norms = match self.initial.kind() {
            PromptKind::Embeddings => Some(self.vocabulary()?.norms()?),
            PromptKind::Prefix => None,
        };
        let mut health = Health::new(&encoded.examples, records, norms);
        if self.data.teacher.is_some() {
            health = health.of_divergences();
        }
        let (steps, epochs) = super::read::steps_and_epochs(&folder.path.join(crate::layout::METRICS))?;
        let health = health.replay(&steps, &epochs).after(&summary.warnings);
        folder.summary(&summary)?;
        let events = match self.config.train.tensorboard {
            true => Some(EventFile::create(&folder.path, run.position().step)?),
            false => None,
        };
        let recorder = Recorder { folder, events, health, summary, rates: Rates::sum(&steps), memory, watch };
        // The session's warnings were printed when it was opened.
        let said = &self.session.warnings;
        let mut new = recorder.summary.warnings.iter().filter(|text| !said.contains(text));
        new.try_for_each(|text| recorder.watch.warning(text))?;
        Ok(recorder)
    }

    /// Writes the prompt that `run` keeps, the tokens and the summary. A paused run gets its tokens when it has ended.
    ///
    /// # Errors
    /// Returns [`crate::Error::Io`] if a file can't be written, an error if a device operation fails, and the observer's errors.
    pub fn finish(&self, run: &PromptRun, recorder: Recorder, status: Status) -> Result<Summary> {
        let Recorder { folder, mut summary, rates, memory, watch, .. } = recorder;
        // Also after an error: the prompt learned so far is kept.
        let kept = run.kept()?;
        self.write_adapter(&kept, folder)?;
        if kept.step != summary.kept_step {
            folder.set_evaluation_aside()?;
        }
        let initial = run.initial()?;
        // Keys and values are near no token.
        if kept.prompt.kind() == PromptKind::Embeddings && status != Status::Paused {
            let [before, after] = [&initial, &kept.prompt].map(|prefix| prefix.embeddings("tokens.json"));
            folder.tokens(&self.vocabulary()?.compare(before?, after?)?)?;
        }
        if !matches!(status, Status::Failed { .. } | Status::Paused | Status::Pruned) {
            let ended = health::Outcome {
                moved: !initial.has_values_of(&kept.prompt)?,
                kept_step: kept.step,
                taken: run.position().step,
                skipped: run.skipped(),
            };
            for text in ended.warnings() {
                watch.warning(&text)?;
                summary.warnings.push(text);
            }
        }
        summary.status = status;
        summary.reach(run.position(), run.elapsed());
        (summary.kept_step, summary.kept_epoch) = (kept.step, kept.epoch);
        (summary.train_loss, summary.validation_loss) = (kept.train_loss, kept.validation_loss);
        rates.write(&mut summary, memory);
        folder.summary(&summary)?;
        Ok(summary)
    }

    /// The summary of a run before its first step.
    fn summary(&self, folder: &RunFolder, run: &PromptRun) -> Result<Summary> {
        let (session, position) = (self.session, run.position());
        let config = session.model.config();
        let earlier = match &self.state {
            Some(_) => Some(Run::read(&folder.path)?.summary),
            None => None,
        };
        let mut warnings = earlier.as_ref().map_or(Vec::new(), |summary| summary.warnings.clone());
        warnings.retain(|text| !health::is_outdated(text));
        let found = session.warnings.iter().chain(&self.data.warnings);
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
            train_examples: self.examples().train.len(),
            validation_examples: self.examples().validation.len(),
            steps: position.step,
            total_steps: run.total_steps(),
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
            // The next epoch of a trial of a sweep is no resumption.
            resumed: earlier
                .as_ref()
                .map_or(0, |summary| summary.resumed + usize::from(summary.status != Status::Paused)),
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
        if let Some(teacher) = &self.data.teacher {
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
        let TuningData { train, validation, .. } = &*self.data;
        let seen = [Some(&train.0), validation.as_ref().map(|(dataset, _)| dataset)];
        let labels = match data.task {
            TaskKind::Classification => distinct(seen.iter().flatten().flat_map(|dataset| &dataset.records)),
            TaskKind::Generation => Vec::new(),
        };
        let (unseen, _) = validation.as_ref().unwrap_or(train);
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

//! watsonx's parameters of prompt tuning as a configuration of gneiss.
//!
//! Each parameter is one key. What watsonx has no parameter for, such as the number of virtual tokens, is in the profile:
//! settings `KEY=VALUE` that are applied last. If the profile changes a value that the client asked for, the answer has a
//! warning.

use crate::config::{Config, DataOptions, InitMethod, Keep, ModelOptions, PromptOptions, Task, TrainOptions};
use crate::data::Template;
use crate::serve::api_error::ApiError;
use crate::serve::fields::{FieldTable, Off, RefusedFields, refused};
use crate::serve::params::{Fields, OVER_0};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Number of virtual tokens of the service, which has no parameter for it.
const NUM_VIRTUAL_TOKENS: usize = 100;
/// Largest counts of steps, examples, epochs and tokens.
const MOST: usize = 100_000;
/// Optimizer steps between two checkpoints: what is lost if the process is killed.
const CHECKPOINT_STEPS: usize = 10;
/// Keys that the service itself sets.
const RESERVED: [&str; 8] =
    ["name", "runs", "model.", "data.train", "data.validation", "data.test", "data.input", "data.output"];

/// Fields of `POST /ml/v4/trainings`.
pub static TRAINING: FieldTable = FieldTable {
    request: "/ml/v4/trainings",
    obeyed: &[&[
        "name", "description", "project_id", "space_id", "tags", "auto_update_model",
        "training_data_references", "results_reference", "prompt_tuning",
    ]],
    without_effect: &[],
    refused: &[OTHER_TRAININGS],
    nested: &[("prompt_tuning", &PROMPT_TUNING)],
};

const OTHER_TRAININGS: &[RefusedFields] = &[
    refused(
        &[
            "fine_tuning", "federated_learning", "pipeline", "experiment", "model_definition",
            "model_definitions", "parameters",
        ],
        Off::Empty,
        "this server tunes prompts only; use `prompt_tuning`",
    ),
    refused(&["test_data_references"], Off::Empty, "not offered here; deploy the model and ask it"),
];

static PROMPT_TUNING: FieldTable = FieldTable {
    request: "`prompt_tuning`",
    obeyed: &[&[
        "base_model", "task_id", "tuning_type", "accumulate_steps", "batch_size", "learning_rate",
        "num_epochs", "max_input_tokens", "max_output_tokens", "init_method", "init_text", "verbalizer",
    ]],
    without_effect: &[],
    refused: &[],
    nested: &[],
};

/// A configuration with what the client is told about it.
pub struct TuningParameters {
    /// The configuration, without files and model.
    pub config: Config,
    /// The parameters that are used, in watsonx's words.
    pub prompt_tuning: Map<String, Value>,
    /// Values that differ from what the client asked for.
    pub warnings: Vec<String>,
}

/// Settings that are applied after the client's parameters.
#[derive(Debug, Clone, Default)]
pub struct TuningProfile(Vec<String>);

impl TuningProfile {
    /// The settings `KEY=VALUE`.
    ///
    /// # Errors
    /// Returns an error if a key does not exist or belongs to the service, or a value is invalid.
    pub fn new(sets: Vec<String>) -> Result<Self> {
        Self::default().with("--set", sets)
    }

    /// The settings of the table `[watsonx]` of a TOML file.
    ///
    /// # Errors
    /// Returns an error if the file can't be read, has another table or none, a key does not exist or belongs to the
    /// service, or a value is invalid.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let name = path.display().to_string();
        let invalid = |problem: String| Error::Invalid(format!("{name}: {problem}"));
        let mut file: toml::Table = toml::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        let settings = match file.remove("watsonx") {
            Some(toml::Value::Table(table)) => settings("", table),
            _ => return Err(invalid("expected the table [watsonx], found none".into())),
        };
        if let Some(other) = file.keys().next() {
            return Err(invalid(format!("expected the table [watsonx] alone, found {other}")));
        }
        Self::default().with(&name, settings)
    }

    /// These settings, and then `sets`, which come from `source`.
    ///
    /// # Errors
    /// Returns an error if a key does not exist or belongs to the service, or a value is invalid.
    pub fn with(mut self, source: &str, sets: Vec<String>) -> Result<Self> {
        for set in &sets {
            let key = set.split('=').next().unwrap_or_default().trim();
            if RESERVED
                .iter()
                .any(|reserved| key == *reserved || (reserved.ends_with('.') && key.starts_with(reserved)))
            {
                let problem = format!(
                    "{source} {set}: expected a key that the service does not set itself, found {key}"
                );
                return Err(Error::Invalid(problem));
            }
        }
        self.0.extend(sets);
        // As in the notebook: a profile may ask for as many virtual tokens as the initial text has.
        let mut config = defaults();
        (config.prompt.init_method, config.prompt.init_text) = (InitMethod::Text, "text".into());
        Config::parse(&config.to_toml()?, source, &self.0)?;
        Ok(self)
    }

    fn apply(&self, config: &Config) -> Result<Config> {
        Config::parse(&config.to_toml()?, "prompt_tuning", &self.0)
    }
}

/// The values of a table as `KEY=VALUE`, with the names of the tables above as `prefix`.
fn settings(prefix: &str, table: toml::Table) -> Vec<String> {
    let setting = |(key, value)| match value {
        toml::Value::Table(table) => settings(&format!("{prefix}{key}."), table),
        value => vec![format!("{prefix}{key}={value}")],
    };
    table.into_iter().flat_map(setting).collect()
}

/// watsonx's defaults. The model and the files are set when the run starts.
fn defaults() -> Config {
    Config {
        name: "run".into(),
        model: ModelOptions { id: "model".into(), ..ModelOptions::default() },
        prompt: PromptOptions {
            init_method: InitMethod::Random,
            num_virtual_tokens: NUM_VIRTUAL_TOKENS,
            ..PromptOptions::default()
        },
        data: DataOptions {
            train: "train".into(),
            max_input_tokens: 256,
            max_output_tokens: 128,
            verbalizer: "Input: {{input}} Output:".into(),
            ..DataOptions::default()
        },
        train: TrainOptions {
            accumulate_steps: 16,
            batch_size: 16,
            learning_rate: 0.3,
            num_epochs: 20,
            keep: Keep::Last,
            checkpoint_steps: CHECKPOINT_STEPS,
            ..TrainOptions::default()
        },
        ..Config::default()
    }
}

impl TuningParameters {
    /// Reads the object `prompt_tuning`.
    ///
    /// # Errors
    /// Returns 400 if a value is invalid.
    pub fn read(
        fields: &Fields,
        base_model: &str,
        profile: &TuningProfile,
    ) -> std::result::Result<Self, ApiError> {
        if let Some(kind) = fields.string("tuning_type")?.filter(|kind| *kind != "prompt_tuning") {
            let problem = format!("expected \"prompt_tuning\", found {kind:?}");
            return Err(ApiError::invalid("prompt_tuning.tuning_type", problem));
        }
        let task = fields.string("task_id")?;
        let mut config = defaults();
        config.data.task =
            if task == Some("classification") { Task::Classification } else { Task::Generation };
        read_values(fields, &mut config)?;
        let asked = values(&config);
        let config = profile.apply(&config).map_err(|error| ApiError::invalid("prompt_tuning", error))?;
        let mut warnings = Vec::new();
        let used = values(&config);
        for ((key, asked), (_, used)) in asked.iter().zip(&used) {
            if asked != used && fields.get(key).is_some() {
                warnings
                    .push(format!("`{key}`: {asked} was asked for, and this server's profile uses {used}"));
            }
        }
        if let Some(text) = fields.string("init_text")?
            && config.prompt.init_method != InitMethod::Text
        {
            warnings.push(format!(
                "`init_text`: {text:?} is not used, because `init_method` is {:?}",
                config.prompt.init_method.to_string()
            ));
        }
        let mut prompt_tuning = Map::new();
        prompt_tuning.insert("base_model".into(), json!({"model_id": base_model}));
        prompt_tuning.insert("task_id".into(), task.unwrap_or("generation").into());
        prompt_tuning.insert("tuning_type".into(), "prompt_tuning".into());
        prompt_tuning.extend(used.into_iter().map(|(key, value)| (key.to_owned(), value)));
        prompt_tuning.insert("num_virtual_tokens".into(), config.prompt.num_virtual_tokens.into());
        if config.prompt.init_method == InitMethod::Text {
            prompt_tuning.insert("init_text".into(), config.prompt.init_text.clone().into());
        }
        Ok(Self { config, prompt_tuning, warnings })
    }
}

/// Sets the values that the client asks for.
fn read_values(fields: &Fields, config: &mut Config) -> std::result::Result<(), ApiError> {
    let (data, train) = (&mut config.data, &mut config.train);
    for (key, value) in [
        ("accumulate_steps", &mut train.accumulate_steps),
        ("batch_size", &mut train.batch_size),
        ("num_epochs", &mut train.num_epochs),
        ("max_input_tokens", &mut data.max_input_tokens),
        ("max_output_tokens", &mut data.max_output_tokens),
    ] {
        *value = fields.count(key, 1..=MOST)?.unwrap_or(*value);
    }
    train.learning_rate = fields.number("learning_rate", OVER_0..=1e3)?.unwrap_or(train.learning_rate);
    if let Some(verbalizer) = fields.string("verbalizer")? {
        Template::parse(verbalizer).map_err(|error| ApiError::invalid("prompt_tuning.verbalizer", error))?;
        data.verbalizer = verbalizer.to_owned();
    }
    let prompt = &mut config.prompt;
    match fields.string("init_method")? {
        None | Some("random") => {}
        Some("text") => {
            let text = fields.string("init_text")?.filter(|text| !text.is_empty());
            let expected = "a text, because `init_method` is \"text\"";
            let text = text.ok_or_else(|| ApiError::missing("prompt_tuning.init_text", expected))?;
            (prompt.init_method, prompt.init_text) = (InitMethod::Text, text.to_owned());
        }
        Some(other) => {
            let problem = format!("expected \"random\" or \"text\", found {other:?}");
            return Err(ApiError::invalid("prompt_tuning.init_method", problem));
        }
    }
    Ok(())
}

/// The values of a configuration in watsonx's words.
fn values(config: &Config) -> Vec<(&'static str, Value)> {
    let (data, train, prompt) = (&config.data, &config.train, &config.prompt);
    vec![
        ("accumulate_steps", train.accumulate_steps.into()),
        ("batch_size", train.batch_size.into()),
        ("learning_rate", train.learning_rate.into()),
        ("num_epochs", train.num_epochs.into()),
        ("max_input_tokens", data.max_input_tokens.into()),
        ("max_output_tokens", data.max_output_tokens.into()),
        ("init_method", prompt.init_method.to_string().into()),
        ("verbalizer", data.verbalizer.clone().into()),
    ]
}

#[cfg(test)]
mod tests;

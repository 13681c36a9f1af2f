//! What the store keeps, one JSON file each.

use crate::calendar;
use crate::config::Config;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// A point in time, milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    /// The time now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// The time as IBM's SDK reads it: with three digits of a second, and `Z`.
    pub fn text(self) -> String {
        calendar::timestamp(UNIX_EPOCH + Duration::from_millis(self.0))
    }

    /// The time `seconds` later.
    pub fn after(self, seconds: f64) -> Self {
        Self(self.0.saturating_add((seconds.max(0.0) * 1000.0) as u64))
    }
}

/// A new id: 36 characters, as IBM's SDK expects.
pub fn new_id() -> String {
    Uuid::new_v8(rand::random()).to_string()
}

/// The project or space that something belongs to. Any text is one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectOrSpace {
    /// The project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<String>,
    /// The space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space_id: Option<String>,
}

/// A data asset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asset {
    /// Its id.
    pub id: String,
    /// Its name, any text.
    pub name: String,
    /// A description, any text.
    pub description: String,
    /// Where it belongs.
    pub place: ProjectOrSpace,
    /// What the client said about the data, such as its MIME type.
    pub entity: Map<String, Value>,
    /// When it was made.
    pub created: Moment,
    /// Its file, once a client has said that it will send one.
    pub attachment: Option<Attachment>,
}

/// The file of a data asset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub id: String,
    /// Its name, any text.
    pub name: String,
    /// Its MIME type as the client gave it, any text.
    pub mime: String,
    /// Length of the content; `None` until it is received.
    pub bytes: Option<u64>,
    /// Whether the client has said that the content is complete.
    pub complete: bool,
}

/// The state of a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainingState {
    /// It waits until the device is free.
    Pending,
    /// Its steps run.
    Running,
    /// Its steps are done, and the model is being stored.
    Storing,
    /// It is done.
    Completed,
    /// It ended by an error.
    Failed,
    /// A client ended it.
    Canceled,
}

impl TrainingState {
    /// watsonx's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Storing => "storing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }

    /// Whether nothing more happens to it.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Canceled)
    }
}

/// A tuning run that a client asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Its id.
    pub id: String,
    /// Its name, any text.
    pub name: String,
    /// A description, any text.
    pub description: String,
    /// Where it belongs.
    pub place: ProjectOrSpace,
    /// The local model's own name.
    #[serde(default)]
    pub local_model: String,
    /// The client's tags, and the one by which the SDK finds the experiment.
    pub tags: Vec<String>,
    /// The id in that tag.
    pub experiment: String,
    /// The data, as the client wrote it.
    pub training_data_references: Value,
    /// The place for results, as the client wrote it.
    pub results_reference: Map<String, Value>,
    /// The parameters that are used, in watsonx's words.
    pub prompt_tuning: Map<String, Value>,
    /// The configuration of the run, with the names of files in the training's folder.
    pub config: Config,
    /// The file of the examples in the training's folder.
    pub data_file: String,
    /// The data asset's name, for messages.
    pub data_name: String,
    /// Whether the model is stored at the end.
    pub auto_update_model: bool,
    /// The id that the model gets.
    pub model: String,
    /// Its state.
    pub state: TrainingState,
    /// Whether a client has deleted it; its folder is removed as soon as no one writes to it.
    pub deleted: bool,
    /// Why it failed.
    pub failure: Option<String>,
    /// What differs from what the client asked for.
    pub warnings: Vec<String>,
    /// When it was made.
    pub created: Moment,
    /// When its state changed last.
    pub modified: Moment,
    /// When its first step began.
    pub started: Option<Moment>,
    /// When it ended.
    pub ended: Option<Moment>,
}

impl Training {
    /// The base model by the name that the client used.
    pub fn base_model(&self) -> &str {
        self.prompt_tuning["base_model"]["model_id"].as_str().unwrap_or_default()
    }

    /// Changes the state, now.
    pub fn set_state(&mut self, state: TrainingState) {
        let now = Moment::now();
        self.state = state;
        self.modified = now;
        if state == TrainingState::Running {
            self.started.get_or_insert(now);
        }
        if state.is_final() {
            self.ended = Some(now);
        }
    }
}

/// A tuned prompt that a training has stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredModel {
    /// Its id.
    pub id: String,
    /// Its name, any text.
    pub name: String,
    /// A description, any text.
    pub description: String,
    /// Where it belongs.
    pub place: ProjectOrSpace,
    /// The local model's own name.
    #[serde(default)]
    pub local_model: String,
    /// The training that made it.
    pub training: String,
    /// That training's data, as the client wrote it; null in records of earlier versions.
    #[serde(default)]
    pub training_data_references: Value,
    /// The base model by the name that the client used.
    pub base_model: String,
    /// When it was made.
    pub created: Moment,
}

/// A model that requests can use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// Its id.
    pub id: String,
    /// Its name, any text.
    pub name: String,
    /// A description, any text.
    pub description: String,
    /// The client's tags.
    pub tags: Vec<String>,
    /// Where it belongs.
    pub place: ProjectOrSpace,
    /// The model's id.
    pub model: String,
    /// The base model by the name that the client used.
    pub base_model: String,
    /// The name in addresses, besides the id.
    pub serving_name: Option<String>,
    /// When it was made.
    pub created: Moment,
    /// When it was changed last.
    pub modified: Moment,
}

impl Deployment {
    /// The name under which the model is served.
    pub fn served_name(&self) -> &str {
        self.serving_name.as_deref().unwrap_or(&self.id)
    }
}

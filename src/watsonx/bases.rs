//! The base models of a service: each has a name of its own and names of other models, for which it stands in.

use crate::checkpoint::TextTokenizer;
use crate::serve::client::Client;
use crate::{Error, Result};

/// A local model that can be tuned and asked.
#[derive(Clone)]
pub struct TunableModel {
    /// Its own name: the folder, file or hub id.
    pub name: String,
    /// Names of other models for which it stands in.
    pub aliases: Vec<String>,
    /// The handle to its thread.
    pub client: Client,
    /// Its tokenizer.
    pub tokenizer: TextTokenizer,
    /// Whether its checkpoint has a chat template.
    pub chats: bool,
}

impl TunableModel {
    /// All names, its own one first.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.name).chain(&self.aliases)
    }
}

/// The base models; there is one at least.
pub struct TunableModels(Vec<TunableModel>);

impl TunableModels {
    /// The base models of a service.
    ///
    /// # Errors
    /// Returns an error if there is none, or two have the same name.
    pub fn new(models: Vec<TunableModel>) -> Result<Self> {
        if models.is_empty() {
            return Err(Error::Invalid("expected one base model at least, found none".into()));
        }
        let mut names: Vec<&String> = models.iter().flat_map(TunableModel::names).collect();
        names.sort();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let problem = format!("expected one base model of each name, found two of the name {}", pair[0]);
            return Err(Error::Invalid(problem));
        }
        Ok(Self(models))
    }

    /// All base models.
    pub fn iter(&self) -> impl Iterator<Item = &TunableModel> {
        self.0.iter()
    }

    /// The base model of this name, its own or another one.
    pub fn get(&self, name: &str) -> Option<&TunableModel> {
        self.iter().find(|model| model.names().any(|own| own == name))
    }

    /// The base model of a record: the one named `local` when the record was made, otherwise the one that stands in for
    /// `name` now, otherwise the only one.
    ///
    /// # Errors
    /// Returns an error if there are several and none of them has such a name.
    pub fn of_record(&self, local: &str, name: &str) -> Result<&TunableModel> {
        let own = self.iter().find(|model| model.name == local);
        let only = || self.0.first().filter(|_| self.0.len() == 1);
        own.or_else(|| self.get(name)).or_else(only).ok_or_else(|| {
            let names: Vec<&str> = self.iter().map(|model| model.name.as_str()).collect();
            let problem = format!(
                "expected the base model {local} ({name}), found {}; hint: --model",
                names.join(", ")
            );
            Error::Invalid(problem)
        })
    }
}

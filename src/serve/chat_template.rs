//! The checkpoint's own chat template: a Jinja text that makes one text of a conversation, rendered as transformers
//! renders it (`transformers/utils/chat_template_utils.py`).

use super::{clock, pythonic};
use crate::{Error, Result};
use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::SystemTime;

/// A chat template, and the special tokens that it may write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplate {
    /// The Jinja text.
    pub template: String,
    /// `bos_token`, `eos_token` and the like.
    pub special_tokens: BTreeMap<String, String>,
}

/// Finds the chat template of a checkpoint: in a folder `chat_template.jinja`, or `chat_template` of
/// `tokenizer_config.json` (of several the one called `default`); in a `.gguf` file `tokenizer.chat_template`.
///
/// # Errors
/// A file that can't be read or is malformed.
pub fn chat_template_of(path: &Path) -> Result<Option<ChatTemplate>> {
    if path.is_dir() { of_folder(path) } else { of_gguf(path) }
}

fn of_folder(dir: &Path) -> Result<Option<ChatTemplate>> {
    let config = dir.join("tokenizer_config.json");
    let json: serde_json::Value = match std::fs::read_to_string(&config) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| malformed(&config, format!("expected JSON: {error}")))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
        Err(error) => return Err(Error::io(&config)(error)),
    };
    let own = dir.join("chat_template.jinja");
    let template = match std::fs::read_to_string(&own) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            in_config(&config, &json["chat_template"])?
        }
        Err(error) => return Err(Error::io(&own)(error)),
    };
    let special_tokens = json.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
    let special_tokens = special_tokens.filter_map(|(key, value)| {
        let token = value.as_str().or_else(|| value["content"].as_str())?;
        Some((key.clone(), token.to_owned()))
    });
    Ok(template.map(|template| ChatTemplate { template, special_tokens: special_tokens.collect() }))
}

/// `chat_template`: a string, or a list of `{"name", "template"}`.
fn in_config(path: &Path, value: &serde_json::Value) -> Result<Option<String>> {
    let expected = "`chat_template`: expected a string, or a list of objects with `name` and `template`, one of them \
                    `default`";
    match value {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(template) => Ok(Some(template.clone())),
        serde_json::Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            match default.and_then(|entry| entry["template"].as_str()) {
                Some(template) => Ok(Some(template.to_owned())),
                None => Err(malformed(path, format!("{expected}; found a list without it"))),
            }
        }
        _ => Err(malformed(path, format!("{expected}; found neither"))),
    }
}

fn of_gguf(path: &Path) -> Result<Option<ChatTemplate>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let content = Content::read(&mut file)
        .map_err(|error| malformed(path, format!("expected a whole GGUF file: {error}")))?;
    let Some(Metadata::String(template)) = content.metadata.get("tokenizer.chat_template") else {
        return Ok(None);
    };
    let tokens = match content.metadata.get("tokenizer.ggml.tokens") {
        Some(Metadata::Array(tokens)) => tokens.as_slice(),
        _ => &[],
    };
    let mut special_tokens = BTreeMap::new();
    for (name, key) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let id =
            content.metadata.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| id.to_u32().ok());
        if let Some(Metadata::String(token)) = id.and_then(|id| tokens.get(id as usize)) {
            special_tokens.insert(name.to_owned(), token.clone());
        }
    }
    Ok(Some(ChatTemplate { template: template.clone(), special_tokens }))
}

fn malformed(path: &Path, problem: String) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

/// A conversation.
pub(super) struct Chat {
    /// Objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// What else the template is to know.
    pub kwargs: Option<Value>,
}

/// A template that is ready to use.
pub(super) struct Renderer {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl Renderer {
    /// # Errors
    /// What is wrong with the template, and where.
    pub fn new(source: &ChatTemplate) -> std::result::Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| problem(&error))?);
        pythonic::adapt(&mut environment);
        let template = pythonic::without_generation_tags(&source.template);
        environment.add_template_owned(NAME, template).map_err(|error| problem(&error))?;
        Ok(Self { environment, special_tokens: source.special_tokens.clone() })
    }

    /// The conversation's text.
    ///
    /// # Errors
    /// What the template raises; a template that fails on this conversation.
    pub fn render(&self, chat: &Chat) -> std::result::Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(|error| problem(&error))?;
        let mut context: BTreeMap<String, Value> = BTreeMap::new();
        let special =
            self.special_tokens.iter().map(|(key, token)| (key.clone(), Value::from(token.as_str())));
        context.extend(special);
        if let Some(kwargs) = &chat.kwargs {
            for key in kwargs.try_iter().map_err(|error| problem(&error))? {
                let value = kwargs.get_item(&key).map_err(|error| problem(&error))?;
                context.insert(key.to_string(), value);
            }
        }
        context.insert("messages".into(), Value::from(chat.messages.clone()));
        context.insert("add_generation_prompt".into(), chat.add_generation_prompt.into());
        for absent in ["tools", "documents"] {
            context.entry(absent.into()).or_insert_with(|| Value::from(()));
        }
        template.render(context).map_err(|error| problem(&error))
    }
}

/// What went wrong, on one line.
fn problem(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        // What a template raises is meant for its user.
        Some(line) if error.kind() != RAISED => format!("{what} (line {line} of the template)"),
        _ => what,
    }
}

/// The kind of the errors that templates raise.
const RAISED: ErrorKind = ErrorKind::EvalBlock;

/// `raise_exception(message)`.
pub(super) fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(RAISED, message))
}

/// `strftime_now(format)`: the time now, UTC.
pub(super) fn strftime_now(format: String) -> String {
    clock::strftime(SystemTime::now(), &format)
}

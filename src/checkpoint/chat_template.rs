//! The checkpoint's own chat template: a Jinja text that turns a conversation into one text, rendered as transformers
//! renders it (`transformers/utils/chat_template_utils.py`).

pub mod continuation;
mod pythonic;

use crate::checkpoint::{GgufFile, TextTokenizer};
use crate::layout::model_folder::{CHAT_TEMPLATE, TOKENIZER_CONFIG};
use crate::{Error, Result, calendar};
use candle_core::quantized::gguf_file::Value as Metadata;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::SystemTime;

/// A chat template, and the special tokens that it may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplate {
    /// The Jinja text.
    pub template: String,
    /// `bos_token`, `eos_token` and the like.
    pub special_tokens: BTreeMap<String, String>,
}

/// Finds the chat template of a checkpoint: in a folder `chat_template.jinja`, or `chat_template` of
/// `tokenizer_config.json` (if there are several, the one called `default`); in a `.gguf` file
/// `tokenizer.chat_template`.
///
/// # Errors
/// Returns an error if a file can't be read or is malformed.
pub fn find_chat_template(path: &Path) -> Result<Option<ChatTemplate>> {
    if path.is_dir() { read_folder(path) } else { read_gguf(path) }
}

fn read_folder(dir: &Path) -> Result<Option<ChatTemplate>> {
    let config = dir.join(TOKENIZER_CONFIG);
    let special_tokens = TextTokenizer::named_tokens(dir)?;
    let json: serde_json::Value = match std::fs::read_to_string(&config) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| malformed(&config, format!("expected JSON: {error}")))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
        Err(error) => return Err(Error::io(&config)(error)),
    };
    let own = dir.join(CHAT_TEMPLATE);
    let template = match std::fs::read_to_string(&own) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            in_config(&config, &json["chat_template"])?
        }
        Err(error) => return Err(Error::io(&own)(error)),
    };
    Ok(template.map(|template| ChatTemplate { template, special_tokens }))
}

/// `chat_template`: a string, a list of `{"name", "template"}`, or an object with names as keys and templates as
/// values.
fn in_config(path: &Path, value: &serde_json::Value) -> Result<Option<String>> {
    let expected = "`chat_template`: expected a string, or a list of objects with `name` and `template`, one of them \
                    `default`";
    match value {
        serde_json::Value::Object(named) => match named.get("default").and_then(serde_json::Value::as_str) {
            Some(template) => Ok(Some(template.to_owned())),
            None => Err(malformed(path, format!("{expected}; found an object without it"))),
        },
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

fn read_gguf(path: &Path) -> Result<Option<ChatTemplate>> {
    let metadata = GgufFile::read_metadata(path)?;
    let Some(Metadata::String(template)) = metadata.get("tokenizer.chat_template") else {
        return Ok(None);
    };
    let tokens = match metadata.get("tokenizer.ggml.tokens") {
        Some(Metadata::Array(tokens)) => tokens.as_slice(),
        _ => &[],
    };
    let mut special_tokens = BTreeMap::new();
    for (name, key) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let id = metadata.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| id.to_u32().ok());
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
pub struct Chat {
    /// Objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Whether the text ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// More values that the template may read: an object; `None` if there are none.
    pub kwargs: Option<Value>,
}

/// A compiled chat template.
pub struct Renderer {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    /// Names that the template reads.
    read: HashSet<String>,
}

const NAME: &str = "chat_template";

impl Renderer {
    /// Compiles a template.
    ///
    /// # Errors
    /// Returns what is wrong with the template, and in which line.
    pub fn new(source: &ChatTemplate) -> std::result::Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| problem(&error))?);
        pythonic::adapt(&mut environment);
        let template = pythonic::with_line_feeds(&source.template);
        let template = pythonic::with_known_tags(&template);
        environment.add_template_owned(NAME, template).map_err(|error| problem(&error))?;
        let read =
            environment.get_template(NAME).map_err(|error| problem(&error))?.undeclared_variables(false);
        Ok(Self { environment, special_tokens: source.special_tokens.clone(), read })
    }

    /// Whether the template reads a value of this name.
    pub fn reads(&self, name: &str) -> bool {
        self.read.contains(name)
    }

    /// The conversation as one text.
    ///
    /// # Errors
    /// Returns the message that the template raises, or what is wrong if the template fails on this conversation.
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

/// The error on one line.
fn problem(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        // A message that a template raises is meant for its user.
        Some(line) if error.kind() != RAISED => format!("{what} (line {line} of the template)"),
        _ => what,
    }
}

/// The kind of the errors that templates raise.
const RAISED: ErrorKind = ErrorKind::EvalBlock;

/// `raise_exception(message)`.
pub(crate) fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(RAISED, message))
}

/// `strftime_now(format)`: the local time now, as `datetime.now().strftime(format)` of Python.
pub(crate) fn strftime_now(format: String) -> String {
    calendar::strftime(calendar::local(SystemTime::now()), &format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        special_tokens: BTreeMap<String, String>,
        templates: BTreeMap<String, String>,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        template: String,
        messages: Vec<Value>,
        add_generation_prompt: bool,
        kwargs: Value,
        text: Option<String>,
        error: Option<String>,
    }

    #[test]
    fn conversations_are_rendered_as_transformers_renders_them() {
        let golden: Golden =
            serde_json::from_str(include_str!("../../tests/golden/chat_templates.json")).unwrap();
        let renderer = |template: &String| {
            let special_tokens = golden.special_tokens.clone();
            Renderer::new(&ChatTemplate { template: template.clone(), special_tokens }).unwrap()
        };
        let renderers: BTreeMap<&str, Renderer> =
            golden.templates.iter().map(|(name, template)| (name.as_str(), renderer(template))).collect();
        assert_eq!((renderers.len(), golden.cases.len()), (9, 204));
        let mut wrong = Vec::new();
        for (i, case) in golden.cases.iter().enumerate() {
            let chat = Chat {
                messages: case.messages.clone(),
                add_generation_prompt: case.add_generation_prompt,
                kwargs: Some(case.kwargs.clone()),
            };
            let rendered = renderers[case.template.as_str()].render(&chat);
            let expected = match (&case.text, &case.error) {
                (Some(text), _) => Ok(text.clone()),
                (None, error) => Err(error.clone().unwrap()),
            };
            if rendered != expected {
                wrong.push(format!("case {i}, {}:\n{rendered:?}\nexpected\n{expected:?}", case.template));
            }
        }
        assert!(wrong.is_empty(), "{} cases\n{}", wrong.len(), wrong[..wrong.len().min(6)].join("\n"));
    }

    #[test]
    fn a_folders_template_is_found_in_each_of_its_places() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let found = || find_chat_template(dir.path());
        assert_eq!(found().unwrap(), None);
        write(
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null}"#,
        );
        assert_eq!(found().unwrap(), None);
        let tokens = r#""bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null, "add_bos_token": true"#;
        write("tokenizer_config.json", &format!(r#"{{"chat_template": "one", {tokens}}}"#));
        let special_tokens = [("bos_token", "<b>"), ("eos_token", "<e>")];
        let special_tokens: BTreeMap<_, _> = special_tokens.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(found().unwrap(), Some(ChatTemplate { template: "one".into(), special_tokens }));
        let named = r#"[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]"#;
        write("tokenizer_config.json", &format!(r#"{{"chat_template": {named}}}"#));
        assert_eq!(found().unwrap().unwrap().template, "two");
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "no"}]}"#);
        assert!(found().unwrap_err().to_string().contains("one of them `default`"));
        write("tokenizer_config.json", "{");
        assert!(found().unwrap_err().to_string().contains("tokenizer_config.json: expected JSON"));
        write("tokenizer_config.json", "{}");
        write("chat_template.jinja", "three");
        assert_eq!(found().unwrap().unwrap().template, "three");
    }

    #[test]
    fn a_gguf_files_template_is_found() {
        use candle_core::quantized::gguf_file::write;
        use std::fs::File;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let token = |text: &str| Metadata::String(text.to_owned());
        let template = token("{{ bos_token }}");
        let tokens = Metadata::Array(vec![token("a"), token("<b>"), token("<e>")]);
        let (bos, eos) = (Metadata::U32(1), Metadata::U32(9));
        let all = [
            ("tokenizer.chat_template", &template),
            ("tokenizer.ggml.tokens", &tokens),
            ("tokenizer.ggml.bos_token_id", &bos),
            ("tokenizer.ggml.eos_token_id", &eos),
        ];
        let save = |metadata: &[(&str, &Metadata)]| {
            let mut file = File::create(&path).unwrap();
            write(&mut file, metadata, &[]).unwrap();
        };
        save(&all);
        // An id without a token names none.
        let special_tokens = [("bos_token".to_owned(), "<b>".to_owned())].into();
        let expected = ChatTemplate { template: "{{ bos_token }}".into(), special_tokens };
        assert_eq!(find_chat_template(&path).unwrap(), Some(expected));
        save(&all[1..]);
        assert_eq!(find_chat_template(&path).unwrap(), None);
        std::fs::write(&path, "none").unwrap();
        assert!(find_chat_template(&path).unwrap_err().to_string().contains("GGUF"));
    }
}

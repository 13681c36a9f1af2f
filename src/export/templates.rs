//! The text that puts a prompt's tokens before an input: `prompts.json`, and the chat template.

use super::base::Base;
use super::place::{NewTokens, Placed};
use crate::data::Template;
use crate::layout::model_folder::{CHAT_TEMPLATE, TOKENIZER_CONFIG};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// The base's chat template, from any of its files.
pub(super) enum BaseTemplate {
    /// A single template.
    One(String),
    /// Several, as `{"name": ..., "template": ...}`.
    Named(Vec<Value>),
}

impl BaseTemplate {
    /// # Errors
    /// Returns an error if a file can't be read.
    pub fn find(base: &Base) -> Result<Option<Self>> {
        if let Some(template) = base.string("tokenizer.chat_template") {
            return Ok(Some(Self::One(template.to_string())));
        }
        let file = base.path.join(CHAT_TEMPLATE);
        if base.metadata.is_none() && file.is_file() {
            return std::fs::read_to_string(&file)
                .map(|text| Some(Self::One(text)))
                .map_err(Error::io(&file));
        }
        for name in ["chat_template.json", TOKENIZER_CONFIG] {
            let template = base.json(name)?.and_then(|mut json| json.remove("chat_template"));
            match template {
                Some(Value::String(text)) => return Ok(Some(Self::One(text))),
                Some(Value::Array(templates)) => return Ok(Some(Self::Named(templates))),
                _ => {}
            }
        }
        Ok(None)
    }
}

/// A chat template that puts the prompt named by the variable `soft_prompt` first; without the variable it is the
/// base's template.
pub(super) fn with_prompts(template: &str, placed: &Placed) -> String {
    // Names and tokens have no characters that need an escape.
    let entries: Vec<String> =
        placed.tokens.iter().map(|tokens| format!("\"{}\": \"{}\"", tokens.name, tokens.text())).collect();
    // The last tag prints nothing. Without it the line break after `%}` would be removed, and with it that of the
    // base's first line.
    format!(
        "{{%- set soft_prompts = {{{}}} %}}\
         {{%- if soft_prompt is defined and soft_prompt %}}\
         {{%- if soft_prompt not in soft_prompts %}}\
         {{{{- raise_exception(\"soft_prompt: expected one of \" ~ (soft_prompts | list | join(\", \"))) }}}}\
         {{%- endif %}}\
         {{{{- soft_prompts[soft_prompt] }}}}\
         {{%- endif %}}\
         {{{{- \"\" }}}}{template}",
        entries.join(", ")
    )
}

/// Content of `prompts.json`.
pub(super) struct PromptList {
    pub json: Value,
    /// Prompts whose template gives other tokens than those on which they were tuned.
    pub inexact: Vec<String>,
}

/// Lists the prompts with the text that puts each before an input.
///
/// A prompt was tuned at the very beginning, before a beginning-of-text token. So if the tokenizer adds such a token,
/// the template has it after the prompt's tokens, and the text is tokenised without adding it again.
pub(super) fn prompts_json(base: &Base, placed: &Placed) -> Result<PromptList> {
    let around = base.around()?.map(|ids| base.text_of(&ids));
    let mut listed = PromptList { json: Value::Null, inexact: Vec::new() };
    let mut all = Map::new();
    for tokens in &placed.tokens {
        let verbalizer = tokens.task.as_ref().map_or("{{input}}", |task| task.verbalizer.as_str());
        let exact = is_exact(base, placed, tokens, verbalizer, &around)?;
        if !exact {
            listed.inexact.push(tokens.name.clone());
        }
        let mut entry = json!({
            "num_virtual_tokens": tokens.ids.len(),
            "tokens": tokens.text(),
            "token_ids": [tokens.ids.start, tokens.ids.end - 1],
            "template": format!("{}{}{verbalizer}{}", tokens.text(), around[0], around[1]),
            "add_special_tokens": false,
            "template_is_exact": exact,
            "verbalizer": verbalizer,
        });
        if let Some(task) = &tokens.task {
            entry["labels"] = json!(task.labels);
            entry["max_output_tokens"] = json!(task.max_output_tokens);
        }
        all.insert(tokens.name.clone(), entry);
    }
    listed.json = Value::Object(all);
    Ok(listed)
}

/// Whether the template gives the prompt's tokens and then those that the base's tokenizer gives for the input. Some
/// tokenizers put a space before a text, but not after a special token.
fn is_exact(
    base: &Base,
    placed: &Placed,
    tokens: &NewTokens,
    verbalizer: &str,
    around: &[String; 2],
) -> Result<bool> {
    let verbalizer = Template::parse(verbalizer)?;
    for input in ["Comment: it works.\n", " 7", "a"] {
        let text = verbalizer.render(input);
        let template = format!("{}{}{text}{}", tokens.text(), around[0], around[1]);
        let found =
            placed.tokenizer.encode(template, false).map_err(|error| Error::Tokenizer(error.to_string()))?;
        let expected = tokens.ids.clone().chain(base.tokenizer.encode(&text, true)?);
        if !found.get_ids().iter().copied().eq(expected) {
            return Ok(false);
        }
    }
    Ok(true)
}

//! The text that puts a prompt's tokens before an input, or after its head: `prompts.json`, and the chat template.

use super::base::Base;
use super::place::{NewTokens, Placed};
use crate::data::Template;
use crate::layout::model_folder::{CHAT_TEMPLATE, TOKENIZER_CONFIG};
use crate::prompt::peft::quoted;
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

/// A chat template that puts the prompt named by the variable `soft_prompt` in its place; without the variable it is the
/// base's template.
///
/// # Errors
/// Returns [`Error::Tokenizer`] if a prompt stands after a head and the tokenizer changes the texts to which it adds tokens.
pub(super) fn with_prompts(template: &str, base: &Base, placed: &Placed) -> Result<String> {
    // Names and tokens have no characters that need an escape.
    let entries: Vec<String> =
        placed.tokens.iter().map(|tokens| format!("\"{}\": \"{}\"", tokens.name, tokens.text())).collect();
    let heads = placed.tokens.iter().filter_map(|tokens| Some((&tokens.name, &tokens.before()?.text)));
    let heads: Vec<String> = heads.map(|(name, text)| format!("\"{name}\": {}", quoted(text))).collect();
    if !heads.is_empty() {
        let start = base.text_of(&base.around()?[0]);
        return Ok(with_heads(template, &entries.join(", "), &heads.join(", "), &start));
    }
    // The last tag prints nothing. Without it the line break after `%}` would be removed, and with it that of the
    // base's first line.
    Ok(format!(
        "{{%- set soft_prompts = {{{}}} %}}\
         {{%- if soft_prompt is defined and soft_prompt %}}\
         {{%- if soft_prompt not in soft_prompts %}}\
         {{{{- raise_exception(\"soft_prompt: expected one of \" ~ (soft_prompts | list | join(\", \"))) }}}}\
         {{%- endif %}}\
         {{{{- soft_prompts[soft_prompt] }}}}\
         {{%- endif %}}\
         {{{{- \"\" }}}}{template}",
        entries.join(", ")
    ))
}

/// As [`with_prompts`], if some prompts stand after a head: the text of the base's template is rendered first, and must begin with
/// the head. `start` is the text of the tokens that the tokenizer adds before every text; the template may have it or not.
fn with_heads(template: &str, prompts: &str, heads: &str, start: &str) -> String {
    // Jinja drops a last line break of the whole template only.
    let template = template.strip_suffix('\n').unwrap_or(template);
    let with_start = if start.is_empty() {
        String::new()
    } else {
        format!(
            "{{%- if soft_prompt_text[:{}] == {start} %}}{{%- set soft_prompt_head = {start} ~ soft_prompt_head %}}{{%- endif %}}",
            start.chars().count(),
            start = quoted(start)
        )
    };
    // The tags `{{ "" }}` print nothing. They keep the line breaks and spaces at both ends of the base's template.
    format!(
        "{{%- set soft_prompts = {{{prompts}}} %}}\
         {{%- set soft_prompt_heads = {{{heads}}} %}}\
         {{%- set soft_prompt_text %}}{{{{- \"\" }}}}{template}{{{{ \"\" }}}}{{% endset %}}\
         {{%- if soft_prompt is defined and soft_prompt %}}\
         {{%- if soft_prompt not in soft_prompts %}}\
         {{{{- raise_exception(\"soft_prompt: expected one of \" ~ (soft_prompts | list | join(\", \"))) }}}}\
         {{%- endif %}}\
         {{%- set soft_prompt_head = soft_prompt_heads[soft_prompt] if soft_prompt in soft_prompt_heads else \"\" %}}\
         {{%- if soft_prompt in soft_prompt_heads %}}{with_start}{{%- endif %}}\
         {{%- if soft_prompt_text[:soft_prompt_head | length] != soft_prompt_head %}}\
         {{{{- raise_exception(\"soft_prompt \" ~ soft_prompt ~ \": expected a conversation that begins with \" ~ \
         soft_prompt_head) }}}}\
         {{%- endif %}}\
         {{{{- soft_prompt_head ~ soft_prompts[soft_prompt] ~ soft_prompt_text[soft_prompt_head | length:] }}}}\
         {{%- else %}}\
         {{{{- soft_prompt_text }}}}\
         {{%- endif %}}"
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
/// A prompt at the start was tuned before a beginning-of-text token. So if the tokenizer adds such a token, the template has it
/// after the prompt's tokens, and the text is tokenised without adding it again. A prompt after a head has the token before the
/// head.
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
            "template": with_tokens(tokens, verbalizer, &around),
            "add_special_tokens": false,
            "template_is_exact": exact,
            "verbalizer": verbalizer,
        });
        if let Some(before) = tokens.before() {
            entry["before"] = json!(before.text);
        }
        if let Some(task) = &tokens.task {
            entry["labels"] = json!(task.labels);
            entry["max_output_tokens"] = json!(task.max_output_tokens);
        }
        all.insert(tokens.name.clone(), entry);
    }
    listed.json = Value::Object(all);
    Ok(listed)
}

/// A text in the form on which a prompt was tuned, with the prompt's tokens in their place.
fn with_tokens(tokens: &NewTokens, text: &str, [start, end]: &[String; 2]) -> String {
    match tokens.before().and_then(|before| Some((&before.text, text.strip_prefix(before.text.as_str())?))) {
        Some((before, rest)) => format!("{start}{before}{}{rest}{end}", tokens.text()),
        None => format!("{}{start}{text}{end}", tokens.text()),
    }
}

/// Whether the template gives the prompt's tokens and then those that the base's tokenizer gives for the input. Some
/// tokenizers put a space before a text, but not after a special token. With a prompt after a head it gives the head's tokens first.
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
        let template = with_tokens(tokens, &text, around);
        let found =
            placed.tokenizer.encode(template, false).map_err(|error| Error::Tokenizer(error.to_string()))?;
        let ids = base.tokenizer.encode(&text, true)?;
        let before = tokens.before().map_or(&[][..], |before| &before.token_ids);
        let Some(rest) = ids.strip_prefix(before) else { return Ok(false) };
        let expected = before.iter().copied().chain(tokens.ids.clone()).chain(rest.iter().copied());
        if !found.get_ids().iter().copied().eq(expected) {
            return Ok(false);
        }
    }
    Ok(true)
}

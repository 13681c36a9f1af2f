//! Chats: a list of messages, of which the user's is the input and the assistant's the output.

use super::{Names, blank};

/// Keys that a list of messages stands under.
pub(super) const KEYS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Keys beside the messages that a chat template would write into the text.
pub(super) const CONTEXT: [&str; 3] = ["system", "tools", "functions"];

/// One message, as far as it can be read.
pub(super) struct Message {
    /// Who says it.
    pub(super) role: String,
    /// What is said.
    pub(super) content: Content,
    /// Whether it is marked as one not to learn from.
    pub(super) ignored: bool,
}

/// What a message says.
pub(super) enum Content {
    Text(String),
    /// What was found in the place of text.
    Other(&'static str),
}

/// Whether rows with these keys are chats: they lack both fields, which have their default names, and have messages.
pub(super) fn key<'a>(names: Names<'_>, keys: &[&'a str]) -> Option<&'a str> {
    let has_fields = keys.iter().any(|key| *key == names.input || *key == names.output);
    if has_fields || !names.are_default() {
        return None;
    }
    keys.iter().copied().find(|key| KEYS.contains(key))
}

/// The input and the output of a chat; `context` are the keys of [`CONTEXT`] that hold something.
pub(super) fn pair(key: &str, messages: Vec<Message>, context: &[&str]) -> Result<(String, String), String> {
    let roles: Vec<String> = messages.iter().map(|message| message.role.clone()).collect();
    let is_system = |role: &String| matches!(role.as_str(), "system" | "developer");
    if let Some(found) =
        context.first().copied().or_else(|| roles.iter().find(|r| is_system(r)).map(|_| "system"))
    {
        let what = if found == "system" { "a system message".to_owned() } else { format!("`{found}`") };
        return Err(format!(
            "`{key}`: expected a user and an assistant message, found {what} too, which has no place in a row; hint: \
             take it out of the file, and put a text that all rows share into data.verbalizer, before {{{{input}}}}"
        ));
    }
    let both = [["user", "human"].as_slice(), &["assistant", "gpt", "model", "bot", "chatgpt"]];
    let expected =
        messages.len() == 2 && roles.iter().zip(both).all(|(role, names)| names.contains(&role.as_str()));
    if !expected {
        let found = match roles.len() {
            0 => "no message".into(),
            1..=6 => roles.join(", "),
            n => format!("{n} messages ({}, ...)", roles[..4].join(", ")),
        };
        return Err(format!(
            "`{key}`: expected one user message and one assistant message after it, found {found}; hint: one row for each \
             answer, all that comes before it as one text"
        ));
    }
    if messages.iter().any(|message| message.ignored) {
        return Err(format!(
            "`{key}`: expected messages to learn from, found one with the weight 0; hint: take the row out of the file"
        ));
    }
    let mut texts = messages.into_iter().map(|Message { role, content, .. }| match content {
        Content::Text(text) => match blank(&text) {
            Some(why) => Err(format!("`{key}`, {role} message: {why}")),
            None => Ok(text),
        },
        Content::Other(found) => Err(format!("`{key}`, {role} message: expected text, found {found}")),
    });
    match (texts.next(), texts.next()) {
        (Some(input), Some(output)) => Ok((input?, output?)),
        _ => Err(format!("`{key}`: expected two messages")),
    }
}

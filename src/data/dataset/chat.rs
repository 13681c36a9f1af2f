//! Chats: a list of messages; the user's message is the input and the assistant's the output.

use super::{FieldNames, blank};

/// Keys under which a list of messages is looked for.
pub(super) const KEYS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Keys next to the messages that a chat template would write into the text.
pub(super) const CONTEXT: [&str; 3] = ["system", "tools", "functions"];

/// One message, as far as it could be read.
pub(super) struct Message {
    /// The role of the speaker.
    pub(super) role: String,
    /// The text.
    pub(super) content: MessageContent,
    /// Whether it is marked as not to be learned from.
    pub(super) ignored: bool,
}

/// The content of a message.
pub(super) enum MessageContent {
    Text(String),
    /// A description of a value that is not text.
    Other(&'static str),
}

/// The key of the messages if rows with these keys are chats: both fields have their default names and are missing, and
/// there are messages.
pub(super) fn key<'a>(names: FieldNames<'_>, keys: &[&'a str]) -> Option<&'a str> {
    let has_fields = keys.iter().any(|key| *key == names.input || *key == names.output);
    if has_fields || !names.are_default() {
        return None;
    }
    keys.iter().copied().find(|key| KEYS.contains(key))
}

/// The input and the output of a chat; `context` lists the keys of [`CONTEXT`] that are not empty.
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
        MessageContent::Text(text) => match blank(&text) {
            Some(why) => Err(format!("`{key}`, {role} message: {why}")),
            None => Ok(text),
        },
        MessageContent::Other(found) => Err(format!("`{key}`, {role} message: expected text, found {found}")),
    });
    match (texts.next(), texts.next()) {
        (Some(input), Some(output)) => Ok((input?, output?)),
        _ => Err(format!("`{key}`: expected two messages")),
    }
}

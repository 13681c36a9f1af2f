//! `continue_final_message`: the conversation's text ends with the last message, and the model continues it. The method is
//! that of transformers (`transformers/utils/chat_template_utils.py`).

/// Follows the last message while the template is rendered. Its trailing space shows whether the template removes
/// trailing spaces.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The error if the text does not contain the last message as it was given.
pub const LOST: &str =
    "expected a chat template that writes the last message as it is, found that it changes or leaves it out";

/// Marks the end of the last message. Returns the message without the mark.
pub fn mark(content: &mut String) -> String {
    let message = content.clone();
    content.push_str(TAG);
    message
}

/// The text up to the end of the marked message; `None` if the template left the message out.
pub fn cut(text: &str, message: &str) -> Option<String> {
    let end = text.rfind(TAG.trim_end()).filter(|_| text.contains(message.trim()))?;
    let before = &text[..end];
    // A template that removes trailing spaces of a message would have removed those of this one.
    Some(if text[end..].starts_with(TAG) { before } else { before.trim_end() }.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::chat_template::{Chat, ChatTemplate, Renderer};
    use minijinja::Value as Templated;
    use serde_json::Value;

    /// transformers' texts of the same conversations (tests/golden/continued_chats.py).
    #[test]
    fn continued_messages_are_those_of_transformers() {
        let golden: Value =
            serde_json::from_str(include_str!("../../../tests/golden/continued_chats.json")).unwrap();
        let special_tokens: std::collections::BTreeMap<String, String> =
            serde_json::from_value(golden["special_tokens"].clone()).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 24);
        for case in cases {
            let template =
                golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap().to_owned();
            let renderer =
                Renderer::new(&ChatTemplate { template, special_tokens: special_tokens.clone() }).unwrap();
            let mut messages = case["messages"].as_array().unwrap().clone();
            let last = messages.last_mut().unwrap();
            let mut content = last["content"].as_str().unwrap().to_owned();
            let message = mark(&mut content);
            last["content"] = content.into();
            let messages: Vec<Templated> = serde_json::from_value(messages.into()).unwrap();
            let chat = Chat { messages, add_generation_prompt: false, kwargs: None };
            let text = renderer.render(&chat).unwrap();
            assert_eq!(cut(&text, &message).as_deref(), case["text"].as_str(), "{case}");
        }
    }
}

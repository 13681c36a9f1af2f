//! Chats: rows of messages in the forms of OpenAI's and ShareGPT's files.

use super::*;

#[test]
fn one_user_and_one_assistant_message_are_a_row() {
    let text = r#"{"messages": [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": " Hello"}]}
{"id": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "Bye"}]}, {"content": "See you", "role": "assistant", "weight": 1}], "tools": [], "system": ""}
"#;
    let expected = [record("Hi\n", " Hello", 1), record("Bye", "See you", 2)];
    let dataset = read("d.jsonl", text).unwrap();
    assert_eq!(dataset.records, expected);
    let note = "each row's user message under `messages` is the input, the assistant's the output";
    assert_eq!(dataset.notes, [note]);
    let shared =
        r#"[{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]"#;
    assert_eq!(records("d.json", shared), [record("Hi", "Hello", 1)]);
    let one =
        r#"{"conversation": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Hello"}]}"#;
    assert_eq!(records("d.json", one), [record("Hi", "Hello", 1)]);
}

#[test]
fn fields_of_the_configured_names_come_first() {
    let text = r#"{"input": "a", "output": "b", "messages": []}"#;
    assert_eq!(records("d.jsonl", text), [record("a", "b", 1)]);
    let error = read_fields("d.jsonl", r#"{"messages": []}"#, "text", "label").unwrap_err().to_string();
    assert!(error.contains("no key `text`; found the keys `messages`"), "{error}");
}

#[test]
fn a_fault_of_many_chats_is_told_once() {
    let chat = |messages: &str| format!("{{\"messages\": [{messages}]}}\n");
    let with = |roles: &[&str]| {
        let messages: Vec<String> =
            roles.iter().map(|role| format!(r#"{{"role": "{role}", "content": "x"}}"#)).collect();
        chat(&messages.join(", "))
    };
    let system = with(&["system", "user", "assistant"]).repeat(5_000);
    assert_eq!(
        fault("d.jsonl", system),
        "d.jsonl: lines 1, 2, 3 and 4997 more: `messages`: expected a user and an assistant message, found a system \
         message too, which has no place in a row; hint: take it out of the file, and put a text that all rows share \
         into data.verbalizer, before {{input}}"
    );
    for (rows, part) in [
        (with(&["user", "assistant", "user", "assistant"]), "found user, assistant, user, assistant"),
        (with(&["assistant", "user"]), "found assistant, user"),
        (with(&["user", "tool"]), "found user, tool"),
        (chat(""), "found no message"),
        (chat(r#"{"role": "user", "content": "x"}, {"role": "assistant", "content": null}"#), "found null"),
        (
            chat(r#"{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}"#),
            "assistant message: expected text, found white space only",
        ),
        (
            chat(r#"{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}"#),
            "weight 0",
        ),
        (
            chat(r#"{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [1]}"#),
            "found tool calls",
        ),
        (
            chat(r#"{"role": "user", "content": [1, 2]}, {"role": "assistant", "content": "y"}"#),
            "found a list of parts",
        ),
        (chat(r#""hello""#), "expected messages with `role` and `content`"),
        ("{\"messages\": \"hello\"}\n".into(), "expected a list of messages"),
        (
            "{\"tools\": [{}], \"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \
             \"content\": \"y\"}]}\n"
                .into(),
            "found `tools` too",
        ),
    ] {
        let message = fault("d.jsonl", rows);
        assert!(message.starts_with("d.jsonl: line 1: `messages`") && message.contains(part), "{message}");
    }
}

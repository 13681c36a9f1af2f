//! The fields that watsonx's chats and tokenization have beside those of OpenAI's chats.

use super::{FieldTable, Off, refused};

/// Fields of `POST /ml/v1/text/chat`, of a deployment's, and of their streams, that are not those of
/// [`CHAT`](super::CHAT).
pub(in crate::serve) static WATSONX_CHAT: FieldTable = FieldTable {
    request: "/ml/v1/text/chat",
    obeyed: &[&["model_id", "time_limit"]],
    without_effect: &[&["project_id", "space_id", "wml_instance_crn", "extensions"]],
    refused: &[&[
        refused(&["model"], Off::Null, "it is `model_id` here"),
        refused(&["input"], Off::Empty, "`input` is for /ml/v1/text/generation; chats take `messages`"),
        refused(&["parameters"], Off::Empty, "chats have their parameters beside `messages`; put them there"),
        refused(&["context"], Off::Empty, "deployments have no variables here; put the text into a message"),
        refused(&["crypto"], Off::Empty, "this server keeps nothing that it could encrypt; leave it out"),
        refused(
            &["tool_choice_option"],
            Off::Words(&["none", "auto"]),
            "this server calls no tools; leave it out",
        ),
        refused(&["moderations"], Off::Empty, "this server moderates nothing; leave it out"),
        refused(&["stream"], Off::Null, "streams are at /ml/v1/text/chat_stream"),
        refused(&["guided_grammar", "guided_regex"], Off::Empty, FREE),
    ]],
    nested: &[],
};

/// Fields of `POST /ml/v1/text/tokenization`. The SDK sends a model's parameters of generation with `return_tokens`.
pub(in crate::serve) static TOKENIZATION: FieldTable = FieldTable {
    request: "/ml/v1/text/tokenization",
    obeyed: &[&["model_id", "input", "parameters"]],
    without_effect: &[&["project_id", "space_id", "wml_instance_crn", "extensions"]],
    refused: &[&[
        refused(&["crypto"], Off::Empty, "this server keeps nothing that it could encrypt; leave it out"),
        refused(&["return_tokens"], Off::Empty, "put it into `parameters`"),
        refused(
            &["messages"],
            Off::Empty,
            "the text to count is `input`; the usage of an answer counts messages",
        ),
    ]],
    nested: &[],
};

const FREE: &str = "answers are bound to a list of texts alone by this server: `guided_choice`";

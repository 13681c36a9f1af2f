//! The fields of OpenAI's API, with those of vLLM that are obeyed.

use super::engines::{ANSWERS, CONSTRAINTS, FREE, NO_TOOLS, OTHER_NAMES, SAMPLERS, TOKENS, TOOLS};
use super::{FieldTable, Off, RefusedFields, refused};

/// Fields of `POST /v1/completions`.
pub(in crate::serve) static COMPLETIONS: FieldTable = FieldTable {
    request: "/v1/completions",
    obeyed: &[SHARED, TEXT, COMPLETION],
    without_effect: &[HARMLESS],
    refused: &[NOT_OF_COMPLETIONS, CONSTRAINTS, SAMPLERS, TOKENS, OTHER_NAMES, ANSWERS],
    nested: &[("stream_options", &STREAM_OPTIONS), ("structured_outputs", &STRUCTURED_OUTPUTS)],
};

/// Fields of `POST /v1/chat/completions`.
pub(in crate::serve) static CHAT: FieldTable = FieldTable {
    request: "/v1/chat/completions",
    obeyed: &[SHARED, TEXT, CONVERSATION],
    without_effect: &[HARMLESS, WITHOUT_TOOLS],
    refused: &[NOT_OF_CHATS, CONSTRAINTS, SAMPLERS, TOKENS, OTHER_NAMES, ANSWERS, TOOLS],
    nested: &[("stream_options", &STREAM_OPTIONS), ("structured_outputs", &STRUCTURED_OUTPUTS)],
};

/// Fields of `POST /v1/responses`.
pub(in crate::serve) static RESPONSES: FieldTable = FieldTable {
    request: "/v1/responses",
    obeyed: &[SHARED, RESPONSE],
    without_effect: &[HARMLESS, WITHOUT_TOOLS],
    refused: &[NOT_OF_RESPONSES, CONSTRAINTS, SAMPLERS, TOKENS, OTHER_NAMES, ANSWERS, TOOLS],
    nested: &[
        ("stream_options", &STREAM_OPTIONS),
        ("structured_outputs", &STRUCTURED_OUTPUTS),
        ("text", &RESPONSE_TEXT),
    ],
};

/// vLLM's constraints of an answer.
static STRUCTURED_OUTPUTS: FieldTable = FieldTable {
    request: "`structured_outputs`",
    obeyed: &[&["choice", "json"]],
    without_effect: &[&["disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"]],
    refused: &[&[refused(&["regex", "grammar", "json_object", "structural_tag"], Off::Empty, FREE)]],
    nested: &[],
};

static STREAM_OPTIONS: FieldTable = FieldTable {
    request: "`stream_options`",
    obeyed: &[&["include_usage"]],
    without_effect: &[&["include_obfuscation"]],
    refused: &[&[refused(
        &["continuous_usage_stats"],
        Off::Empty,
        "usage comes with the last event alone; leave it out",
    )]],
    nested: &[],
};

/// Of every route.
const SHARED: &[&str] = &[
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos",
    "min_tokens", "include_stop_str_in_output", "skip_special_tokens", "min_p", "allowed_token_ids",
    "bad_words", "guided_choice", "guided_json", "json_schema", "structured_outputs", "user",
];

/// Of completions and chats.
const TEXT: &[&str] = &[
    "n", "best_of", "max_tokens", "logprobs", "response_format", "add_special_tokens",
    "truncate_prompt_tokens",
];

const COMPLETION: &[&str] = &["prompt", "prompt_embeds", "echo"];

const CONVERSATION: &[&str] = &[
    "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "chat_template_kwargs",
    "continue_final_message",
];

const RESPONSE: &[&str] = &[
    "input", "instructions", "max_output_tokens", "top_logprobs", "include", "text", "chat_template_kwargs",
];

/// The form of a response's text.
static RESPONSE_TEXT: FieldTable = FieldTable {
    request: "`text`",
    obeyed: &[&["format"]],
    without_effect: &[],
    refused: &[&[refused(
        &["verbosity"],
        Off::Words(&["medium"]),
        "say in `input` how long the answer is to be",
    )]],
    nested: &[],
};

/// Names of the request, accounting, caches, and helps that change the time and not the answer.
const HARMLESS: &[&str] = &[
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "priority", "request_id", "rid", "cache_salt", "cache_prompt", "id_slot", "keep_alive",
    "ttl", "draft_model", "usage", "include_reasoning", "separate_reasoning", "stream_reasoning",
    // Without effect unless another field, which is refused, is on.
    "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "dynatemp_low", "dynatemp_high",
    "smoothing_curve", "early_stopping", "guided_decoding_backend", "guided_whitespace_pattern",
    "repeat_last_n", "n_keep",
];

/// Without tools there is nothing that they could change.
const WITHOUT_TOOLS: &[&str] = &["parallel_tool_calls", "parse_tool_calls", "tool_prompt"];

const NOT_OF_COMPLETIONS: &[RefusedFields] = &[
    refused(&["messages"], Off::Empty, "messages are for /v1/chat/completions; completions take `prompt`"),
    refused(&["input"], Off::Empty, "`input` is for /v1/responses; completions take `prompt`"),
    refused(&["instructions"], Off::Empty, "`instructions` are for /v1/responses; put them into `prompt`"),
    refused(&["max_completion_tokens"], Off::Empty, "it is for chats; completions take `max_tokens`"),
    refused(&["max_output_tokens"], Off::Empty, "it is for /v1/responses; completions take `max_tokens`"),
    refused(&["top_logprobs"], Off::Number(0.0), "it is for chats; completions take a number as `logprobs`"),
    refused(&["suffix"], Off::Empty, "text before a suffix is not generated by this server"),
    refused(
        &["add_generation_prompt", "chat_template_kwargs"],
        Off::Empty,
        "it is for /v1/chat/completions: completions have no template",
    ),
    refused(
        &["continue_final_message"],
        Off::Empty,
        "it is for /v1/chat/completions; put the text into `prompt`",
    ),
    refused(&["tools"], Off::Empty, NO_TOOLS),
];

const NOT_OF_CHATS: &[RefusedFields] = &[
    refused(&["prompt"], Off::Empty, "`prompt` is for /v1/completions; chats take `messages`"),
    refused(&["input"], Off::Empty, "`input` is for /v1/responses; chats take `messages`"),
    refused(
        &["instructions"],
        Off::Empty,
        "`instructions` are for /v1/responses; chats take a system message",
    ),
    refused(
        &["max_output_tokens"],
        Off::Empty,
        "it is for /v1/responses; chats take `max_completion_tokens`",
    ),
    refused(&["echo"], Off::Empty, "the conversation is not repeated; /v1/completions repeats its prompt"),
    refused(&["suffix"], Off::Empty, "text before a suffix is not generated by this server"),
];

const NOT_OF_RESPONSES: &[RefusedFields] = &[
    refused(&["prompt"], Off::Empty, "stored prompts are not kept by this server; send the text as `input`"),
    refused(&["messages"], Off::Empty, "messages are for /v1/chat/completions; responses take `input`"),
    refused(&["max_tokens", "max_completion_tokens"], Off::Empty, "responses take `max_output_tokens`"),
    refused(&["n", "best_of"], Off::Number(1.0), "a response is one; /v1/chat/completions has `n`"),
    refused(&["logprobs"], Off::Empty, "responses take `top_logprobs`"),
    refused(&["echo"], Off::Empty, "the input is not repeated; /v1/completions repeats its prompt"),
    refused(
        &["previous_response_id"],
        Off::Empty,
        "responses are not kept by this server; send the whole conversation",
    ),
    refused(
        &["conversation"],
        Off::Empty,
        "conversations are not kept by this server; send the whole conversation",
    ),
    refused(&["background"], Off::False, "this server answers at once; leave it out"),
    refused(
        &["context_management"],
        Off::Empty,
        "conversations are not compacted by this server; leave it out",
    ),
    refused(&["truncation"], Off::Words(&["disabled"]), "input that is too long is refused, and not cut"),
    refused(&["response_format"], Off::Empty, "responses take `text.format`"),
];

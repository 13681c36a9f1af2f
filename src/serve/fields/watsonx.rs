//! The fields of watsonx's API for text generation, and of gneiss's own route.

use super::engines::SAMPLERS;
use super::{FieldTable, Off, RefusedFields, refused};

/// Fields of `POST /ml/v1/text/generation`, of a deployment's, and of their streams.
pub(in crate::serve) static GENERATION: FieldTable = FieldTable {
    request: "/ml/v1/text/generation",
    obeyed: &[&["input", "model_id", "parameters", "moderations"]],
    without_effect: &[&["project_id", "space_id", "wml_instance_crn", "extensions"]],
    refused: &[NOT_AT_THE_TOP, FORMS, SAMPLERS],
    nested: &[("parameters", &PARAMETERS)],
};

static PARAMETERS: FieldTable = FieldTable {
    request: "`parameters`",
    obeyed: &[&[
        "decoding_method", "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k",
        "random_seed", "repetition_penalty", "stop_sequences", "include_stop_sequence", "time_limit",
        "truncate_input_tokens", "return_options",
    ]],
    without_effect: &[],
    refused: &[NOT_OF_PARAMETERS, FORMS, SAMPLERS],
    nested: &[("return_options", &RETURN_OPTIONS)],
};

static RETURN_OPTIONS: FieldTable = FieldTable {
    request: "`parameters.return_options`",
    obeyed: &[&["input_text", "input_tokens", "generated_tokens", "token_logprobs", "top_n_tokens"]],
    without_effect: &[],
    refused: &[&[refused(
        &["token_ranks"],
        Off::Empty,
        "ranks are not offered by this server; top_n_tokens and token_logprobs are",
    )]],
    nested: &[],
};

/// Fields of `POST /v1/classify`.
pub(in crate::serve) static CLASSIFY: FieldTable = FieldTable {
    request: "/v1/classify",
    obeyed: &[&["model", "input", "task", "labels", "hard_prompt"]],
    without_effect: &[&["user", "metadata"]],
    refused: &[&[refused(&["prompt", "messages"], Off::Empty, "the text to classify is `input`")]],
    nested: &[],
};

const NOT_AT_THE_TOP: &[RefusedFields] = &[
    refused(&["messages"], Off::Empty, "messages are for /ml/v1/text/chat; this route takes `input`"),
    refused(&["prompt"], Off::Empty, "the text is `input` here"),
    refused(
        &[
            "max_new_tokens", "min_new_tokens", "decoding_method", "temperature", "top_p", "top_k",
            "random_seed", "repetition_penalty", "stop_sequences", "time_limit", "truncate_input_tokens",
            "return_options", "length_penalty",
        ],
        Off::Null,
        INSIDE,
    ),
    refused(&["prompt_variables"], Off::Empty, VARIABLES),
    refused(&["max_tokens"], Off::Null, "it is `parameters.max_new_tokens` here"),
];

const NOT_OF_PARAMETERS: &[RefusedFields] = &[
    refused(
        &["length_penalty"],
        Off::Empty,
        "text that grows likelier to end with its length is not offered by this server; max_new_tokens bounds it",
    ),
    refused(&["prompt_variables"], Off::Empty, VARIABLES),
    refused(
        &["presence_penalty", "frequency_penalty"],
        Off::Number(0.0),
        "not offered here; repetition_penalty is",
    ),
    refused(&["logit_bias"], Off::Empty, "not offered here; /v1/completions has it"),
    refused(&["logprobs"], Off::Empty, "it is `return_options.token_logprobs` here"),
    refused(&["top_logprobs"], Off::Number(0.0), "it is `return_options.top_n_tokens` here"),
    refused(&["n"], Off::Number(1.0), "an answer is one here; /v1/completions has `n`"),
    refused(&["max_tokens", "max_completion_tokens"], Off::Null, "it is `max_new_tokens` here"),
    refused(&["min_tokens"], Off::Number(0.0), "it is `min_new_tokens` here"),
    refused(&["seed"], Off::Null, "it is `random_seed` here"),
    refused(&["stop"], Off::Empty, "it is `stop_sequences` here"),
    refused(&["guardrails*", "moderations"], Off::Empty, "this server moderates nothing; leave it out"),
];

/// What binds an answer, bans tokens or changes the text, as other engines have it.
const FORMS: &[RefusedFields] = &[
    refused(
        &[
            "guided_*", "structured_outputs", "response_format", "json_schema", "grammar*", "regex*",
            "decoding",
        ],
        Off::Empty,
        FREE,
    ),
    refused(&["allowed_token*", "bad_words*"], Off::Empty, LISTS),
    refused(&["min_p"], Off::Number(0.0), "not offered here; /v1/completions has it"),
    refused(
        &["ignore_eos", "stop_token_ids", "prompt_embeds"],
        Off::Empty,
        "not offered here; /v1/completions has it",
    ),
    refused(&["skip_special_tokens"], Off::True, "not offered here; /v1/completions has it"),
    refused(&["echo"], Off::Empty, "it is `parameters.return_options.input_text` here"),
    refused(&["lora*"], Off::Empty, "tuned prompts are deployments of this server"),
];

const LISTS: &str =
    "tokens are not banned here; /v1/completions has `bad_words`, `allowed_token_ids` and `logit_bias`";
const FREE: &str = "answers are not bound to a form here; /v1/completions has `guided_choice`";
const INSIDE: &str = "put it into `parameters`";
const VARIABLES: &str = "a tuned prompt has one variable, the input; it is `input` of the body";

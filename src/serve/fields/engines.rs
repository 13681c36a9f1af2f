//! Fields that other engines act on, and this server does not: of vLLM, SGLang, TGI, llama.cpp, LM Studio, Ollama,
//! text-generation-webui, KoboldCpp, TensorRT-LLM and services in front of such.

use super::{Off, RefusedFields, refused};

/// What binds an answer to a form.
pub(super) const CONSTRAINTS: &[RefusedFields] = &[refused(
    &[
        "guided_*", "json_mode", "format", "grammar*", "regex*", "ebnf", "structural_tag", "constraints",
        "force_words_ids",
    ],
    Off::Empty,
    FREE,
)];

pub(super) const FREE: &str = "answers are bound to a list of texts alone by this server: `guided_choice`, or `response_format` with \
                    a JSON schema that lists its values";

/// Ways to choose tokens that other engines have.
pub(super) const SAMPLERS: &[RefusedFields] = &[
    refused(&["use_beam_search", "beam_search*"], Off::Empty, NO_BEAMS),
    refused(&["num_beams", "num_beam_groups", "beam_width"], Off::Number(1.0), NO_BEAMS),
    refused(&["diversity_penalty"], Off::Number(0.0), NO_BEAMS),
    refused(
        &[
            "typical_p", "typical", "tfs", "tfs_z", "guidance_scale", "cfg_scale",
            "encoder_repetition_penalty",
        ],
        Off::Number(1.0),
        NO_SAMPLER,
    ),
    refused(
        &[
            "top_a", "nsigma", "skew", "epsilon_cutoff", "eta_cutoff", "mirostat*", "dry_*", "xtc_*",
            "dynatemp_*", "smoothing_factor", "adaptive_*", "penalty_alpha", "no_repeat_ngram*", "min_keep",
        ],
        Off::Number(0.0),
        NO_SAMPLER,
    ),
    refused(&["top_n_sigma"], Off::Number(-1.0), NO_SAMPLER),
    refused(
        &[
            "dynamic_temperature", "negative_prompt", "samplers", "sampler_*", "temperature_last", "preset",
            "watermark*",
        ],
        Off::Empty,
        NO_SAMPLER,
    ),
    refused(
        &["logits_processor*", "custom_logit_processor", "custom_params"],
        Off::Empty,
        "this server runs no code of a request; `logit_bias` changes logits",
    ),
    refused(&["vllm_xargs", "extra_args"], Off::Empty, "this server runs no code of a request; leave it out"),
];

const NO_BEAMS: &str =
    "beams are not searched by this server; temperature 0 takes the likeliest token each time";
const NO_SAMPLER: &str =
    "tokens are not chosen so by this server; `temperature`, `top_k`, `top_p` and the penalties are there";

/// What a prompt or an answer may consist of.
pub(super) const TOKENS: &[RefusedFields] = &[
    refused(&["length_penalty"], Off::Number(1.0), NO_BEAMS),
    refused(
        &[
            "bad_words_ids", "bad", "banned_*", "custom_token_bans", "suppress_tokens",
            "begin_suppress_tokens", "sequence_bias", "forced_*",
        ],
        Off::Empty,
        BIAS,
    ),
    refused(&["ban_eos_token"], Off::Empty, "it is `ignore_eos` here"),
    refused(&["truncation_side"], Off::Words(&["left"]), "prompts are cut at their left by this server"),
    refused(&["spaces_between_special_tokens"], Off::True, "no spaces are put between tokens by this server"),
    refused(&["prompt_embeds"], Off::Empty, "it is for /v1/completions; this route takes text"),
    refused(&["input_embeds"], Off::Empty, "this server takes text and token ids"),
    refused(&["stop_regex"], Off::Empty, "texts end by `stop`, whose strings are taken as they are"),
    refused(&["no_stop_trim"], Off::Empty, "it is `include_stop_str_in_output` here"),
    refused(
        &["chat_template", "instruction_template*", "template"],
        Off::Empty,
        "chats go through the checkpoint's own template",
    ),
    refused(&["raw"], Off::Empty, "/v1/completions takes text as it is"),
    refused(&["system"], Off::Empty, "put it into a message of the role system, or into the prompt"),
    refused(
        &["enable_thinking"],
        Off::Null,
        "put it into `chat_template_kwargs`, from which the template reads it",
    ),
    refused(
        &["documents"],
        Off::Empty,
        "put them into `chat_template_kwargs`, from which the template reads them",
    ),
    refused(
        &["images", "image_data", "mm_processor_kwargs", "media_io_kwargs"],
        Off::Empty,
        "this server takes text alone",
    ),
    refused(
        &["lora*", "adapter_id"],
        Off::Empty,
        "tuned prompts are models of this server: name one as `model`",
    ),
    refused(&["models"], Off::Empty, "a request is for one model: name it as `model`"),
    refused(&["session_params"], Off::Empty, "this server keeps no sessions; send the whole prompt"),
    refused(&["data_sources"], Off::Empty, "this server looks nothing up; leave it out"),
    refused(&["transforms"], Off::Empty, "prompts are not rewritten by this server; leave it out"),
    refused(&["plugins"], Off::Empty, "this server has no plugins; leave it out"),
    refused(
        &["nvext"],
        Off::Empty,
        "put its fields at the top level, if they are listed in this server's documentation",
    ),
];

const BIAS: &str = "it is `bad_words` or `allowed_token_ids` here; a `logit_bias` of -100 bans a token";

/// What this server has under another name.
pub(super) const OTHER_NAMES: &[RefusedFields] = &[
    refused(
        &["options", "parameters"],
        Off::Empty,
        "put its fields at the top level: `temperature`, `top_k`, `seed`, `stop`",
    ),
    refused(&["inputs"], Off::Empty, "it is `prompt`, or `messages`, here"),
    refused(&["num_predict", "n_predict"], Off::Number(-1.0), MAX_TOKENS),
    refused(&["max_new_tokens", "max_tokens_to_sample", "max_length"], Off::Null, MAX_TOKENS),
    refused(&["min_new_tokens", "min_length"], Off::Number(0.0), "it is `min_tokens` here"),
    refused(
        &["repeat_penalty", "rep_pen*"],
        Off::Number(1.0),
        "it is `repetition_penalty` here, over the whole text",
    ),
    refused(&["repetition_penalty_range"], Off::Number(0.0), "the penalty is over the whole text here"),
    refused(&["random_seed", "sampling_seed"], Off::Null, "it is `seed` here"),
    refused(&["stop_sequences", "stopping_strings"], Off::Empty, "it is `stop` here"),
    refused(&["decoding_method"], Off::Null, "it is `temperature` here: 0 is greedy"),
    refused(
        &["do_sample"],
        Off::Null,
        "it is `temperature` here: 0 takes the likeliest token, more than 0 draws",
    ),
    refused(&["time_limit", "max_time"], Off::Null, TIME),
    refused(&["t_max_predict_ms"], Off::Number(0.0), TIME),
    refused(&["truncate"], Off::Empty, TRUNCATE),
    refused(
        &["truncate_input_tokens", "truncation_length", "prompt_truncate_len"],
        Off::Number(0.0),
        TRUNCATE,
    ),
];

const MAX_TOKENS: &str = "it is `max_tokens` here";
const TIME: &str = "the operator of the server bounds the time of a request; `max_tokens` bounds its length";
const TRUNCATE: &str = "it is `truncate_prompt_tokens` here";

/// What an answer may have beside text, and how it may be written.
pub(super) const ANSWERS: &[RefusedFields] = &[
    refused(&["audio"], Off::Empty, "this server answers in text"),
    refused(&["modalities"], Off::Words(&["text"]), "this server answers in text"),
    refused(
        &["reasoning"],
        Off::Empty,
        "answers are not reasoned about apart from their text by this server",
    ),
    refused(&["reasoning_effort"], Off::Words(&["none"]), "the model's effort can't be set; leave it out"),
    refused(
        &["reasoning_format"],
        Off::Words(&["none", "auto"]),
        "answers are one text on this server; leave it out",
    ),
    refused(&["thinking*", "think"], Off::Empty, "the model's effort can't be set; leave it out"),
    refused(&["verbosity"], Off::Words(&["medium"]), "say in the prompt how long the answer is to be"),
    refused(&["web_search_options"], Off::False, "this server searches nothing; leave it out"),
    refused(&["safe_prompt"], Off::Empty, "this server adds nothing to a prompt; leave it out"),
    refused(&["guardrails", "moderation*"], Off::Empty, "this server moderates nothing; leave it out"),
    refused(&["prompt_logprobs"], Off::False, "/v1/completions gives them with `echo` and `logprobs`"),
    refused(&["n_probs", "top_n_tokens"], Off::Number(0.0), "it is `logprobs` here"),
    refused(
        &["return_tokens_as_token_ids", "return_token_ids", "return_tokens"],
        Off::Empty,
        "answers show tokens as text; leave it out",
    ),
    refused(&["return_full_text"], Off::Empty, "it is `echo` of /v1/completions here"),
    refused(&["return_hidden_states"], Off::Empty, "hidden states are not given by this server"),
    refused(&["details"], Off::Empty, "answers have `usage` and `logprobs`; leave it out"),
    refused(&["decoder_input_details"], Off::Empty, "/v1/completions gives them with `echo` and `logprobs`"),
];

pub(super) const TOOLS: &[RefusedFields] = &[
    refused(&["tools", "functions", "max_tool_calls"], Off::Empty, NO_TOOLS),
    refused(&["tool_choice", "function_call"], Off::Words(&["none", "auto"]), NO_TOOLS),
];

pub(super) const NO_TOOLS: &str = "this server calls no tools; leave it out";

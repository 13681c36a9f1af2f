//! Fields that other engines act on, and this server does not: of vLLM, SGLang, TGI, llama.cpp, LM Studio, Ollama,
//! text-generation-webui, KoboldCpp, TensorRT-LLM and services in front of such.

use super::{Off, RefusedField, refused};

/// What binds an answer to a form.
pub(super) const CONSTRAINTS: &[RefusedField] = &[
    refused("guided_*", Off::Empty, FREE),
    refused("json_mode", Off::Empty, FREE),
    refused("format", Off::Empty, FREE),
    refused("grammar*", Off::Empty, FREE),
    refused("regex*", Off::Empty, FREE),
    refused("ebnf", Off::Empty, FREE),
    refused("structural_tag", Off::Empty, FREE),
    refused("constraints", Off::Empty, FREE),
    refused("force_words_ids", Off::Empty, FREE),
];

pub(super) const FREE: &str = "answers are bound to a list of texts alone by this server: `guided_choice`, or `response_format` with \
                    a JSON schema that lists its values";

/// Ways to choose tokens that other engines have.
pub(super) const SAMPLERS: &[RefusedField] = &[
    refused("use_beam_search", Off::Empty, NO_BEAMS),
    refused("num_beams", Off::Number(1.0), NO_BEAMS),
    refused("num_beam_groups", Off::Number(1.0), NO_BEAMS),
    refused("beam_width", Off::Number(1.0), NO_BEAMS),
    refused("beam_search*", Off::Empty, NO_BEAMS),
    refused("diversity_penalty", Off::Number(0.0), NO_BEAMS),
    refused("typical_p", Off::Number(1.0), NO_SAMPLER),
    refused("typical", Off::Number(1.0), NO_SAMPLER),
    refused("top_a", Off::Number(0.0), NO_SAMPLER),
    refused("tfs", Off::Number(1.0), NO_SAMPLER),
    refused("tfs_z", Off::Number(1.0), NO_SAMPLER),
    refused("top_n_sigma", Off::Number(-1.0), NO_SAMPLER),
    refused("nsigma", Off::Number(0.0), NO_SAMPLER),
    refused("skew", Off::Number(0.0), NO_SAMPLER),
    refused("epsilon_cutoff", Off::Number(0.0), NO_SAMPLER),
    refused("eta_cutoff", Off::Number(0.0), NO_SAMPLER),
    refused("mirostat*", Off::Number(0.0), NO_SAMPLER),
    refused("dry_*", Off::Number(0.0), NO_SAMPLER),
    refused("xtc_*", Off::Number(0.0), NO_SAMPLER),
    refused("dynatemp_*", Off::Number(0.0), NO_SAMPLER),
    refused("dynamic_temperature", Off::Empty, NO_SAMPLER),
    refused("smoothing_factor", Off::Number(0.0), NO_SAMPLER),
    refused("adaptive_*", Off::Number(0.0), NO_SAMPLER),
    refused("penalty_alpha", Off::Number(0.0), NO_SAMPLER),
    refused("guidance_scale", Off::Number(1.0), NO_SAMPLER),
    refused("cfg_scale", Off::Number(1.0), NO_SAMPLER),
    refused("negative_prompt", Off::Empty, NO_SAMPLER),
    refused("no_repeat_ngram*", Off::Number(0.0), NO_SAMPLER),
    refused("encoder_repetition_penalty", Off::Number(1.0), NO_SAMPLER),
    refused("min_keep", Off::Number(0.0), NO_SAMPLER),
    refused("samplers", Off::Empty, NO_SAMPLER),
    refused("sampler_*", Off::Empty, NO_SAMPLER),
    refused("temperature_last", Off::Empty, NO_SAMPLER),
    refused("preset", Off::Empty, NO_SAMPLER),
    refused("watermark*", Off::Empty, NO_SAMPLER),
    refused(
        "logits_processor*",
        Off::Empty,
        "this server runs no code of a request; `logit_bias` changes logits",
    ),
    refused(
        "custom_logit_processor",
        Off::Empty,
        "this server runs no code of a request; `logit_bias` changes logits",
    ),
    refused(
        "custom_params",
        Off::Empty,
        "this server runs no code of a request; `logit_bias` changes logits",
    ),
    refused("vllm_xargs", Off::Empty, "this server runs no code of a request; leave it out"),
    refused("extra_args", Off::Empty, "this server runs no code of a request; leave it out"),
];

const NO_BEAMS: &str =
    "beams are not searched by this server; temperature 0 takes the likeliest token each time";
const NO_SAMPLER: &str =
    "tokens are not chosen so by this server; `temperature`, `top_k`, `top_p` and the penalties are there";

/// What a prompt or an answer may consist of.
pub(super) const TOKENS: &[RefusedField] = &[
    refused("length_penalty", Off::Number(1.0), NO_BEAMS),
    refused("bad_words_ids", Off::Empty, BIAS),
    refused("bad", Off::Empty, BIAS),
    refused("banned_*", Off::Empty, BIAS),
    refused("custom_token_bans", Off::Empty, BIAS),
    refused("suppress_tokens", Off::Empty, BIAS),
    refused("begin_suppress_tokens", Off::Empty, BIAS),
    refused("sequence_bias", Off::Empty, BIAS),
    refused("ban_eos_token", Off::Empty, "it is `ignore_eos` here"),
    refused("forced_*", Off::Empty, BIAS),
    refused("truncation_side", Off::Words(&["left"]), "prompts are cut at their left by this server"),
    refused("spaces_between_special_tokens", Off::True, "no spaces are put between tokens by this server"),
    refused("prompt_embeds", Off::Empty, "it is for /v1/completions; this route takes text"),
    refused("input_embeds", Off::Empty, "this server takes text and token ids"),
    refused("stop_regex", Off::Empty, "texts end by `stop`, whose strings are taken as they are"),
    refused("no_stop_trim", Off::Empty, "it is `include_stop_str_in_output` here"),
    refused("chat_template", Off::Empty, "chats go through the checkpoint's own template"),
    refused("instruction_template*", Off::Empty, "chats go through the checkpoint's own template"),
    refused("template", Off::Empty, "chats go through the checkpoint's own template"),
    refused("raw", Off::Empty, "/v1/completions takes text as it is"),
    refused("system", Off::Empty, "put it into a message of the role system, or into the prompt"),
    refused(
        "enable_thinking",
        Off::Null,
        "put it into `chat_template_kwargs`, from which the template reads it",
    ),
    refused(
        "documents",
        Off::Empty,
        "put them into `chat_template_kwargs`, from which the template reads them",
    ),
    refused("images", Off::Empty, "this server takes text alone"),
    refused("image_data", Off::Empty, "this server takes text alone"),
    refused("mm_processor_kwargs", Off::Empty, "this server takes text alone"),
    refused("media_io_kwargs", Off::Empty, "this server takes text alone"),
    refused("lora*", Off::Empty, "tuned prompts are models of this server: name one as `model`"),
    refused("adapter_id", Off::Empty, "tuned prompts are models of this server: name one as `model`"),
    refused("models", Off::Empty, "a request is for one model: name it as `model`"),
    refused("session_params", Off::Empty, "this server keeps no sessions; send the whole prompt"),
    refused("data_sources", Off::Empty, "this server looks nothing up; leave it out"),
    refused("transforms", Off::Empty, "prompts are not rewritten by this server; leave it out"),
    refused("plugins", Off::Empty, "this server has no plugins; leave it out"),
    refused(
        "nvext",
        Off::Empty,
        "put its fields at the top level, if they are listed in this server's documentation",
    ),
];

const BIAS: &str = "it is `bad_words` or `allowed_token_ids` here; a `logit_bias` of -100 bans a token";

/// What this server has under another name.
pub(super) const OTHER_NAMES: &[RefusedField] = &[
    refused("options", Off::Empty, "put its fields at the top level: `temperature`, `top_k`, `seed`, `stop`"),
    refused(
        "parameters",
        Off::Empty,
        "put its fields at the top level: `temperature`, `top_k`, `seed`, `stop`",
    ),
    refused("inputs", Off::Empty, "it is `prompt`, or `messages`, here"),
    refused("num_predict", Off::Number(-1.0), MAX_TOKENS),
    refused("n_predict", Off::Number(-1.0), MAX_TOKENS),
    refused("max_new_tokens", Off::Null, MAX_TOKENS),
    refused("max_tokens_to_sample", Off::Null, MAX_TOKENS),
    refused("max_length", Off::Null, MAX_TOKENS),
    refused("min_new_tokens", Off::Number(0.0), "it is `min_tokens` here"),
    refused("min_length", Off::Number(0.0), "it is `min_tokens` here"),
    refused("repeat_penalty", Off::Number(1.0), "it is `repetition_penalty` here, over the whole text"),
    refused("rep_pen*", Off::Number(1.0), "it is `repetition_penalty` here, over the whole text"),
    refused("repetition_penalty_range", Off::Number(0.0), "the penalty is over the whole text here"),
    refused("random_seed", Off::Null, "it is `seed` here"),
    refused("sampling_seed", Off::Null, "it is `seed` here"),
    refused("stop_sequences", Off::Empty, "it is `stop` here"),
    refused("stopping_strings", Off::Empty, "it is `stop` here"),
    refused("decoding_method", Off::Null, "it is `temperature` here: 0 is greedy"),
    refused(
        "do_sample",
        Off::Null,
        "it is `temperature` here: 0 takes the likeliest token, more than 0 draws",
    ),
    refused("time_limit", Off::Null, TIME),
    refused("t_max_predict_ms", Off::Number(0.0), TIME),
    refused("max_time", Off::Null, TIME),
    refused("truncate", Off::Empty, TRUNCATE),
    refused("truncate_input_tokens", Off::Number(0.0), TRUNCATE),
    refused("truncation_length", Off::Number(0.0), TRUNCATE),
    refused("prompt_truncate_len", Off::Number(0.0), TRUNCATE),
];

const MAX_TOKENS: &str = "it is `max_tokens` here";
const TIME: &str = "the operator of the server bounds the time of a request; `max_tokens` bounds its length";
const TRUNCATE: &str = "it is `truncate_prompt_tokens` here";

/// What an answer may have beside text, and how it may be written.
pub(super) const ANSWERS: &[RefusedField] = &[
    refused("audio", Off::Empty, "this server answers in text"),
    refused("modalities", Off::Words(&["text"]), "this server answers in text"),
    refused("reasoning", Off::Empty, "answers are not reasoned about apart from their text by this server"),
    refused("reasoning_effort", Off::Words(&["none"]), "the model's effort can't be set; leave it out"),
    refused(
        "reasoning_format",
        Off::Words(&["none", "auto"]),
        "answers are one text on this server; leave it out",
    ),
    refused("thinking*", Off::Empty, "the model's effort can't be set; leave it out"),
    refused("think", Off::Empty, "the model's effort can't be set; leave it out"),
    refused("verbosity", Off::Words(&["medium"]), "say in the prompt how long the answer is to be"),
    refused("web_search_options", Off::False, "this server searches nothing; leave it out"),
    refused("safe_prompt", Off::Empty, "this server adds nothing to a prompt; leave it out"),
    refused("guardrails", Off::Empty, "this server moderates nothing; leave it out"),
    refused("moderation*", Off::Empty, "this server moderates nothing; leave it out"),
    refused("prompt_logprobs", Off::False, "/v1/completions gives them with `echo` and `logprobs`"),
    refused("n_probs", Off::Number(0.0), "it is `logprobs` here"),
    refused("top_n_tokens", Off::Number(0.0), "it is `logprobs` here"),
    refused("return_tokens_as_token_ids", Off::Empty, "answers show tokens as text; leave it out"),
    refused("return_token_ids", Off::Empty, "answers show tokens as text; leave it out"),
    refused("return_tokens", Off::Empty, "answers show tokens as text; leave it out"),
    refused("return_full_text", Off::Empty, "it is `echo` of /v1/completions here"),
    refused("return_hidden_states", Off::Empty, "hidden states are not given by this server"),
    refused("details", Off::Empty, "answers have `usage` and `logprobs`; leave it out"),
    refused("decoder_input_details", Off::Empty, "/v1/completions gives them with `echo` and `logprobs`"),
];

pub(super) const TOOLS: &[RefusedField] = &[
    refused("tools", Off::Empty, NO_TOOLS),
    refused("functions", Off::Empty, NO_TOOLS),
    refused("tool_choice", Off::Words(&["none", "auto"]), NO_TOOLS),
    refused("function_call", Off::Words(&["none", "auto"]), NO_TOOLS),
    refused("max_tool_calls", Off::Empty, NO_TOOLS),
];

pub(super) const NO_TOOLS: &str = "this server calls no tools; leave it out";

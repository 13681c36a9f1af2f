//! The tokens that end a generation. Files seldom name all of them, and llama.cpp finds the others by their text
//! (`special_eog_ids` in <https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp>).

use super::id;
use super::vocabulary::GgufVocabulary;
use crate::Result;
use crate::checkpoint::gguf::metadata::GgufMetadata;

/// Ends of a turn and of a message.
const OTHER_END_IDS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Texts of tokens that end a generation in every vocabulary that has them.
const NAMES: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    END,
    RETURN,
    "<|call|>",
    FLUSH,
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    STRIKE,
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    TOOL_RESPONSE,
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
];
const END: &str = "<|end|>";
const RETURN: &str = "<|return|>";
const CALLS: [&str; 2] = ["<|call|>", "<|calls|>"];
const FLUSH: &str = "<|flush|>";
const STRIKE: &str = "</s>";
const TOOL_RESPONSE: &str = "<|tool_response>";
const PLAMO_EOS: &str = "<|plamo:eos|>";

/// Tokens of code completion that end a generation: their keys, and their texts in files without the key.
const COMPLETION: [(&str, &[&str]); 3] = [
    ("tokenizer.ggml.fim_pad_token_id", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (
        "tokenizer.ggml.fim_rep_token_id",
        &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ),
    ("tokenizer.ggml.fim_sep_token_id", &["<|file_sep|>"]),
];

/// The tokens that end a generation.
pub(super) struct EndTokens {
    /// The end-of-text token first.
    pub ids: Vec<u32>,
    /// Tokens that are control tokens only because of their text: their type says something else.
    pub by_text: Vec<u32>,
}

impl EndTokens {
    /// # Errors
    /// Returns an error if the id of a key is not in the vocabulary.
    pub fn find(metadata: GgufMetadata<'_>, vocabulary: &GgufVocabulary, eos: u32) -> Result<Self> {
        let mut keyed = vec![eos];
        for key in OTHER_END_IDS {
            keyed.extend(id(metadata, vocabulary, key, None)?);
        }
        let mut named: Vec<u32> = NAMES.iter().filter_map(|name| vocabulary.id(name)).collect();
        for (key, names) in COMPLETION {
            match id(metadata, vocabulary, key, None)? {
                Some(id) => keyed.push(id),
                None => named.extend(names.iter().find_map(|name| vocabulary.id(name))),
            }
        }
        named.sort_unstable();
        let all: Vec<u32> = keyed.iter().chain(&named).copied().collect();
        let ends = |id: u32| id == eos || !is_text(vocabulary, id, &all);
        let by_text = named.into_iter().filter(|id| ends(*id) && !vocabulary.is_control(*id)).collect();
        let mut ids = Vec::new();
        for id in all.iter().copied().filter(|id| ends(*id)) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(Self { ids, by_text })
    }

    /// A warning if a token's type and its text disagree.
    pub fn warning(&self, vocabulary: &GgufVocabulary) -> Option<String> {
        if self.by_text.is_empty() {
            return None;
        }
        let texts: Vec<String> =
            self.by_text.iter().map(|id| format!("`{}`", vocabulary.text(*id))).collect();
        let texts = texts.join(", ");
        Some(format!(
            "`tokenizer.ggml.token_type` does not mark {texts} as control tokens; they are taken as such, and end a \
             generation, as in llama.cpp"
        ))
    }
}

/// Whether a token of this text ends a generation in a GGUF file that does not name it.
pub(crate) fn ends_by_text(text: &str) -> bool {
    NAMES.contains(&text)
}

/// Whether a token of [`NAMES`] ends nothing in this vocabulary, judged by the other ends in it: next to ends of calls,
/// `<|end|>` only ends a part of an answer, and next to ends of another kind `</s>` is markup.
fn is_text(vocabulary: &GgufVocabulary, id: u32, ends: &[u32]) -> bool {
    let has = |name: &str| vocabulary.id(name).is_some_and(|id| ends.contains(&id));
    let calls = CALLS.iter().any(|name| has(name));
    match vocabulary.text(id) {
        END => calls && (has(RETURN) || has(FLUSH)),
        STRIKE => has(TOOL_RESPONSE) || has(PLAMO_EOS),
        _ => false,
    }
}

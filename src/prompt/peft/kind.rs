//! The methods of PEFT whose adapters are prompts of a decoder.

use crate::config::PromptKind;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A method, by PEFT's name of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PeftType {
    /// Embeddings of virtual tokens.
    PromptTuning,
    /// The same: PEFT saves the rows that its encoder computed.
    PTuning,
    /// The same: PEFT saves the sum of the embeddings and what was learned.
    Cpt,
    /// One prompt that all tasks share, and two small factors for each task.
    MultitaskPromptTuning,
    /// Keys and values of virtual tokens: PEFT saves what its projection computed, if there was one.
    PrefixTuning,
    /// The same, with virtual tokens at the start that were not trained.
    Cartridge,
    /// gneiss's own: embeddings of virtual tokens that stand after the text in `task.json`. PEFT knows no such position, and
    /// refuses a name that it does not know.
    GneissPromptTuning,
}

impl PeftType {
    /// Every method.
    pub const ALL: [Self; 7] = [
        Self::PromptTuning,
        Self::PTuning,
        Self::Cpt,
        Self::MultitaskPromptTuning,
        Self::PrefixTuning,
        Self::Cartridge,
        Self::GneissPromptTuning,
    ];

    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptTuning => "PROMPT_TUNING",
            Self::PTuning => "P_TUNING",
            Self::Cpt => "CPT",
            Self::MultitaskPromptTuning => "MULTITASK_PROMPT_TUNING",
            Self::PrefixTuning => "PREFIX_TUNING",
            Self::Cartridge => "CARTRIDGE",
            Self::GneissPromptTuning => "GNEISS_PROMPT_TUNING",
        }
    }

    /// What the prompt puts in front of a sequence.
    pub fn prompt_kind(self) -> PromptKind {
        match self {
            Self::PrefixTuning | Self::Cartridge => PromptKind::Prefix,
            Self::PromptTuning
            | Self::PTuning
            | Self::Cpt
            | Self::MultitaskPromptTuning
            | Self::GneissPromptTuning => PromptKind::Embeddings,
        }
    }

    /// The method's tag on the hub.
    pub(super) fn tag(self) -> &'static str {
        match self {
            Self::PromptTuning | Self::GneissPromptTuning => "prompt-tuning",
            Self::PTuning => "p-tuning",
            Self::Cpt => "cpt",
            Self::MultitaskPromptTuning => "multitask-prompt-tuning",
            Self::PrefixTuning => "prefix-tuning",
            Self::Cartridge => "cartridge",
        }
    }

    /// Keys of [`AdapterConfig`](super::AdapterConfig) that PEFT's configuration of this method lacks.
    pub(super) fn absent_keys(self) -> &'static [&'static str] {
        const INIT: [&str; 3] = ["prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"];
        match self {
            Self::PromptTuning | Self::MultitaskPromptTuning | Self::GneissPromptTuning => &[],
            Self::Cpt => &["prompt_tuning_init", "prompt_tuning_init_text"],
            Self::PTuning | Self::PrefixTuning | Self::Cartridge => &INIT,
        }
    }

    /// The method with this name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

impl fmt::Display for PeftType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to do with an adapter of a method that gneiss does not read.
pub(super) fn unread_hint(method: &str) -> String {
    let names = PeftType::ALL.map(PeftType::name);
    let reads = format!("gneiss reads {} and {} adapters", names[..5].join(", "), names[5]);
    match method {
        "ADAPTION_PROMPT" => reads,
        _ if names.iter().any(|name| method.eq_ignore_ascii_case(name)) => {
            format!("{reads}, whose names are in capitals")
        }
        _ if method.contains("PROMPT") => reads,
        // The methods that change the base's weights can be merged into them.
        _ => format!(
            "{reads}; hint: merge it into its base with PEFT's merge_and_unload, and give the merged checkpoint as \
             the model"
        ),
    }
}

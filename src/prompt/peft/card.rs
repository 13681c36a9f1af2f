//! The model card: what the prompt is, how it was tuned, how to load it.

use std::fmt::Write;
use std::path::Path;

use super::{AdapterConfig, PeftType};
use crate::config::PromptKind;

/// What a model card says beyond [`AdapterConfig`]; what is empty or `None` is left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelCard {
    /// Title, such as the run's name.
    pub name: String,
    /// What the outputs are: classification or generation.
    pub task: String,
    /// Template of the model's input, with `{{input}}` in it.
    pub verbalizer: String,
    /// Text after which the virtual tokens stand; `None` if they stand at the start.
    pub before: Option<String>,
    /// Most tokens of an answer.
    pub max_output_tokens: Option<usize>,
    /// Name and value of each setting of the run.
    pub hyperparameters: Vec<(String, String)>,
    /// Optimizer steps that the prompt was tuned for.
    pub num_steps: Option<usize>,
    /// Training loss of the last step, mean cross-entropy of a target token in nats.
    pub train_loss: Option<f64>,
    /// Validation loss of the prompt, in the same unit.
    pub validation_loss: Option<f64>,
}

impl ModelCard {
    /// The card as Markdown with the hub's YAML header.
    pub fn render(&self, config: &AdapterConfig) -> String {
        let base = config.base_model_name_or_path.as_deref().unwrap_or_default();
        let mut sections = vec![header(base, config.peft_type), self.about(config)];
        if !self.verbalizer.is_empty() {
            sections.push(format!("## Verbalizer\n\n{}", fenced("text", &self.verbalizer)));
        }
        if let Some(text) = &self.before {
            sections.push(position(text));
        }
        if let Some(text) = config.prompt_tuning_init_text.as_deref().filter(|text| !text.is_empty()) {
            sections.push(format!("## Init text\n\n{}", fenced("text", text)));
        }
        if !self.hyperparameters.is_empty() {
            sections.push(format!("## Hyperparameters\n\n{}", table(&self.hyperparameters)));
        }
        if !base.is_empty() {
            let peft = match (&config.attention_layers, config.peft_type) {
                (None, PeftType::GneissPromptTuning) => NOT_AT_THE_START.to_owned(),
                (None, _) => fenced("python", &self.peft(base, config)),
                // transformers asks the cache that PEFT makes for the state of every Mamba2 layer, and finds keys there.
                (Some(_), _) => "PEFT can't use these keys and values: the base has Mamba2 layers, for which PEFT 0.21 has no \
                            place in a prefix.\n"
                    .to_owned(),
            };
            sections.push(format!("## With PEFT\n\n{peft}"));
            sections.push(format!(
                "## With gneiss\n\n{}\n`TEXT` is the verbalizer with the input in its place, and `DIR` is \
                 this folder.\n",
                fenced("sh", &gneiss(base, config))
            ));
        }
        sections.join("\n")
    }

    fn about(&self, config: &AdapterConfig) -> String {
        let name = if self.name.is_empty() { "Soft prompt" } else { &self.name };
        let base = config.base_model_name_or_path.clone().unwrap_or_default();
        let frozen = (config.peft_type == PeftType::Cartridge).then(|| config.num_frozen_tokens.unwrap_or(1));
        let rows = [
            ("Base model", base),
            ("Revision", config.revision.clone().unwrap_or_default()),
            ("Task", self.task.clone()),
            ("Virtual tokens", config.num_virtual_tokens.to_string()),
            ("Frozen virtual tokens", frozen.map(|tokens| tokens.to_string()).unwrap_or_default()),
            ("Steps", self.num_steps.map(|steps| steps.to_string()).unwrap_or_default()),
            ("Training loss", self.train_loss.map(|loss| format!("{loss:.4}")).unwrap_or_default()),
            ("Validation loss", self.validation_loss.map(|loss| format!("{loss:.4}")).unwrap_or_default()),
        ];
        let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
        let rows: Vec<_> = rows.map(|(key, value)| (key.to_string(), value)).collect();
        let what = match config.peft_type.prompt_kind() {
            PromptKind::Embeddings if self.before.is_some() => {
                "A soft prompt: embeddings of virtual tokens that stand in every input of a frozen model, after the text under \
                 Position."
            }
            PromptKind::Embeddings => {
                "A soft prompt: embeddings of virtual tokens that stand before every input of a frozen model."
            }
            PromptKind::Prefix => {
                "A soft prompt: keys and values of virtual tokens that stand before every input in the attention layers \
                 of a frozen model."
            }
        };
        format!("# {}\n\n{what}\n\n{}", one_line(name), table(&rows))
    }

    /// Python that loads the prompt and answers one input.
    fn peft(&self, base: &str, config: &AdapterConfig) -> String {
        let from = pretrained(base, config.revision.as_deref());
        let verbalizer = if self.verbalizer.is_empty() { "{{input}}" } else { &self.verbalizer };
        let tokens =
            self.max_output_tokens.map(|most| format!(", max_new_tokens={most}")).unwrap_or_default();
        let is_prefix = config.peft_type.prompt_kind() == PromptKind::Prefix;
        let imports = if is_prefix { "import torch\n" } else { "" };
        let answer = if is_prefix { prefix_answer(&tokens) } else { embeddings_answer(&tokens) };
        format!(
            "{imports}from peft import PeftModel\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\
             \n\
             base = AutoModelForCausalLM.from_pretrained({from})\n\
             tokenizer = AutoTokenizer.from_pretrained({from})\n\
             model = PeftModel.from_pretrained(base, \"DIR\")  # this folder\n\
             \n\
             text = {}.replace(\"{{{{input}}}}\", \"...\")\n\
             inputs = tokenizer(text, return_tensors=\"pt\")\n\
             {answer}",
            quoted(verbalizer)
        )
    }
}

/// Python that answers with embeddings. PEFT 0.21 asks transformers for the cache by a name that transformers 5.24 gave up,
/// finds none, and puts the embeddings in front of every new token again: it is right without a cache.
fn embeddings_answer(tokens: &str) -> String {
    format!(
        "# use_cache=False: with a cache, PEFT 0.21 on transformers 5.24 puts the prompt in again at every token\n\
         answer = model.generate(**inputs{tokens}, do_sample=False, use_cache=False)\n\
         print(tokenizer.decode(answer[0], skip_special_tokens=True))\n"
    )
}

/// Python that answers with keys and values, which are a cache. `model.generate` gives transformers 5.24 the cache by its old
/// name beside an empty one by the new name, and the empty one is used; the base model's own `generate` takes either name.
fn prefix_answer(tokens: &str) -> String {
    format!(
        "# base.generate: PEFT 0.21's model.generate leaves the keys and values out on transformers 5.24\n\
         prefix = model.get_prompt(batch_size=1)\n\
         length = prefix.get_seq_length()\n\
         inputs[\"input_ids\"] = torch.nn.functional.pad(inputs[\"input_ids\"], (length, 0))  # ids of virtual tokens are not read\n\
         inputs[\"attention_mask\"] = torch.ones_like(inputs[\"input_ids\"])\n\
         answer = base.generate(**inputs, past_key_values=prefix{tokens}, do_sample=False)\n\
         print(tokenizer.decode(answer[0, length:], skip_special_tokens=True))\n"
    )
}

/// Why PEFT reads no prompt that stands after a text.
const NOT_AT_THE_START: &str = "PEFT can't use this prompt: it puts virtual tokens before everything, and these stand after a \
                                text. The name GNEISS_PROMPT_TUNING in adapter_config.json keeps PEFT from loading the folder \
                                and giving other answers. `gneiss export --bake` writes a checkpoint with the prompt in its \
                                place, for transformers and other engines.\n";

/// The text after which the virtual tokens stand.
fn position(text: &str) -> String {
    let after = if text.is_empty() {
        "The virtual tokens stand after the tokens that the tokenizer adds before every text.\n".to_owned()
    } else {
        format!(
            "The virtual tokens stand after this text, with which every input begins:\n\n{}",
            fenced("text", text)
        )
    };
    format!("## Position\n\n{after}")
}

/// YAML that the hub reads.
fn header(base: &str, method: PeftType) -> String {
    let base = if base.is_empty() { String::new() } else { format!("base_model: {}\n", quoted(base)) };
    let library = match (method, base.is_empty()) {
        (PeftType::GneissPromptTuning, _) => "",
        (_, true) => "library_name: peft\n",
        (_, false) => "base_model_relation: adapter\nlibrary_name: peft\n",
    };
    format!("---\n{base}{library}pipeline_tag: text-generation\ntags:\n- {}\n- gneiss\n---\n", method.tag())
}

/// Arguments of transformers' `from_pretrained`, which wants a GGUF file apart from its folder.
pub(crate) fn pretrained(base: &str, revision: Option<&str>) -> String {
    let path = Path::new(base);
    let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if let (true, Some(name)) = (is_gguf, path.file_name()) {
        let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let (folder, name) = (folder.to_string_lossy(), name.to_string_lossy());
        return format!("{}, gguf_file={}", quoted(&folder), quoted(&name));
    }
    match revision {
        Some(revision) => format!("{}, revision={}", quoted(base), quoted(revision)),
        None => quoted(base),
    }
}

fn gneiss(base: &str, config: &AdapterConfig) -> String {
    let revision = config.revision.as_ref().map(|revision| format!("@{revision}")).unwrap_or_default();
    let model = format!("{base}{revision}").replace('\'', "'\\''");
    format!("gneiss generate --model '{model}' --adapter DIR TEXT\n")
}

/// A string literal that JSON, YAML and Python read alike.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A code block whose fence is longer than any run of backticks in it.
fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or_default();
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}\n", text.strip_suffix('\n').unwrap_or(text))
}

fn table(rows: &[(String, String)]) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    for (key, value) in rows {
        let cell = |text: &str| one_line(text).replace('|', "\\|");
        // Writing to a string can't fail.
        let _ = writeln!(text, "| {} | {} |", cell(key), cell(value));
    }
    text
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

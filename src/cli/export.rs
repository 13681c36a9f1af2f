//! `gneiss export`: tuned prompts for other engines, and for the hub.

mod push;

use super::{progress, stderr};
use clap::{ArgGroup, Args, ValueEnum};
use gneiss::export::{self, Bake, Baked, NamedPrompt, PromptEmbeds, ValueType, WrittenEmbeds};
use gneiss::{Error, session};
use std::path::{Path, PathBuf};

/// Writes tuned prompts for engines that do not read adapters, as tokens of a checkpoint or as embeddings of a text; or uploads
/// an adapter to the hub.
#[derive(Args)]
#[command(group(ArgGroup::new("kind").args(["bake", "format", "push"]).multiple(true).required(true)))]
pub struct Export {
    /// A tuned prompt: an adapter folder, a run folder, or org/name[@revision]; :TASK follows if it holds the prompts of
    /// several tasks. May be repeated with --bake. NAME becomes part of its tokens; by default it is the name of the run,
    /// folder or repository.
    #[arg(long = "adapter", value_name = "[NAME=]DIR[:TASK]", required = true)]
    adapters: Vec<String>,
    /// Write the base with each prompt's vectors as embeddings of new tokens `<|NAME:0|>`, `<|NAME:1|>` and so on.
    #[arg(long)]
    bake: bool,
    /// The base: a folder, a .gguf file or org/name[@revision]; by default the one that the prompts name.
    #[arg(long)]
    model: Option<String>,
    /// Output format: with --bake safetensors or gguf, without it prompt-embeds.
    #[arg(long, value_enum)]
    format: Option<OutputFormat>,
    /// Type of the values: f32, f16, bf16, or q8_0 for gguf; by default the base's.
    #[arg(long = "type", value_name = "TYPE")]
    value_type: Option<ValueType>,
    /// The folder or file to write; it must not exist, except as an empty folder.
    #[arg(long, required_unless_present = "push")]
    out: Option<PathBuf>,
    /// Upload the adapter with its model card to this repository of the hub, which is created if it does not exist. Needs a token
    /// with write access (HF_TOKEN). The training data is not uploaded.
    #[arg(long, value_name = "ORG/NAME", conflicts_with_all = ["bake", "format", "out", "value_type", "text", "input"])]
    push: Option<String>,
    /// With --push: a repository that is created is private.
    #[arg(long, requires = "push")]
    private: bool,
    /// For prompt-embeds: the whole text after the prompt; `\n` stands for a line break.
    #[arg(long, conflicts_with = "input")]
    text: Option<String>,
    /// For prompt-embeds: an input, which is put into the prompt's verbalizer.
    #[arg(long)]
    input: Option<String>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// The output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// A checkpoint folder.
    Safetensors,
    /// A GGUF file.
    Gguf,
    /// A tensor that torch.load reads.
    PromptEmbeds,
}

impl Export {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(repo) = &self.push {
            return self.push(repo);
        }
        let prompts = export::read_prompts(&self.adapters)?;
        prompts.iter().for_each(|prompt| super::warn_about(&prompt.adapter));
        match (self.bake, self.format) {
            (true, Some(OutputFormat::PromptEmbeds)) => {
                Err(bad("--format prompt-embeds: expected no --bake: it writes no checkpoint"))
            }
            (true, _) if self.text.is_some() || self.input.is_some() => {
                Err(bad("--text, --input: expected --format prompt-embeds, found --bake"))
            }
            (true, format) => self.bake(prompts, format.unwrap_or(OutputFormat::Safetensors)),
            (false, Some(OutputFormat::PromptEmbeds)) => self.embeds(&prompts),
            (false, _) => Err(bad("--format safetensors and gguf: expected --bake with them")),
        }
    }

    /// The output path, which the command line requires without --push.
    fn out(&self) -> &Path {
        self.out.as_deref().unwrap_or(Path::new(""))
    }

    fn push(&self, repo: &str) -> anyhow::Result<()> {
        let [adapter] = &self.adapters[..] else {
            return Err(bad("--adapter: expected one with --push, found several"));
        };
        let base = self.model.as_deref();
        let page = push::Push { adapter, repo, is_private: self.private, base }.run()?;
        if self.json {
            println!("{}", serde_json::json!({ "repo": repo, "url": page }));
        } else {
            println!("{page}");
            stderr::hint(format_args!("gneiss generate --model MODEL --adapter {repo} TEXT"));
        }
        Ok(())
    }

    fn model(&self, prompts: &[NamedPrompt]) -> gneiss::Result<String> {
        self.model.clone().map_or_else(|| export::base_model(prompts), Ok)
    }

    fn bake(&self, prompts: Vec<NamedPrompt>, format: OutputFormat) -> anyhow::Result<()> {
        let model = self.model(&prompts)?;
        for NamedPrompt { name, adapter } in &prompts {
            let own = adapter.config.base_model_name_or_path.as_deref().unwrap_or_default();
            if !own.is_empty() && !model.starts_with(own) {
                status!(
                    "note: {name} was tuned on {own} by its own configuration, and is baked into {model}"
                );
            }
        }
        let model = session::locate(&model)?;
        let bar = progress::bar(1, "", "{msg:>30} {bar:30} {pos}/{len}");
        let baked = export::bake(
            Bake {
                model: &model,
                prompts,
                out: self.out(),
                format: if format == OutputFormat::Gguf {
                    export::Format::Gguf
                } else {
                    export::Format::Safetensors
                },
                value_type: self.value_type,
            },
            &mut |what, done, of| {
                bar.set_message(what);
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            },
        )?;
        bar.finish_and_clear();
        say(&baked);
        if self.json {
            let unlikely = serde_json::json!({
                "tokens": baked.unlikely.tokens,
                "states": baked.unlikely.states,
                "mean_probability": baked.unlikely.mean,
                "greatest_probability": baked.unlikely.worst,
            });
            let result = serde_json::json!({
                "out": self.out(),
                "vocab_size": baked.vocab_size,
                "embedding_type": baked.embedding_type,
                "rounding": baked.rounding,
                "unlikely": unlikely,
                "prompts": baked.prompts,
            });
            println!("{result}");
        } else {
            println!("{}", self.out().display());
            let server = match format {
                OutputFormat::Gguf => "llama-server -m",
                _ => "vllm serve",
            };
            stderr::hint(format_args!("{server} {}", self.out().display()));
        }
        Ok(())
    }

    fn embeds(&self, prompts: &[NamedPrompt]) -> anyhow::Result<()> {
        let [prompt] = prompts else {
            return Err(bad("--adapter: expected one with --format prompt-embeds, found several"));
        };
        let text = match (&self.text, &self.input) {
            (Some(text), _) => Some(text.replace("\\n", "\n")),
            (None, Some(input)) => Some(prompt.render(&input.replace("\\n", "\n"))?),
            (None, None) => None,
        };
        let model = match &text {
            Some(_) => Some(session::locate(&self.model(prompts)?)?),
            None => None,
        };
        let text = model.as_deref().zip(text.as_deref());
        let WrittenEmbeds { rows, warnings } = export::prompt_embeds(&PromptEmbeds {
            prompt,
            text,
            out: self.out(),
            value_type: self.value_type,
        })?;
        warnings.iter().for_each(super::warn);
        let width = prompt.adapter.config.token_dim;
        if self.json {
            println!("{}", serde_json::json!({"out": self.out(), "shape": [rows, width]}));
        } else {
            status!("{}: {rows} rows of width {width}", prompt.name);
            println!("{}", self.out().display());
        }
        Ok(())
    }
}

fn bad(problem: &str) -> anyhow::Error {
    Error::Invalid(problem.into()).into()
}

/// Prints the result on stderr.
fn say(baked: &Baked) {
    baked.warnings.iter().for_each(super::warn);
    for (name, prompt) in baked.prompts.as_object().into_iter().flatten() {
        status!(
            "{name}: {} tokens, ids {} to {}", prompt["num_virtual_tokens"], prompt["token_ids"][0],
            prompt["token_ids"][1]
        );
    }
    let unlikely = &baked.unlikely;
    status!(
        "probability that a new token is generated, over {} states: {:.1e} on average, {:.1e} at most",
        unlikely.states,
        unlikely.mean,
        unlikely.worst
    );
    if baked.rounding > 0.0 {
        status!(
            "note: the prompts' vectors are rounded to {}, by up to {:.2} % of their norm; --type f32 keeps them",
            baked.embedding_type,
            100.0 * baked.rounding
        );
    }
    for name in &baked.inexact {
        status!(
            "note: {name}: the tokenizer splits a text differently after special tokens: send token ids, the prompt's and then \
             those of the text"
        );
    }
}

//! `gneiss generate`: one completion.

use super::{PlaceArgs, progress};
use anyhow::Context;
use clap::Args;
use gneiss::config::ModelOptions;
use gneiss::generate::{Request, Sampling, generate};
use gneiss::prompt::peft::Adapter;
use std::path::PathBuf;

/// Continues a text, after a tuned prompt if one is given.
#[derive(Args)]
pub struct Generate {
    /// A folder, a .gguf file or org/name[@revision].
    #[arg(long)]
    model: String,
    /// A tuned prompt: a folder in PEFT's format, a run's folder, or org/name[@revision]; :TASK follows if it holds the
    /// prompts of several tasks.
    #[arg(long, value_name = "DIR[:TASK]")]
    adapter: Option<PathBuf>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Sample at this temperature; 0 always chooses the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample from the likeliest tokens whose probabilities add up to this share.
    #[arg(long)]
    top_p: Option<f64>,
    /// Sample from this number of likeliest tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Divide the logits of tokens that occurred before by this; 1 is no penalty.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
    /// The text, exactly as the model reads it; `\n` stands for a line break.
    text: String,
}

impl Generate {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.max(0.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            ..Sampling::default()
        }
    }

    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let mut options = ModelOptions { id: self.model.clone(), ..ModelOptions::default() };
        self.place.apply(&mut options);
        let adapter = self.adapter.as_deref().map(Adapter::open).transpose()?;
        adapter.iter().for_each(super::warn_about);
        let session = progress::open(&options)?;
        if let (Some(adapter), Some(path)) = (&adapter, &self.adapter) {
            adapter.check_fits(path, &session.id, session.model.config())?;
        }
        let ids = session.tokenizer.encode(&self.text.replace("\\n", "\n"), true);
        let ids = ids.map_err(|error| error.in_text("TEXT"))?;
        anyhow::ensure!(
            !ids.is_empty(),
            gneiss::Error::Invalid("TEXT: expected at least one token, found none".into())
        );
        let task = adapter.as_ref().and_then(|adapter| adapter.task.as_ref());
        if let Some(before) = task.and_then(|task| task.before.as_ref()) {
            before.check(&ids).map_err(|problem| gneiss::Error::Invalid(format!("TEXT: {problem}")))?;
        }
        let prompt = adapter.as_ref().map(|a| &a.prompt);
        let request = Request {
            tokens: ids.clone(),
            max_new_tokens: self.max_new_tokens,
            stop_token_ids: session.tokenizer.stop_token_ids.as_slice().into(),
            sampling: self.sampling(),
            ..Request::default()
        };
        let step_rows = gneiss::tune::max_rows(0, session.model.device());
        let generated = generate(&session.model, prompt, vec![request], step_rows, &mut |_| ())?;
        let generated = generated.first().context("one input gives one completion")?;
        let text = session.tokenizer.decode(&generated.tokens, true)?;
        if self.json {
            let result = serde_json::json!({
                "generated_text": text,
                "generated_token_count": generated.tokens.len(),
                "input_token_count": ids.len() + prompt.map_or(0, gneiss::prompt::Prefix::num_virtual_tokens),
                "stop_reason": generated.stop_reason,
            });
            println!("{result}");
        } else {
            println!("{text}");
        }
        Ok(())
    }
}

//! An adapter: its base and settings, and the position of its virtual tokens among the vocabulary's.

use super::keys_values::{self, LayerReport};
use super::{Report, line};
use crate::cli::text;
use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{Checkpoint, TextTokenizer};
use gneiss::config::PromptKind;
use gneiss::data::InputHead;
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::{Adapter, AdapterConfig, PeftType, PromptTuningInit};
use gneiss::prompt::vocabulary;
use gneiss::prompt::vocabulary::{NearestPlace, Neighbour, Norms, Vocabulary, VocabularyToken};
use gneiss::{Error, session};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// An adapter.
#[derive(Serialize)]
pub struct AdapterReport {
    adapter: PathBuf,
    kind: PromptKind,
    /// The task that was asked for, of an adapter of several.
    task: Option<usize>,
    config: AdapterConfig,
    /// What stands before the virtual tokens; `None` if they stand at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<InputHead>,
    /// Rows and width.
    shape: [usize; 2],
    /// Norms of the rows of embeddings.
    norms: Option<Norms>,
    /// Mean norm of the base model's embeddings.
    vocabulary_mean_norm: Option<f64>,
    /// The rows of embeddings.
    tokens: Vec<InspectedToken>,
    /// The layers of keys and values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct InspectedToken {
    norm: f64,
    /// The nearest tokens of the vocabulary, best first; empty without the base model.
    nearest: Vec<Neighbour>,
    initial: Option<Initial>,
}

/// The token from which a virtual token started.
#[derive(Serialize)]
struct Initial {
    #[serde(flatten)]
    token: VocabularyToken,
    /// L2 distance from it.
    moved: f64,
}

/// The data of the base model.
struct BaseModel {
    /// f32 [V, C] on the CPU.
    embedding: Tensor,
    tokenizer: Option<TextTokenizer>,
}

/// Inspects the adapter in a folder, of several tasks the prompt of `task`; `model` replaces the base model that the adapter
/// names.
pub fn inspect(folder: &Path, task: Option<usize>, model: Option<&str>) -> anyhow::Result<AdapterReport> {
    let adapter = Adapter::read_task(folder, task)?;
    crate::cli::warn_about(&adapter);
    let Adapter { prompt, config, task: prompt_task } = adapter;
    let (rows, width) = prompt.values().dims2()?;
    let mut report = AdapterReport {
        adapter: folder.to_path_buf(),
        kind: prompt.kind(),
        task,
        shape: [rows, width],
        norms: None,
        vocabulary_mean_norm: None,
        tokens: Vec::new(),
        layers: Vec::new(),
        before: prompt_task.and_then(|task| task.before),
        config,
    };
    match &prompt {
        Prefix::Embeddings(prompt) | Prefix::EmbeddingsAfter { values: prompt, .. } => {
            report.compare(prompt, model)?;
        }
        Prefix::KeysValues(values) => {
            if let Some(model) = model {
                let opened = Checkpoint::open_without_tokenizer(&session::locate(model)?)?;
                Adapter { prompt: prompt.clone(), config: report.config.clone(), task: None }
                    .check_fits(folder, model, &opened.config)?;
            }
            report.layers = keys_values::layers(values, &report.config)?;
        }
    }
    Ok(report)
}

impl AdapterReport {
    /// Adds the norms of embeddings, and what they are near in the vocabulary of the base model.
    fn compare(&mut self, prompt: &Tensor, model: Option<&str>) -> anyhow::Result<()> {
        self.norms = Some(Norms::of(prompt)?);
        let Some(BaseModel { embedding, tokenizer }) = &open(&self.config, model)? else {
            let norms = vocabulary::row_norms(prompt)?;
            let token = |norm| InspectedToken { norm, nearest: Vec::new(), initial: None };
            self.tokens = norms.into_iter().map(token).collect();
            return Ok(());
        };
        let vocabulary = Vocabulary::new(embedding, tokenizer.as_ref())?;
        self.vocabulary_mean_norm = Some(vocabulary.norms()?.mean);
        let began = began(&self.config, self.shape[0], tokenizer.as_ref())?;
        let mut initial = initial(prompt, &began, &vocabulary, tokenizer.as_ref())?.into_iter();
        let token =
            |NearestPlace { norm, nearest }| InspectedToken { norm, nearest, initial: initial.next() };
        self.tokens = vocabulary.place(prompt)?.into_iter().map(token).collect();
        Ok(())
    }
}

/// Opens the base model. If `model` names it, it must open; if only the adapter names it, it may be missing.
fn open(config: &AdapterConfig, model: Option<&str>) -> anyhow::Result<Option<BaseModel>> {
    if let Some(model) = model {
        return Ok(Some(BaseModel::open(&session::locate(model)?, config.token_dim)?));
    }
    let why = match config.base_model_name_or_path.as_deref() {
        None | Some("") => "the adapter names none".to_owned(),
        Some(name) if !Path::new(name).exists() => format!("no {name} here"),
        Some(name) => match session::locate(name).and_then(|path| BaseModel::open(&path, config.token_dim)) {
            Ok(base) => return Ok(Some(base)),
            Err(error) => error.to_string(),
        },
    };
    status!("base model not opened: {why}; --model MODEL compares the virtual tokens with its vocabulary");
    Ok(None)
}

impl BaseModel {
    fn open(path: &Path, width: usize) -> gneiss::Result<Self> {
        let bare = Checkpoint::open_without_tokenizer(path)?;
        let (v, c) = (bare.config.vocab_size, bare.config.hidden_size);
        if c != width {
            let problem = format!("expected the adapter's base model, of hidden size {width}, found {c}");
            return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
        }
        let embedding =
            bare.weights.tensor("model.embed_tokens.weight", &[v, c], DType::F32, &Device::Cpu)?;
        let tokenizer = TextTokenizer::open(path);
        if let Err(error) = &tokenizer {
            status!("tokenizer  none, tokens are shown by their ids: {error}");
        }
        Ok(Self { embedding, tokenizer: tokenizer.ok() })
    }
}

/// The tokens from which the virtual tokens started; empty if they are not known.
fn began(config: &AdapterConfig, rows: usize, tokenizer: Option<&TextTokenizer>) -> gneiss::Result<Vec<u32>> {
    let (Some(text), Some(tokenizer)) = (config.prompt_tuning_init_text.as_deref(), tokenizer) else {
        return Ok(Vec::new());
    };
    let ids = tokenizer.encode(text, true).map_err(|error| error.in_text("prompt_tuning_init_text"))?;
    if config.prompt_tuning_init != PromptTuningInit::Text {
        return Ok(Vec::new());
    }
    // A text is cut or repeated to the prompt's length, by PEFT and by gneiss.
    Ok(ids.iter().copied().cycle().take(rows).collect())
}

/// The distance of each virtual token from the token from which it started.
fn initial(
    prompt: &Tensor,
    began: &[u32],
    vocabulary: &Vocabulary,
    tokenizer: Option<&TextTokenizer>,
) -> anyhow::Result<Vec<Initial>> {
    if began.is_empty() {
        return Ok(Vec::new());
    }
    let from = vocabulary.rows(began).context("the init text")?;
    let moved = vocabulary::row_norms(&(prompt.to_dtype(DType::F64)? - from.to_dtype(DType::F64)?)?)?;
    let initial = |(id, moved): (&u32, f64)| Initial { token: VocabularyToken::new(*id, tokenizer), moved };
    Ok(began.iter().zip(moved).map(initial).collect())
}

impl Report for AdapterReport {
    fn print(&self) {
        let Self { config, shape: [rows, width], .. } = self;
        line("adapter", self.adapter.display());
        line(
            "method",
            format!("{}, {}", config.peft_type, config.task_type.as_deref().unwrap_or("no task type")),
        );
        if let Some(tasks) = config.tasks() {
            line("task", format!("{} of 0 to {}", self.task.unwrap_or(0), tasks - 1));
        }
        let base = config.base_model_name_or_path.as_deref().unwrap_or("not named");
        let revision = config.revision.as_ref().map(|r| format!("@{r}")).unwrap_or_default();
        line("base model", format!("{base}{revision}"));
        match self.kind {
            PromptKind::Embeddings => {
                line("prompt", format!("{rows} virtual tokens of width {width}, {} values", rows * width));
                if let Some(before) = &self.before {
                    let tokens = before.token_ids.len();
                    line("position", format!("after {:?} ({tokens} tokens)", before.text));
                }
                self.print_init();
                println!();
                self.print_tokens();
            }
            PromptKind::Prefix => {
                self.print_shape();
                println!();
                keys_values::print(&self.layers);
            }
        }
    }
}

impl AdapterReport {
    /// The shape of keys and values.
    fn print_shape(&self) {
        let Self { config, shape: [rows, width], .. } = self;
        let number = |number: Option<usize>| number.map_or("?".to_owned(), |number| number.to_string());
        let shape = format!(
            "keys and values of {rows} virtual tokens in {} layers, {} heads, {} values",
            number(config.num_layers),
            number(config.num_attention_heads),
            rows * width
        );
        line("prompt", shape);
        if config.peft_type == PeftType::Cartridge {
            line("frozen", format!("the first {} virtual tokens", config.num_frozen_tokens.unwrap_or(1)));
        }
        line("norms", "L2, of each virtual token and head: mean, min, max");
    }

    /// How embeddings began, and their norms.
    fn print_init(&self) {
        let config = &self.config;
        if matches!(
            config.peft_type,
            PeftType::PromptTuning | PeftType::MultitaskPromptTuning | PeftType::GneissPromptTuning
        ) {
            let init = match &config.prompt_tuning_init {
                PromptTuningInit::Text => "text",
                PromptTuningInit::SampleVocab => "tokens drawn from the vocabulary",
                PromptTuningInit::Random => "random, or not recorded",
                PromptTuningInit::Other(name) => name,
            };
            let init_text =
                config.prompt_tuning_init_text.as_deref().map(|t| format!(" {t:?}")).unwrap_or_default();
            line("init", format!("{init}{init_text}"));
        }
        let Some(norms) = &self.norms else { return };
        let vocabulary = self
            .vocabulary_mean_norm
            .map(|n| format!("; the vocabulary's mean is {n:.3}"))
            .unwrap_or_default();
        line(
            "norms",
            format!("mean {:.3}, min {:.3}, max {:.3}{vocabulary}", norms.mean, norms.min, norms.max),
        );
    }

    fn print_tokens(&self) {
        let with_base = self.tokens.iter().any(|t| !t.nearest.is_empty());
        let with_initial = self.tokens.iter().any(|t| t.initial.is_some());
        let mut header = vec!["token", "norm"];
        header.extend(if with_initial { &["began as", "moved"][..] } else { &[] });
        header.extend(if with_base { &["nearest", "", "", "", "", ""][..] } else { &[] });
        let mut rows = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for (i, token) in self.tokens.iter().enumerate() {
            let mut row = vec![(i + 1).to_string(), format!("{:.3}", token.norm)];
            if let Some(initial) = &token.initial {
                row.extend([initial.token.visible(), format!("{:.3}", initial.moved)]);
            }
            for near in &token.nearest {
                row.extend([near.token.visible(), format!("{:.2}", near.cosine)]);
            }
            rows.push(row);
        }
        println!("{}", text::table(&rows));
    }
}

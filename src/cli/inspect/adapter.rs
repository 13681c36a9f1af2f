//! An adapter: its base and settings, and the position of its virtual tokens among the vocabulary's.

use super::{Report, line};
use crate::cli::text;
use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::{Checkpoint, TextTokenizer};
use gneiss::prompt::peft::{Adapter, AdapterConfig, PromptTuningInit};
use gneiss::prompt::vocabulary;
use gneiss::prompt::vocabulary::{NearestPlace, Neighbour, Norms, Vocabulary, VocabularyToken};
use gneiss::{Error, session};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// An adapter.
#[derive(Serialize)]
pub struct AdapterReport {
    adapter: PathBuf,
    config: AdapterConfig,
    /// Rows and width.
    shape: [usize; 2],
    norms: Norms,
    /// Mean norm of the base model's embeddings.
    vocabulary_mean_norm: Option<f64>,
    tokens: Vec<InspectedToken>,
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

/// Inspects the adapter in a folder; `model` replaces the base model that the adapter names.
pub fn inspect(path: &Path, model: Option<&str>) -> anyhow::Result<AdapterReport> {
    let adapter = Adapter::read(path)?;
    crate::cli::warn_about(&adapter);
    let Adapter { prompt, config, .. } = adapter;
    let prompt = prompt.embeddings("gneiss inspect")?.clone();
    let (rows, width) = prompt.dims2()?;
    let base = open(&config, model)?;
    let mut report = AdapterReport {
        adapter: path.to_path_buf(),
        shape: [rows, width],
        norms: Norms::of(&prompt)?,
        vocabulary_mean_norm: None,
        tokens: Vec::new(),
        config,
    };
    if let Some(BaseModel { embedding, tokenizer }) = &base {
        let vocabulary = Vocabulary::new(embedding, tokenizer.as_ref())?;
        report.vocabulary_mean_norm = Some(vocabulary.norms()?.mean);
        let began = began(&report.config, rows, tokenizer.as_ref())?;
        let mut initial = initial(&prompt, &began, &vocabulary, tokenizer.as_ref())?.into_iter();
        let token =
            |NearestPlace { norm, nearest }| InspectedToken { norm, nearest, initial: initial.next() };
        report.tokens = vocabulary.place(&prompt)?.into_iter().map(token).collect();
    } else {
        let norms = vocabulary::row_norms(&prompt)?;
        let token = |norm| InspectedToken { norm, nearest: Vec::new(), initial: None };
        report.tokens = norms.into_iter().map(token).collect();
    }
    Ok(report)
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
    eprintln!("base model not opened: {why}; --model MODEL compares the virtual tokens with its vocabulary");
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
            eprintln!("tokenizer  none, tokens are shown by their ids: {error}");
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
        let Self { config, shape: [rows, width], norms, .. } = self;
        line("adapter", self.adapter.display());
        line(
            "method",
            format!("{}, {}", config.peft_type, config.task_type.as_deref().unwrap_or("no task type")),
        );
        let base = config.base_model_name_or_path.as_deref().unwrap_or("not named");
        let revision = config.revision.as_ref().map(|r| format!("@{r}")).unwrap_or_default();
        line("base model", format!("{base}{revision}"));
        line("prompt", format!("{rows} virtual tokens of width {width}, {} values", rows * width));
        let init = match &config.prompt_tuning_init {
            PromptTuningInit::Text => "text",
            PromptTuningInit::SampleVocab => "tokens drawn from the vocabulary",
            PromptTuningInit::Random => "random, or not recorded",
            PromptTuningInit::Other(name) => name,
        };
        let init_text =
            config.prompt_tuning_init_text.as_deref().map(|t| format!(" {t:?}")).unwrap_or_default();
        line("init", format!("{init}{init_text}"));
        let vocabulary = self
            .vocabulary_mean_norm
            .map(|n| format!("; the vocabulary's mean is {n:.3}"))
            .unwrap_or_default();
        line(
            "norms",
            format!("mean {:.3}, min {:.3}, max {:.3}{vocabulary}", norms.mean, norms.min, norms.max),
        );
        println!();
        self.print_tokens();
    }
}

impl AdapterReport {
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

//! An adapter: what it belongs to, and where its virtual tokens lie among the vocabulary's.

use super::model::Token;
use super::{Report, line};
use crate::cli::text;
use anyhow::Context;
use candle_core::{D, DType, Device, Tensor};
use gneiss::adapter::{Adapter, AdapterConfig, PromptTuningInit};
use gneiss::model::{Checkpoint, TextTokenizer};
use gneiss::{Error, setup};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Vocabulary tokens shown for a virtual one.
const NEAREST: usize = 3;

/// Virtual tokens compared with the vocabulary at a time: 128 rows of 100,352 scores are 51 MB.
const CHUNK: usize = 128;

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
    tokens: Vec<VirtualToken>,
}

/// L2 norms of the virtual tokens.
#[derive(Serialize)]
struct Norms {
    mean: f64,
    min: f64,
    max: f64,
}

#[derive(Serialize)]
struct VirtualToken {
    norm: f64,
    /// The vocabulary's nearest, best first; empty without the base model.
    nearest: Vec<Neighbour>,
    initial: Option<Initial>,
}

#[derive(Serialize)]
struct Neighbour {
    #[serde(flatten)]
    token: Token,
    cosine: f64,
}

/// The token that a virtual token began as.
#[derive(Serialize)]
struct Initial {
    #[serde(flatten)]
    token: Token,
    /// L2 distance from it.
    moved: f64,
}

/// What is read of the base model.
struct Base {
    /// f32 [V, C] on the CPU.
    embedding: Tensor,
    /// L2 norm of each row, [V].
    norms: Tensor,
    tokenizer: Option<TextTokenizer>,
}

/// Looks at an adapter; `model` is used in the place of the base model that it names.
pub fn inspect(path: &Path, model: Option<&str>) -> anyhow::Result<AdapterReport> {
    let Adapter { prompt, config } = Adapter::read(path)?;
    let (rows, width) = prompt.dims2()?;
    let base = open(&config, model)?;
    let norms: Vec<f64> = norms(&prompt)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    let mut tokens: Vec<VirtualToken> =
        norms.iter().map(|norm| VirtualToken { norm: *norm, nearest: Vec::new(), initial: None }).collect();
    if let Some(base) = &base {
        for (token, nearest) in tokens.iter_mut().zip(base.nearest(&prompt)?) {
            token.nearest = nearest;
        }
        for (token, initial) in tokens.iter_mut().zip(base.initial(&prompt, &config)?) {
            token.initial = Some(initial);
        }
    }
    let vocabulary_mean_norm =
        base.map(|b| b.norms.mean_all()?.to_scalar::<f32>()).transpose()?.map(f64::from);
    Ok(AdapterReport {
        adapter: path.to_path_buf(),
        config,
        shape: [rows, width],
        norms: Norms {
            mean: norms.iter().sum::<f64>() / rows as f64,
            min: norms.iter().copied().fold(f64::INFINITY, f64::min),
            max: norms.iter().copied().fold(0.0, f64::max),
        },
        vocabulary_mean_norm,
        tokens,
    })
}

/// The base model. One that `model` names has to open; one that only the adapter names may be elsewhere.
fn open(config: &AdapterConfig, model: Option<&str>) -> anyhow::Result<Option<Base>> {
    if let Some(model) = model {
        return Ok(Some(Base::open(&setup::locate(model)?, config.token_dim)?));
    }
    let why = match config.base_model_name_or_path.as_deref() {
        None | Some("") => "the adapter names none".to_owned(),
        Some(name) if !Path::new(name).exists() => format!("no {name} here"),
        Some(name) => match setup::locate(name).and_then(|path| Base::open(&path, config.token_dim)) {
            Ok(base) => return Ok(Some(base)),
            Err(error) => error.to_string(),
        },
    };
    eprintln!("base model not opened: {why}; --model MODEL compares the virtual tokens with its vocabulary");
    Ok(None)
}

/// L2 norm of each row.
fn norms(rows: &Tensor) -> candle_core::Result<Tensor> {
    rows.sqr()?.sum(D::Minus1)?.sqrt()
}

impl Base {
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
        Ok(Self { norms: norms(&embedding)?, embedding, tokenizer: tokenizer.ok() })
    }

    /// The vocabulary's nearest tokens of each virtual token by cosine similarity.
    fn nearest(&self, prompt: &Tensor) -> anyhow::Result<Vec<Vec<Neighbour>>> {
        let mut all = Vec::new();
        // A row of zeros has no direction and is nearest to none.
        let lengths = self.norms.clamp(f32::MIN_POSITIVE, f32::MAX)?;
        for first in (0..prompt.dims()[0]).step_by(CHUNK) {
            let rows = prompt.narrow(0, first, CHUNK.min(prompt.dims()[0] - first))?;
            let unit =
                rows.broadcast_div(&norms(&rows)?.clamp(f32::MIN_POSITIVE, f32::MAX)?.unsqueeze(1)?)?;
            let cosines = unit.matmul(&self.embedding.t()?)?.broadcast_div(&lengths)?;
            for cosines in cosines.to_vec2::<f32>()? {
                let nearest = largest(&cosines).into_iter();
                let neighbour = |id: usize| Neighbour {
                    token: Token::new(id as u32, self.tokenizer.as_ref()),
                    cosine: f64::from(cosines[id]),
                };
                all.push(nearest.map(neighbour).collect());
            }
        }
        Ok(all)
    }

    /// What each virtual token began as; nothing where that is not known.
    fn initial(&self, prompt: &Tensor, config: &AdapterConfig) -> anyhow::Result<Vec<Initial>> {
        let (Some(text), Some(tokenizer)) = (config.prompt_tuning_init_text.as_deref(), &self.tokenizer)
        else {
            return Ok(Vec::new());
        };
        let ids = tokenizer.encode(text, true)?;
        if config.prompt_tuning_init != PromptTuningInit::Text || ids.is_empty() {
            return Ok(Vec::new());
        }
        // A text is cut or repeated to the prompt's length, by PEFT as by gneiss.
        let ids: Vec<u32> = ids.iter().copied().cycle().take(prompt.dims()[0]).collect();
        let vocabulary = self.embedding.dims()[0];
        let beyond = ids.iter().find(|id| **id as usize >= vocabulary);
        if let Some(id) = beyond {
            let problem = format!("tokenizer: expected ids under the vocabulary's {vocabulary}, found {id}");
            return Err(Error::Tokenizer(problem)).context("the init text");
        }
        let began = self.embedding.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
        let moved = norms(&(prompt - began)?)?.to_vec1::<f32>()?;
        let initial = |(id, moved): (&u32, f32)| Initial {
            token: Token::new(*id, Some(tokenizer)),
            moved: f64::from(moved),
        };
        Ok(ids.iter().zip(moved).map(initial).collect())
    }
}

/// Indices of the [`NEAREST`] largest values, largest first.
fn largest(values: &[f32]) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(NEAREST + 1);
    for (i, value) in values.iter().enumerate() {
        let at = best.iter().position(|b| *value > values[*b]).unwrap_or(best.len());
        if at < NEAREST {
            best.insert(at, i);
            best.truncate(NEAREST);
        }
    }
    best
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
        let init = match config.prompt_tuning_init {
            PromptTuningInit::Text => "text",
            PromptTuningInit::SampleVocab => "tokens drawn from the vocabulary",
            PromptTuningInit::Random => "random, or not recorded",
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
                row.extend([initial.token.show(), format!("{:.3}", initial.moved)]);
            }
            for near in &token.nearest {
                row.extend([near.token.show(), format!("{:.2}", near.cosine)]);
            }
            rows.push(row);
        }
        println!("{}", text::table(&rows));
    }
}

//! A model: shape, multipliers, storage, tokenizer, and the memory for tuning.

use super::{Report, count, line};
use crate::cli::text;
use candle_core::DType;
use gneiss::checkpoint::{Checkpoint, MixerKind, ModelConfig, TextTokenizer};
use gneiss::config::DtypeChoice;
use gneiss::device::DeviceChoice;
use gneiss::layout::model_folder::CONFIG;
use gneiss::model::{Dtypes, Parameters, TuningMemory};
use gneiss::ops::rope::Rope;
use gneiss::prompt::vocabulary::VocabularyToken;
use gneiss::session;
use serde::Serialize;
use std::path::Path;

/// A model; none of its weights is read.
#[derive(Serialize)]
pub struct ModelReport {
    model: String,
    model_type: &'static str,
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    embedding_multiplier: f64,
    residual_multiplier: f64,
    attention_multiplier: f64,
    logits_scaling: f64,
    rope: Option<RopeReport>,
    tie_word_embeddings: bool,
    mamba: Option<MambaReport>,
    experts: Option<ExpertsReport>,
    parameters: usize,
    /// Those that a token's way through the model multiplies.
    active_parameters: usize,
    format: Option<String>,
    bytes_on_disk: Option<u64>,
    tokenizer: Option<TokenizerReport>,
    tuning_memory: Vec<MemoryReport>,
}

#[derive(Serialize)]
struct RopeReport {
    theta: f64,
    rope_type: &'static str,
    factor: Option<f64>,
    llama3_factor: Option<f64>,
}

#[derive(Serialize)]
struct MambaReport {
    layers: usize,
    attention_layers: Vec<usize>,
    heads: usize,
    head_dim: usize,
    state: usize,
    groups: usize,
    taps: usize,
}

#[derive(Serialize)]
struct ExpertsReport {
    num_local_experts: usize,
    num_experts_per_tok: usize,
    intermediate_size: usize,
}

#[derive(Serialize)]
struct TokenizerReport {
    vocabulary: usize,
    eos_token: VocabularyToken,
    stop_tokens: Vec<VocabularyToken>,
}

/// The memory for tuning in one dtype, bytes.
#[derive(Serialize)]
struct MemoryReport {
    dtype: &'static str,
    rows: usize,
    weights: usize,
    tape_per_row: usize,
    tape: usize,
    /// With every layer recomputed except the last.
    recomputed_tape: usize,
    head: usize,
    workspace: usize,
    prompt_per_token: usize,
    total: usize,
}

impl MambaReport {
    fn new(config: &ModelConfig) -> Option<Self> {
        let mamba = config.mamba.as_ref()?;
        Some(Self {
            layers: config.layers_with(MixerKind::Mamba2),
            attention_layers: mamba.attention_layers.clone(),
            heads: mamba.heads,
            head_dim: mamba.head_dim,
            state: mamba.state,
            groups: mamba.groups,
            taps: mamba.taps,
        })
    }
}

impl RopeReport {
    fn new(rope: &Rope) -> Self {
        let (rope_type, factor) = rope.kind();
        let llama3_factor = factor.filter(|_| rope_type == "llama3");
        Self { theta: rope.theta, rope_type, factor, llama3_factor }
    }
}

/// Inspects a model.
pub fn inspect(id: &str) -> anyhow::Result<ModelReport> {
    let path = session::locate(id)?;
    let (config, storage) = open(&path)?;
    let tokenizer = match TextTokenizer::open(&path) {
        Ok(tokenizer) => {
            let tokenizer = TextTokenizer { vocab_size: config.vocab_size, ..tokenizer };
            tokenizer.all_warnings().for_each(crate::cli::warn);
            Some(tokenizer)
        }
        Err(error) => {
            status!("tokenizer  none: {error}");
            None
        }
    };
    let tokenizer = tokenizer.as_ref().map(|t| TokenizerReport {
        vocabulary: t.tokenizer.get_vocab_size(true),
        eos_token: VocabularyToken::new(t.eos_token_id, Some(t)),
        stop_tokens: t.stop_token_ids.iter().map(|id| VocabularyToken::new(*id, Some(t))).collect(),
    });
    let (format, bytes_on_disk) = storage.unzip();
    Ok(ModelReport {
        model: id.to_owned(),
        model_type: config.model_type.name(),
        num_hidden_layers: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        embedding_multiplier: config.embedding_multiplier,
        residual_multiplier: config.residual_multiplier,
        attention_multiplier: config.attention_multiplier,
        logits_scaling: config.logits_scaling,
        rope: config.rope.as_ref().map(RopeReport::new),
        tie_word_embeddings: config.tie_word_embeddings,
        mamba: MambaReport::new(&config),
        experts: config.experts.map(|experts| ExpertsReport {
            num_local_experts: experts.count,
            num_experts_per_tok: experts.per_token,
            intermediate_size: experts.size,
        }),
        parameters: Parameters::new(&config).total(),
        active_parameters: Parameters::active(&config),
        format,
        bytes_on_disk,
        tokenizer,
        tuning_memory: memory(&config)?,
    })
}

/// The configuration; with format and bytes on disk if the weights are there.
fn open(path: &Path) -> anyhow::Result<(ModelConfig, Option<(String, u64)>)> {
    match Checkpoint::open_without_tokenizer(path) {
        Ok(bare) => {
            bare.warnings.iter().for_each(crate::cli::warn);
            Ok((bare.config, Some((bare.format, bare.weights.bytes_on_disk()))))
        }
        Err(error) if path.is_dir() => {
            let config = ModelConfig::from_json(&path.join(CONFIG))?;
            status!("weights    none: {error}");
            Ok((config, None))
        }
        Err(error) => Err(error.into()),
    }
}

/// The memory for tuning if the configuration leaves device and rows to gneiss. There is no dataset here, so no target
/// rows are counted.
fn memory(config: &ModelConfig) -> anyhow::Result<Vec<MemoryReport>> {
    let device = crate::cli::device(DeviceChoice::Auto)?;
    let rows = gneiss::tune::max_rows(0, &device);
    let of = |choice: DtypeChoice, dtype: DType| -> anyhow::Result<MemoryReport> {
        let memory = TuningMemory::new(config, Dtypes::for_weights(dtype, &device)?, device.location());
        Ok(MemoryReport {
            dtype: choice.name(),
            rows,
            weights: memory.weights,
            tape_per_row: memory.tape_per_row(0),
            tape: memory.tape(rows, 0, 0),
            recomputed_tape: memory.tape(rows, 0, memory.most_recomputed()),
            head: memory.head,
            workspace: memory.workspace(rows, 0, 0),
            prompt_per_token: memory.prompt_per_token,
            total: memory.weights + memory.tape(rows, 0, 0) + memory.workspace(rows, 0, 0),
        })
    };
    [(DtypeChoice::F32, DType::F32), (DtypeChoice::Bf16, DType::BF16)]
        .map(|(c, d)| of(c, d))
        .into_iter()
        .collect()
}

impl Report for ModelReport {
    fn print(&self) {
        line("model", &self.model);
        line("family", self.model_type);
        line(
            "shape",
            format!(
                "{}, hidden {}, {} over {} of size {}, feed-forward {}, vocabulary {}",
                count(self.num_hidden_layers, "layer"),
                self.hidden_size,
                count(self.num_attention_heads, "head"),
                count(self.num_key_value_heads, "key-value head"),
                self.head_dim,
                self.intermediate_size,
                self.vocab_size
            ),
        );
        line(
            "multipliers",
            format!(
                "embedding {}, residual {}, attention {}, logits 1/{}",
                self.embedding_multiplier,
                self.residual_multiplier,
                self.attention_multiplier,
                self.logits_scaling
            ),
        );
        line("positions", self.positions());
        line("head", if self.tie_word_embeddings { "tied to the embeddings" } else { "of its own" });
        self.print_layers();
        let active = match self.active_parameters {
            active if active == self.parameters => String::new(),
            active => format!(", {} of them active for a token", text::grouped(active)),
        };
        line("parameters", format!("{}{active}", text::grouped(self.parameters)));
        if let (Some(format), Some(bytes)) = (&self.format, self.bytes_on_disk) {
            line("storage", format!("{format}, {} on disk", text::bytes(bytes)));
        }
        if let Some(TokenizerReport { vocabulary, eos_token, stop_tokens }) = &self.tokenizer {
            let token = |t: &VocabularyToken| format!("{} ({})", t.visible(), t.id);
            let stop = stop_tokens.iter().map(token).collect::<Vec<_>>().join(", ");
            line(
                "tokenizer",
                format!("{vocabulary} tokens, end of text {}, stops at {stop}", token(eos_token)),
            );
        }
        self.print_memory();
    }
}

impl ModelReport {
    /// The kinds of layers that are not dense.
    fn print_layers(&self) {
        if let Some(mamba) = &self.mamba {
            let attention =
                mamba.attention_layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            line(
                "mamba",
                format!(
                    "{}, {} of size {}, state {}, {}; attention in {}",
                    count(mamba.layers, "layer"),
                    count(mamba.heads, "head"),
                    mamba.head_dim,
                    mamba.state,
                    count(mamba.groups, "group"),
                    if attention.is_empty() { "none" } else { &attention },
                ),
            );
        }
        if let Some(experts) = &self.experts {
            let ExpertsReport { num_local_experts, num_experts_per_tok, intermediate_size } = experts;
            line(
                "experts",
                format!(
                    "{num_local_experts} of size {intermediate_size}, {num_experts_per_tok} for each token"
                ),
            );
        }
    }

    fn print_memory(&self) {
        let Some(first) = self.tuning_memory.first() else { return };
        println!("\nmemory for tuning, {} rows at a time", first.rows);
        let columns = self.tuning_memory.iter();
        let row = |key: &str, of: &dyn Fn(&MemoryReport) -> usize| {
            let cells = columns.clone().map(|m| text::bytes(of(m) as u64));
            std::iter::once(key.to_owned()).chain(cells).collect::<Vec<_>>()
        };
        let header =
            std::iter::once(String::new()).chain(columns.clone().map(|m| m.dtype.to_owned())).collect();
        println!(
            "{}",
            text::table(&[
                header,
                row("weights", &|m| m.weights),
                row("tape", &|m| m.tape),
                row("  a row", &|m| m.tape_per_row),
                row("  with layers recomputed", &|m| m.recomputed_tape),
                row("workspace", &|m| m.workspace),
                row("  head buffer", &|m| m.head),
                row("total", &|m| m.total),
                row("prompt and moments, a virtual token", &|m| m.prompt_per_token),
            ])
        );
    }

    fn positions(&self) -> String {
        let rope = match &self.rope {
            None => "not embedded".to_owned(),
            Some(RopeReport { theta, rope_type: "default", .. }) => format!("rope, theta {theta}"),
            Some(RopeReport { theta, rope_type, factor: Some(factor), .. }) => {
                format!("rope, theta {theta}, {rope_type} scaling by {factor}")
            }
            Some(RopeReport { theta, rope_type, .. }) => format!("rope, theta {theta}, {rope_type} scaling"),
        };
        format!("{}, {rope}", self.max_position_embeddings)
    }
}

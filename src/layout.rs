//! Names of the files in a run folder, in an adapter folder and in a model folder.

/// File of the resolved configuration.
pub const CONFIG: &str = "config.toml";
/// File of the step and epoch records.
pub const METRICS: &str = "metrics.jsonl";
/// File of [`crate::files::FolderLock`].
pub const LOCK: &str = "lock";
/// File of [`crate::tune::State`].
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// File of [`crate::run::Summary`].
pub const SUMMARY: &str = "summary.json";
/// Folder of the tuned prompt.
pub const ADAPTER: &str = "adapter";
/// File of [`crate::prompt::vocabulary::PromptTokens`].
pub const TOKENS: &str = "tokens.json";
/// File of [`crate::evaluate::Evaluation`].
pub const EVALUATION: &str = "evaluation.json";
/// File of the answers as a table.
pub const PREDICTIONS: &str = "predictions.csv";
/// File of the report page.
pub const REPORT: &str = "report.html";
/// File of the learning curve as SVG.
pub const CURVE_SVG: &str = "curve.svg";
/// File of the learning curve as PNG.
pub const CURVE_PNG: &str = "curve.png";

/// File of a sweep's decisions.
pub const SWEEP: &str = "sweep.jsonl";
/// Folder of the run folders of a sweep's trials.
pub const TRIALS: &str = "trials";
/// Link to the run folder of a sweep's best trial.
pub const BEST: &str = "best";
/// File of a sweep's report page.
pub const SWEEP_REPORT: &str = "sweep.html";
/// File of a trial's losses on the rows of the validation file.
pub const VALIDATION: &str = "validation.json";

/// Names of the files in an adapter folder.
pub mod adapter_folder {
    /// File of PEFT's configuration.
    pub const CONFIG: &str = "adapter_config.json";
    /// File of the prompt.
    pub const WEIGHTS: &str = "adapter_model.safetensors";
    /// The file that PEFT wrote before safetensors: a Python pickle, which gneiss does not run.
    pub const PICKLE: &str = "adapter_model.bin";
    /// File of [`crate::prompt::PromptTask`].
    pub const TASK: &str = "task.json";
    /// File of the model card.
    pub const CARD: &str = "README.md";
    /// The files of an adapter.
    pub const FILES: [&str; 3] = [CONFIG, WEIGHTS, TASK];
}

/// Names of the files in the folder of a checkpoint, as transformers writes it.
pub mod model_folder {
    /// File of the model's configuration.
    pub const CONFIG: &str = "config.json";
    /// File of the generation settings.
    pub const GENERATION_CONFIG: &str = "generation_config.json";
    /// File of the tokenizer.
    pub const TOKENIZER: &str = "tokenizer.json";
    /// File of the tokenizer's configuration.
    pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
    /// File of the special tokens, in older checkpoints.
    pub const SPECIAL_TOKENS: &str = "special_tokens_map.json";
    /// File of the tokens that were added to the vocabulary, in older checkpoints.
    pub const ADDED_TOKENS: &str = "added_tokens.json";
    /// File of the chat template.
    pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
    /// File of the weights if it is one file.
    pub const WEIGHTS: &str = "model.safetensors";
    /// File that lists the shards of the weights.
    pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
}

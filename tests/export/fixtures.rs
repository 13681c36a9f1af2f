//! Checkpoints with tokenizers, and tuned prompts for them.

use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Passes, PrefixGroup, Sequence};
use gneiss::checkpoint::{Checkpoint, ModelConfig, Weights};
use gneiss::config::Task;
use gneiss::export::{Bake, Baked, Format, ValueType, bake, read_prompts};
use gneiss::model::{Decoder, Dtypes};
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PromptTask, PromptTuningInit};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn tests(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// What transformers and PEFT gave for a checkpoint of `tests/golden`.
pub struct Golden {
    pub json: Value,
    pub tensors: HashMap<String, Tensor>,
}

pub fn golden(name: &str) -> Golden {
    let folder = tests("golden").join(name);
    let text = std::fs::read_to_string(folder.join("cases.json")).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu).unwrap();
    Golden { json: serde_json::from_str(&text).unwrap(), tensors }
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// A base: a checkpoint of `tests/golden` with a tokenizer.
pub struct Setup {
    pub golden: &'static str,
    /// Tokens of the tokenizer; the rows of the embedding may be more.
    pub tokens: usize,
    /// Whether the tokenizer puts a beginning-of-text token before every text.
    pub bos: bool,
    /// Class that `tokenizer_config.json` names.
    pub class: &'static str,
    /// Files that the weights are in.
    pub shards: usize,
}

/// A small vocabulary of bytes and pairs of letters, cut as Granite 3's tokenizer cuts.
pub fn tokenizer_json(tokens: usize, bos: bool) -> Value {
    let specials = ["<|pad|>", "<s>", "</s>", "<|tool|>"];
    let mut all: Vec<String> = specials.iter().map(|token| (*token).to_string()).collect();
    all.extend((b'!'..=b'~').map(|byte| char::from(byte).to_string()));
    all.extend(["\u{120}".to_string(), "\u{10a}".to_string()]);
    let mut merges = Vec::new();
    'pairs: for left in 'a'..='z' {
        for right in ['e', 'n', 'i', 'o'] {
            if all.len() >= tokens {
                break 'pairs;
            }
            all.push(format!("{left}{right}"));
            merges.push(json!([left.to_string(), right.to_string()]));
        }
    }
    assert_eq!(all.len(), tokens);
    let vocab: serde_json::Map<String, Value> =
        all.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added = specials.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": *token != "<|tool|>"})
    });
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let single =
        json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let processor = json!({
        "type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]},
        "post_processor": if bos { processor } else { Value::Null },
        "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

pub const CHAT: &str = "{{ bos_token }}{% for m in messages %}<|tool|>{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}<|tool|>assistant:{% endif %}";

/// Writes the base into `folder`.
pub fn base(folder: &Path, setup: &Setup) {
    let from = tests("golden").join(setup.golden);
    std::fs::copy(from.join("config.json"), folder.join("config.json")).unwrap();
    if setup.shards == 1 {
        std::fs::copy(from.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    } else {
        shard(&from.join("model.safetensors"), folder, setup.shards);
    }
    let write = |name: &str, json: Value| std::fs::write(folder.join(name), json.to_string()).unwrap();
    write("tokenizer.json", tokenizer_json(setup.tokens, setup.bos));
    write(
        "tokenizer_config.json",
        json!({
            "tokenizer_class": setup.class, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>",
            "additional_special_tokens": ["<|pad|>"], "add_bos_token": setup.bos,
            "clean_up_tokenization_spaces": false, "chat_template": CHAT,
        }),
    );
}

fn shard(file: &Path, folder: &Path, shards: usize) {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut map = serde_json::Map::new();
    for i in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        let part = names.iter().skip(i).step_by(shards);
        let part: HashMap<String, Tensor> =
            part.map(|name| ((*name).clone(), tensors[*name].clone())).collect();
        map.extend(part.keys().map(|tensor| (tensor.clone(), json!(name))));
        candle_core::safetensors::save(&part, folder.join(name)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Writes a prompt as an adapter's folder.
pub fn adapter(folder: &Path, model: &Path, prompt: &Tensor, verbalizer: Option<&str>) {
    let bare = Checkpoint::open_without_tokenizer(model).unwrap();
    let id = model.display().to_string();
    let n = prompt.dims()[0];
    let config = AdapterConfig::new(&id, &bare.config, n, PromptTuningInit::Random, None);
    let task = verbalizer.map(|verbalizer| PromptTask {
        task: Task::Classification,
        verbalizer: verbalizer.into(),
        labels: vec!["0".into(), "1".into()],
        before: None,
        hard_prompt: String::new(),
        max_output_tokens: 2,
        examples: Vec::new(),
    });
    Adapter { prompt: Prefix::Embeddings(prompt.clone()), config, task }
        .write(folder, &ModelCard::default())
        .unwrap();
}

/// A prompt of [rows, width] that is no row of any matrix.
pub fn prompt(rows: usize, width: usize) -> Tensor {
    let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
    Tensor::from_vec((0..rows * width).map(value).collect(), (rows, width), &Device::Cpu).unwrap()
}

/// Bakes the prompts given as `NAME=DIR`.
pub fn baked(
    model: &Path,
    adapters: &[String],
    out: &Path,
    format: Format,
    value_type: Option<ValueType>,
) -> Baked {
    let prompts = read_prompts(adapters).unwrap();
    bake(Bake { model, prompts, out, format, value_type }, &mut |_, _, _| ()).unwrap()
}

/// gneiss's own model of a folder or file, in f32.
pub fn model(path: &Path) -> Decoder {
    let bare = Checkpoint::open_without_tokenizer(path).unwrap();
    load(&bare.config, &bare.weights)
}

fn load(config: &ModelConfig, weights: &Weights) -> Decoder {
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(config, weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

/// Logits behind each of `ids`, [ids, V].
pub fn logits(model: &Decoder, ids: &[u32]) -> Tensor {
    let mut target = ids[1..].to_vec();
    target.push(0);
    let group = PrefixGroup {
        before: Vec::new(),
        prompt: 0..0,
        head: Vec::new(),
        sequences: vec![Sequence { input: ids[..1].to_vec(), target }],
    };
    let batch = Passes::new(&[group], usize::MAX).prefix_pass;
    let none = Tensor::zeros((0, model.config().hidden_size), DType::F32, &Device::Cpu);
    let none = none.unwrap_or_else(|_| panic!("no rows"));
    model.logits(&model.hidden(&batch, &none, None).unwrap()).unwrap()
}

/// Greatest difference of two tensors; fails where one is not finite.
pub fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let all = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (all(a), all(b));
    assert!(a.iter().chain(&b).all(|value| value.is_finite()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Runs one of this folder's scripts; what it printed.
pub fn script(python: &Path, name: &str, args: &[&str]) -> String {
    let output = Command::new(python).arg(tests("export").join(name)).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}:\n{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

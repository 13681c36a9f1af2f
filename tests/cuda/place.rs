//! A folder with a small checkpoint, a configuration and reviews, and `gneiss` run in it.

use candle_core::safetensors::save;
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const VOCABULARY: usize = 131;
const HIDDEN: usize = 96;
const FEED_FORWARD: usize = 120;
const LAYERS: usize = 3;
/// Query heads and key-value heads of 64: the tensor cores' kernels.
const HEADS: (usize, usize) = (2, 1);
const HEAD_DIM: usize = 64;

const CONFIG: &str = r#"name = "dogs"

[model]
id = "model"
device = "cpu"
dtype = "f32"

[prompt]
init_text = "say 1 or 0"
num_virtual_tokens = 5

[data]
task = "classification"
train = "train.csv"
validation = "validation.csv"
test = "test.csv"
verbalizer = "say {{input}} :"
max_output_tokens = 2

[train]
learning_rate = 0.05
batch_size = 4
num_epochs = 2
"#;

pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.path("model")).unwrap();
        save(&weights(), place.path("model/model.safetensors")).unwrap();
        place.write("model/config.json", &config().to_string());
        place.write("model/tokenizer.json", &tokenizer().to_string());
        place.write("model/tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        place.write("dogs.toml", CONFIG);
        for (name, rows) in [("train.csv", 12), ("validation.csv", 4), ("test.csv", 6)] {
            place.write(name, &reviews(rows));
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// The losses of a run's steps, then those of its epochs' validations.
    pub fn losses(&self, run: &str) -> Vec<f64> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |key: &str| records.iter().filter_map(|r| r[key].as_f64()).collect::<Vec<_>>();
        [of("loss"), of("validation_loss")].concat()
    }

    /// `gneiss` on the stand-in with these settings of GNEISS_STAND_IN (tests/stand_in/cuda/device.h).
    pub fn command<'a>(&self, settings: &str, args: impl IntoIterator<Item = &'a str>) -> Command {
        // Another binary: one with a planted fault (tests/stand_in/cuda/plant.py).
        let binary = std::env::var_os("GNEISS_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_gneiss").into());
        let mut command = Command::new(binary);
        let fatbins = env!("OUT_DIR");
        command.env(
            "GNEISS_STAND_IN",
            [&format!("fatbins={fatbins}"), settings].join(",").trim_end_matches(','),
        );
        command.env("GNEISS_CUDA_TRACE", self.path("calls.tsv"));
        command
            .current_dir(self.0.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.0.path())
            .args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn cuda<'a>(&self, settings: &str, args: impl IntoIterator<Item = &'a str>) -> Output {
        self.command(settings, args).output().unwrap()
    }

    /// Tunes on the CPU and gives the losses.
    pub fn losses_of_the_cpu(&self, more: &[&str]) -> Vec<f64> {
        let args = ["tune", "dogs.toml", "--set", "name=cpu"];
        succeeded(&self.cuda("", args.into_iter().chain(more.iter().copied())));
        self.losses("runs/cpu")
    }

    /// How often the last command that ended made each call of the driver, by kind and name.
    pub fn calls(&self) -> HashMap<(String, String), u64> {
        let text = std::fs::read_to_string(self.path("calls.tsv")).unwrap();
        let call = |line: &str| {
            let parts: Vec<&str> = line.split('\t').collect();
            ((parts[0].to_owned(), parts[1].to_owned()), parts[2].parse().unwrap())
        };
        text.lines().map(call).collect()
    }
}

/// What a command that must succeed printed on stdout.
#[track_caller]
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command that must fail with `code` said.
#[track_caller]
pub fn refused(output: &Output, code: i32, parts: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts that losses follow those of the CPU in f32, each within `relative`.
#[track_caller]
pub fn assert_follow(found: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= relative * b.abs(),
            "loss {i}: {a}, the CPU's is {b}\n{found:?}\n{expected:?}"
        );
    }
}

fn config() -> Value {
    json!({
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS.0, "num_key_value_heads": HEADS.1, "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1000.0,
        "attention_multiplier": 0.1, "embedding_multiplier": 3.5, "residual_multiplier": 0.37, "logits_scaling": 2.3,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "attention_bias": false, "mlp_bias": false,
    })
}

fn weights() -> HashMap<String, Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut random = |shape: &[usize], mean: f32, size: f32| {
        let values = (0..shape.iter().product::<usize>()).map(|_| mean + size * rng.random_range(-1f32..1.0));
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(shape).unwrap()
    };
    let (q, kv) = (HEADS.0 * HEAD_DIM, HEADS.1 * HEAD_DIM);
    let matrices = [
        ("self_attn.q_proj", q, HIDDEN),
        ("self_attn.k_proj", kv, HIDDEN),
        ("self_attn.v_proj", kv, HIDDEN),
        ("self_attn.o_proj", HIDDEN, q),
        ("mlp.gate_proj", FEED_FORWARD, HIDDEN),
        ("mlp.up_proj", FEED_FORWARD, HIDDEN),
        ("mlp.down_proj", HIDDEN, FEED_FORWARD),
    ];
    let mut all = HashMap::new();
    all.insert("model.embed_tokens.weight".to_owned(), random(&[VOCABULARY, HIDDEN], 0.0, 0.3));
    all.insert("model.norm.weight".to_owned(), random(&[HIDDEN], 1.0, 0.3));
    for layer in 0..LAYERS {
        for (name, rows, columns) in matrices {
            all.insert(format!("model.layers.{layer}.{name}.weight"), random(&[rows, columns], 0.0, 0.25));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            all.insert(format!("model.layers.{layer}.{name}.weight"), random(&[HIDDEN], 1.0, 0.3));
        }
    }
    all
}

/// One word a token.
fn tokenizer() -> Value {
    let named =
        ["<unk>", "<s>", "</s>", "0", "1", "say", "or", ":", "dog", "shiny", "gentle", "late", "rude"];
    let words = (0..VOCABULARY).map(|i| named.get(i).map_or(format!("word{i}"), |w| (*w).to_owned()));
    let words: Vec<String> = words.collect();
    crate::common::word_level::tokenizer(&words)
}

/// Rows of a CSV file, satisfied and unsatisfied by turns, of 3 to 9 words.
fn reviews(rows: usize) -> String {
    let row = |i: usize| {
        let word = [["shiny", "gentle"], ["late", "rude"]][i % 2][i / 2 % 2];
        let more: String = (0..i % 7).map(|j| format!(" word{}", 20 + (13 * i + j) % 100)).collect();
        format!("{word} dog word{}{more},{}\n", 40 + i, (i + 1) % 2)
    };
    format!("input,output\n{}", (0..rows).map(row).collect::<String>())
}

//! The program as a user runs it, in a folder of its own, on a checkpoint of 40 columns.

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use candle_core::{Device, Tensor};
use gneiss::config::Config;
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::Adapter;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

mod adapters;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod distillation;
#[cfg(feature = "serve")]
mod ensembles;
mod eval;
mod habits;
mod init;
mod inspect;
mod kinds;
mod position;
mod push;
mod python;
mod ranks;
mod resume;
mod searches;
mod shards;
mod sweep;
mod tutorial;
mod unlearned;

const VOCAB: usize = 131;
const GOOD: [&str; 4] = ["shiny", "gentle", "happy", "fluffy"];
const BAD: [&str; 4] = ["late", "rude", "smelly", "matted"];

const CONFIG: &str = r#"name = "dogs"

[model]
id = "model"
device = "cpu"

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
num_epochs = 3
"#;

/// A folder with a checkpoint, its tokenizer, a configuration and three CSV files.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
        std::fs::create_dir(place.path("model")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
        }
        place.write("model/tokenizer.json", &tokenizer().to_string());
        place.write("model/tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        place.write("dogs.toml", CONFIG);
        for (name, rows) in [("train.csv", 12), ("validation.csv", 4), ("test.csv", 6)] {
            place.write(name, &reviews(rows));
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Runs `gneiss` in this folder, without a network.
    fn gneiss<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Assert {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.0.path());
        command.args(args).assert()
    }

    /// Asserts exit code 2, an empty stdout, and all `parts` in one error message.
    #[track_caller]
    fn refuses<'a>(&self, args: impl IntoIterator<Item = &'a str>, parts: &[&str]) {
        let assert = self.gneiss(args).code(2);
        let (stdout, stderr) = texts(&assert);
        assert_eq!(stdout, "");
        let Some((_, message)) = stderr.split_once("error: ") else { panic!("no error in: {stderr}") };
        for part in parts {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    }

    /// All files under a folder, by their path in it.
    fn files(&self, folder: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.path(folder)];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(self.path(folder)).unwrap().to_path_buf();
                    found.insert(name, std::fs::read(path).unwrap());
                }
            }
        }
        found
    }
}

/// One word a token: the words of these tests, and as many others as fill the checkpoint's vocabulary.
fn tokenizer() -> Value {
    let mut words: Vec<String> =
        ["<unk>", "<s>", "</s>", "0", "1", "say", "or", ":", "dog"].map(str::to_owned).to_vec();
    words.extend(GOOD.iter().chain(&BAD).map(|w| (*w).to_owned()));
    words.extend((words.len()..VOCAB).map(|i| format!("word{i}")));
    common::word_level::tokenizer(&words)
}

/// Rows of a CSV file, satisfied and unsatisfied by turns.
fn reviews(rows: usize) -> String {
    let row = |i: usize| {
        let words = if i.is_multiple_of(2) { GOOD } else { BAD };
        format!("{} dog word{},{}\n", words[i / 2 % 4], 40 + i, (i + 1) % 2)
    };
    format!("input,output\n{}", (0..rows).map(row).collect::<String>())
}

fn texts(assert: &Assert) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&assert.get_output().stdout), text(&assert.get_output().stderr))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn tune_writes_a_run() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tune", "dogs.toml"]).success());
    let files = place.files("runs/dogs");
    let names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "task.json"]
        .map(|n| format!("adapter/{n}"));
    let mut names: BTreeSet<PathBuf> = names.iter().map(PathBuf::from).collect();
    let files_of_run = [
        "config.toml", "metrics.jsonl", "checkpoint.safetensors", "summary.json", "tokens.json",
        "report.html", "curve.svg", "curve.png", "lock",
    ];
    names.extend(files_of_run.map(PathBuf::from));
    assert_eq!(files.keys().cloned().collect::<BTreeSet<_>>(), names);

    // Results on stdout, what happens on the way on stderr.
    for part in ["adapter", "virtual tokens   5", "validation loss", "wall time", "throughput"] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
        assert!(part == "adapter" || part == "validation loss" || !stderr.contains(part), "{stderr}");
    }
    for part in ["model      model (safetensors)", "train      train.csv: 12 examples", "epoch 1 "] {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
        assert!(!stdout.contains(part), "{stdout}");
    }

    // The configuration is the resolved one, and its own input.
    let (given, kept) = (Config::load(&place.path("dogs.toml"), &[]), place.path("runs/dogs/config.toml"));
    assert_eq!(Config::load(&kept, &[]).unwrap(), given.unwrap());
    assert!(std::fs::read_to_string(kept).unwrap().contains("weight_decay"));

    let adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    assert_eq!(adapter.prompt.values().dims(), [5, 40]);
    assert_eq!(adapter.config.base_model_name_or_path.as_deref(), Some("model"));
    assert_eq!(adapter.config.prompt_tuning_init_text.as_deref(), Some("say 1 or 0"));
    let card = std::fs::read_to_string(place.path("runs/dogs/adapter/README.md")).unwrap();
    assert!(card.contains("say {{input}} :") && card.contains("learning rate"), "{card}");
}

#[test]
fn metrics_have_a_line_a_step_and_a_line_an_epoch() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=12"]).success();
    let text = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n'));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (epochs, steps): (Vec<&Value>, Vec<&Value>) =
        lines.iter().partition(|line| line.get("validation_loss").is_some());
    assert_eq!((steps.len(), epochs.len()), (36, 12));
    let of_step = [
        "step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "target_tokens", "rows",
        "seconds", "elapsed",
    ];
    let of_epoch = ["epoch", "step", "train_loss", "validation_loss", "best", "seconds", "elapsed"];
    for step in &steps {
        assert_eq!(keys(step), BTreeSet::from(of_step));
        assert_eq!((&step["examples"], &step["target_tokens"]), (&json!(4), &json!(8)));
    }
    for epoch in &epochs {
        assert_eq!(keys(epoch), BTreeSet::from(of_epoch));
        assert!(epoch["validation_loss"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(lines[3]["epoch"], json!(1), "an epoch's line is behind its steps");
    assert!(lines[3].get("best").is_some());
    let train_loss = |i: usize| epochs[i]["train_loss"].as_f64().unwrap();
    assert!(train_loss(11) < 0.8 * train_loss(0), "from {} to {}", train_loss(0), train_loss(11));
}

#[test]
fn a_second_run_moves_the_first_aside() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let first = place.files("runs/dogs");
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--set", "train.seed=7"]).success());
    assert!(stderr.contains("is now runs/dogs~1"), "{stderr}");
    assert_eq!(place.files("runs/dogs~1"), first);
    let second = place.files("runs/dogs");
    assert_ne!(second[Path::new("config.toml")], first[Path::new("config.toml")]);
    place.gneiss(["tune", "dogs.toml"]).success();
    assert_eq!(place.files("runs/dogs~1"), first);
    assert_eq!(place.files("runs/dogs~2"), second);
    // One seed, one prompt: the third run was the first again.
    let weights = Path::new("adapter/adapter_model.safetensors");
    assert_eq!(place.files("runs/dogs")[weights], first[weights]);
    assert_ne!(second[weights], first[weights]);
}

#[test]
fn tune_gives_json_alone_on_stdout() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--json"]).success());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result["run"], json!("runs/dogs"));
    assert_eq!(result["num_virtual_tokens"], json!(5));
    assert!(result["examples_per_second"].as_f64().unwrap() > 0.0);
    assert!(result["validation_loss"].as_f64().unwrap() > 0.0);
    Adapter::read(&place.path(result["adapter"].as_str().unwrap())).unwrap();
    assert!(stderr.contains("epoch 3"), "{stderr}");
}

#[test]
fn generate_continues_a_text() {
    let place = Place::new();
    let base = ["generate", "--model", "model", "--max-new-tokens", "4"];
    let (stdout, stderr) = texts(&place.gneiss(base.into_iter().chain(["say happy dog :"])).success());
    assert!(!stdout.trim().is_empty() && stdout.ends_with('\n') && stdout.lines().count() == 1, "{stdout}");
    assert!(stderr.contains("model      model (safetensors)"), "{stderr}");
    let (again, _) = texts(&place.gneiss(base.into_iter().chain(["say happy dog :"])).success());
    assert_eq!(again, stdout, "greedy");

    place.gneiss(["tune", "dogs.toml"]).success();
    let tuned = base.into_iter().chain(["--adapter", "runs/dogs/adapter", "--json", "say happy dog :"]);
    let (stdout, _) = texts(&place.gneiss(tuned).success());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        keys(&result),
        BTreeSet::from(["generated_text", "generated_token_count", "input_token_count", "stop_reason"])
    );
    assert_eq!(result["input_token_count"], json!(5 + 4));
    let count = result["generated_token_count"].as_u64().unwrap();
    assert!(count <= 4);
    let stop_reason = if count == 4 { "max_tokens" } else { "stop_token" };
    assert_eq!(result["stop_reason"], json!(stop_reason));
}

#[test]
fn help_and_version_are_no_errors() {
    let place = Place::new();
    for args in [vec!["--help"], vec!["--version"], vec!["tune", "--help"], vec!["eval", "-h"]] {
        let (stdout, stderr) = texts(&place.gneiss(args).code(0));
        assert!(stdout.contains("gneiss"), "{stdout}");
        assert_eq!(stderr, "");
    }
    let (stdout, _) = texts(&place.gneiss(["--help"]).success());
    for command in ["tune", "eval", "generate"] {
        assert!(stdout.contains(command), "{stdout}");
    }
}

#[test]
fn bad_usage_is_refused() {
    let place = Place::new();
    place.refuses(["tune"], &["CONFIG", "--resume"]);
    place.refuses(["tuna", "dogs.toml"], &["tuna", "tune"]);
    place.refuses(["tune", "dogs.toml", "--device", "gpu"], &["gpu", "cuda:N"]);
    place.refuses(["eval", "dogs.toml"], &["--adapter"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn a_bad_configuration_is_refused() {
    let place = Place::new();
    place.refuses(["tune", "cats.toml"], &["cats.toml", "o such file"]);
    place.write("typo.toml", &CONFIG.replace("learning_rate", "lerning_rate"));
    place.refuses(
        ["tune", "typo.toml"],
        &["typo.toml", "line 20", "`train.lerning_rate`", "did you mean `train.learning_rate`?"],
    );
    place.refuses(
        ["tune", "dogs.toml", "--set", "train.num_epochs=many", "--set", "prompt.length=4"],
        &["2 problems", "`--set train.num_epochs`", "a whole number", "\"many\"", "`--set prompt.length`"],
    );
    place.refuses(["tune", "dogs.toml", "--set", "train.seed"], &["train.seed", "KEY=VALUE"]);
    place.refuses(
        ["eval", "dogs.toml", "--adapter", "a", "--set", "data.validation="],
        &["train.keep", "\"best\""],
    );
    assert!(!place.path("runs").exists());
}

#[test]
fn a_bad_model_is_refused() {
    let place = Place::new();
    place.refuses(["tune", "dogs.toml", "--model", "./no-model"], &["no-model"]);
    place.refuses(["generate", "--model", "no/such.gguf", "say"], &["no/such.gguf"]);
    place.refuses(["tune", "dogs.toml", "--model", "."], &["config.json"]);
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.refuses(["tune", "dogs.toml"], &["model", "tokenizer.json", "AutoTokenizer"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn bad_data_is_refused() {
    let place = Place::new();
    place.write("bad.csv", "input,output\nshiny dog,1\nlate,rude dog,0\n,1\n");
    place.refuses(
        ["tune", "dogs.toml", "--set", "data.train=bad.csv"],
        &[
            "bad.csv", "2 problems", "line 3", "expected 2 fields, found 3", "double quotes", "line 4",
            "`input`",
        ],
    );
    place.refuses(["tune", "dogs.toml", "--set", "data.output=label"], &["train.csv", "`label`"]);
    place.refuses(["tune", "dogs.toml", "--set", "data.train=no.csv"], &["no.csv", "o such file"]);
    place.refuses(
        ["tune", "dogs.toml", "--set", "prompt.num_virtual_tokens=300"],
        &["256", "max_position_embeddings", "prompt.num_virtual_tokens"],
    );
    assert!(!place.path("runs").exists(), "nothing is written before all is well");
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let mut adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    adapter.prompt =
        Prefix::Embeddings(Tensor::ones((5, 32), candle_core::DType::F32, &Device::Cpu).unwrap());
    adapter.config.token_dim = 32;
    adapter.config.base_model_name_or_path = Some("org/other".into());
    adapter.write(&place.path("other"), &Default::default()).unwrap();
    let parts = ["other", "width 40", "32", "org/other"];
    place.refuses(["eval", "dogs.toml", "--adapter", "other"], &parts);
    place.refuses(["generate", "--model", "model", "--adapter", "other", "say"], &parts);
    let sets = ["prompt.init_method=file", "prompt.init_file=other"];
    place.refuses(
        ["tune", "dogs.toml", "--set", sets[0], "--set", sets[1]],
        &["prompt.init_file", "other", "width 40", "32"],
    );
    place.refuses(["eval", "dogs.toml", "--adapter", "nowhere"], &["nowhere", "adapter folder"]);
    assert_eq!(place.json("other/adapter_config.json")["token_dim"], json!(32));
}

#[test]
fn a_run_that_blows_up_fails_and_leaves_its_last_good_prompt() {
    let place = Place::new();
    let args = ["tune", "dogs.toml", "--set", "train.learning_rate=1e38"];
    let (stdout, stderr) = texts(&place.gneiss(args).code(1));
    assert_eq!(stdout, "");
    assert!(stderr.contains("error: step ") && stderr.contains("train.learning_rate"), "{stderr}");
    let adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    assert_eq!(adapter.prompt.values().dims(), [5, 40]);
}

#[test]
fn bench_takes_the_sizes_and_rows_of_a_configuration() {
    let place = Place::new();
    let args = ["bench", "dogs.toml", "--steps", "2", "--warmup", "0", "--json"];
    let run = |more: &[&str]| -> Value {
        let (stdout, _) = texts(&place.gneiss(args.iter().chain(more).copied()).success());
        serde_json::from_str(&stdout).unwrap()
    };
    let report = run(&[]);
    assert_eq!((&report["model"], &report["weights"]), (&json!("model"), &json!("safetensors")));
    assert_eq!(report["examples"], "12 of train.csv");
    let case = &report["cases"][0];
    for (key, expected) in [("batch_size", 4), ("accumulate_steps", 1), ("num_virtual_tokens", 5)] {
        assert_eq!(case[key], expected, "{key}");
    }
    // "say", three words, ":", a label and the end of text, four times; the head and a row of each are shared or none.
    assert_eq!(case["tokens_per_step"], 28.0);
    assert_eq!(case["rows_per_step"], 5.0 + 1.0 + 4.0 * 5.0);

    let report = run(&["--data", "test.csv", "--set", "prompt.num_virtual_tokens=0", "--batch", "3"]);
    assert_eq!(report["examples"], "6 of test.csv");
    // As many as "say 1 or 0" has.
    assert_eq!(report["cases"][0]["num_virtual_tokens"], 4);
    assert_eq!(report["cases"][0]["tokens_per_step"], 21.0);
    place.refuses(["bench", "dogs.toml", "--data", "none.csv"], &["none.csv"]);
    assert!(!place.path("runs").exists(), "a benchmark leaves no run");
}

//! `gneiss inspect`, run as a user runs it.

use assert_cmd::Command;
use candle_core::{DType, Device};
use gneiss::checkpoint::{Checkpoint, TextTokenizer};
use gneiss::data::{Dataset, LengthStats};
use gneiss::prompt::peft::Adapter;
use serde_json::Value;
use std::path::Path;

const ADAPTER: &str = "tests/golden/peft_adapter";
const GRANITE: &str = "tests/golden/granite";

fn gneiss(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("gneiss").unwrap();
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments);
    command
}

/// The JSON of a run that succeeds, and what it said on stderr.
#[track_caller]
fn json(arguments: &[&str]) -> (Value, String) {
    let output = gneiss(&[arguments, &["--json"]].concat()).output().unwrap();
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{notes}");
    (serde_json::from_slice(&output.stdout).unwrap(), notes)
}

#[track_caller]
fn inspect(arguments: &[&str]) -> (Value, String) {
    json(&[&["inspect"], arguments].concat())
}

/// Asserts exit code 2 and these parts of the message.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let output = gneiss(&[&["inspect"], arguments].concat()).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty(), "{arguments:?} printed a result too");
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

fn smollm2() -> String {
    crate::common::smollm2::path().display().to_string()
}

/// [`ADAPTER`] in a folder of its own, with another base model.
fn adapter_of(base: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(ADAPTER).join(name), folder.path().join(name)).unwrap();
    }
    let config = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains(GRANITE));
    std::fs::write(&config, text.replace(GRANITE, base)).unwrap();
    folder
}

#[test]
fn a_model_folder() {
    let (report, notes) = inspect(&[GRANITE]);
    for (key, expected) in [
        ("model_type", Value::from("granite")),
        ("num_hidden_layers", 3.into()),
        ("hidden_size", 40.into()),
        ("num_attention_heads", 5.into()),
        ("num_key_value_heads", 1.into()),
        ("head_dim", 8.into()),
        ("intermediate_size", 57.into()),
        ("vocab_size", 131.into()),
        ("logits_scaling", 2.3.into()),
        ("tie_word_embeddings", true.into()),
        ("format", "safetensors".into()),
        ("tokenizer", Value::Null),
    ] {
        assert_eq!(report[key], expected, "{key}");
    }
    assert_eq!(report["rope"]["theta"], 1000.0);
    // Embedding; per block q/k/v, o, gate/up, down and two norms; the last norm.
    let block = 40 * (7 * 8) + 40 * 40 + 3 * 40 * 57 + 2 * 40;
    assert_eq!(report["parameters"], 131 * 40 + 3 * block + 40);
    let file = std::fs::metadata(Path::new(GRANITE).join("model.safetensors")).unwrap();
    assert_eq!(report["bytes_on_disk"], file.len());
    assert!(notes.contains("tokenizer.json"), "{notes}");
    let dtypes = report["tuning_memory"].as_array().unwrap();
    assert_eq!(dtypes.iter().map(|m| m["dtype"].as_str().unwrap()).collect::<Vec<_>>(), ["f32", "bf16"]);
    assert!(dtypes[1]["weights"].as_u64() < dtypes[0]["weights"].as_u64());
}

#[test]
fn a_model_without_weights() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new(GRANITE).join("config.json"), folder.path().join("config.json")).unwrap();
    let (report, notes) = inspect(&[folder.path().to_str().unwrap()]);
    assert_eq!(report["format"], Value::Null);
    assert!(report["tuning_memory"][0]["total"].as_u64().unwrap() > 0);
    assert!(notes.contains("model.safetensors"), "{notes}");
}

#[test]
fn a_gguf_file() {
    let (report, _) = inspect(&[&smollm2()]);
    assert_eq!(report["model_type"], "llama");
    assert_eq!(report["parameters"], 134_515_008);
    assert_eq!(report["tokenizer"]["eos_token"]["text"], "<|im_end|>");
    let stops = report["tokenizer"]["stop_tokens"].as_array().unwrap().iter().map(|stop| &stop["text"]);
    assert_eq!(stops.collect::<Vec<_>>(), ["<|im_end|>", "<|endoftext|>", "<reponame>"]);
    assert!(report["format"].as_str().unwrap().starts_with("gguf Q4_1"));
    let text = gneiss(&["inspect", &smollm2()]).output().unwrap();
    assert!(String::from_utf8(text.stdout).unwrap().contains("134,515,008"));
}

/// The warning comes wherever the tokenizer is read, and the command goes on.
#[test]
fn a_gguf_file_without_a_pre_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.gguf").display().to_string();
    let mut bytes = std::fs::read("tests/fixtures/bpe.gguf").unwrap();
    let key = b"tokenizer.ggml.pre";
    let place = bytes.windows(key.len()).position(|window| window == key).unwrap();
    // A key that nobody reads.
    bytes[place + key.len() - 1] = b'x';
    std::fs::write(&path, bytes).unwrap();
    let says = |notes: &str| {
        let warning = notes.lines().find(|line| line.starts_with("warning"));
        assert!(warning.is_some_and(|line| line.contains("`tokenizer.ggml.pre` is missing")), "{notes}");
    };
    says(&inspect(&[&path]).1);
    says(&json(&["generate", "--model", &path, "--max-new-tokens", "1", "--device", "cpu", "Order 7"]).1);
    let tickets = folder.path().join("tickets.csv");
    std::fs::write(&tickets, "input,output\nlate,yes\n").unwrap();
    says(&inspect(&[&tickets.display().to_string(), "--model", &path, "--verbalizer", "{{input}}"]).1);
    let (_, notes) = inspect(&["tests/fixtures/bpe.gguf"]);
    assert!(!notes.contains("warning"), "{notes}");
}

/// An adapter's norms and neighbours, computed again the long way in f64.
#[test]
fn an_adapter_beside_its_base_model() {
    let (report, _) = inspect(&[ADAPTER]);
    assert_eq!(report["shape"], serde_json::json!([7, 40]));
    assert_eq!(report["config"]["prompt_tuning_init"], "RANDOM");
    let f64s = |t: &candle_core::Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let prompt = f64s(Adapter::read(Path::new(ADAPTER)).unwrap().prompt.values());
    let weights = Checkpoint::open_without_tokenizer(Path::new(GRANITE)).unwrap().weights;
    let embedding =
        weights.tensor("model.embed_tokens.weight", &[131, 40], DType::F64, &Device::Cpu).unwrap();
    let embedding = f64s(&embedding);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norm = |a: &[f64]| dot(a, a).sqrt();
    let close = |found: &Value, expected: f64| {
        assert!((found.as_f64().unwrap() - expected).abs() < 1e-5, "expected {expected}, found {found}");
    };
    close(&report["vocabulary_mean_norm"], embedding.iter().map(|e| norm(e)).sum::<f64>() / 131.0);
    let norms: Vec<f64> = prompt.iter().map(|p| norm(p)).collect();
    close(&report["norms"]["mean"], norms.iter().sum::<f64>() / 7.0);
    close(&report["norms"]["min"], norms.iter().copied().fold(f64::MAX, f64::min));
    close(&report["norms"]["max"], norms.iter().copied().fold(0.0, f64::max));
    for (row, token) in prompt.iter().zip(report["tokens"].as_array().unwrap()) {
        let cosine = |id: usize| dot(row, &embedding[id]) / norm(row) / norm(&embedding[id]);
        let mut ids: Vec<usize> = (0..131).collect();
        ids.sort_by(|a, b| cosine(*b).total_cmp(&cosine(*a)));
        let nearest = token["nearest"].as_array().unwrap();
        assert_eq!(nearest.len(), 3);
        for (id, near) in ids.into_iter().zip(nearest) {
            assert_eq!(near["id"], id);
            close(&near["cosine"], cosine(id));
        }
    }
}

#[test]
fn an_adapter_without_its_base_model() {
    let folder = adapter_of("somewhere/else");
    let path = folder.path().to_str().unwrap();
    let (report, notes) = inspect(&[path]);
    assert!(notes.contains("base model not opened: no somewhere/else here"), "{notes}");
    assert_eq!(report["vocabulary_mean_norm"], Value::Null);
    assert_eq!(report["tokens"].as_array().unwrap().len(), 7);
    assert_eq!(report["tokens"][0]["nearest"], serde_json::json!([]));
    let (named, notes) = inspect(&[path, "--model", GRANITE]);
    assert!(!notes.contains("not opened"), "{notes}");
    assert_eq!(named["tokens"], inspect(&[ADAPTER]).0["tokens"]);
    // A model that the user names has to fit.
    refused(&[path, "--model", "no/such/model"], &["no such file or folder"]);
    refused(&[path, "--model", &smollm2()], &["hidden size 40", "found 576"]);
}

#[test]
fn a_dataset() {
    let (report, _) = inspect(&["data/test.csv"]);
    let records = Dataset::read(Path::new("data/test.csv"), "input", "output").unwrap().records;
    assert_eq!(report["rows"], records.len());
    assert_eq!(report["distinct_outputs"], 2);
    for label in report["labels"].as_array().unwrap() {
        let rows = records.iter().filter(|r| r.output.trim() == label[0].as_str().unwrap()).count();
        assert!(rows > 0 && label[1] == rows, "{label}");
    }
    let words = LengthStats::from_lengths(records.iter().map(|r| r.input.split_whitespace().count()));
    assert_eq!(report["words_per_input"]["median"], words.median);
    assert_eq!(report["words_per_input"]["max"], words.max);
    assert_eq!(report["tokens"], Value::Null);
}

#[test]
fn a_dataset_of_free_text_has_no_labels() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let rows: String = (0..21).map(|i| format!("{{\"q\": \"one two\", \"a\": \"answer {i}\"}}\n")).collect();
    std::fs::write(&path, rows).unwrap();
    let path = path.to_str().unwrap();
    let (report, _) = inspect(&[path, "--input", "q", "--output", "a"]);
    assert_eq!((&report["distinct_outputs"], &report["labels"]), (&21.into(), &Value::Null));
    refused(&[path], &["`input`", "`q`"]);
}

#[test]
fn the_tokens_of_a_dataset() {
    let model = smollm2();
    let limits = ["--verbalizer", "say: {{input}}", "--max-input-tokens", "40", "--max-output-tokens", "1"];
    let (report, _) = inspect(&[&["data/test.csv", "--model", &model][..], &limits].concat());
    let tokenizer = TextTokenizer::open(Path::new(&model)).unwrap();
    let records = Dataset::read(Path::new("data/test.csv"), "input", "output").unwrap().records;
    let tokens =
        |r: &gneiss::data::Record| tokenizer.encode(&format!("say: {}", r.input), true).unwrap().len();
    let lengths: Vec<usize> = records.iter().map(tokens).collect();
    let long = lengths.iter().filter(|n| **n > 40).count();
    assert!(long > 0 && long < lengths.len());
    assert_eq!(report["tokens"]["inputs_cut"], long);
    // A label and the end of the text are two.
    assert_eq!(report["tokens"]["targets_cut"], records.len());
    assert_eq!(report["tokens"]["inputs"]["max"], *lengths.iter().max().unwrap());
}

#[test]
fn a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("train.csv"), "input,output\na b c,1\nd e f,0\na b c,0\ng,1\nh,1\n").unwrap();
    std::fs::write(at("test.csv"), "input,output\na b c,1\nx,0\n").unwrap();
    let config = format!(
        "[model]\nid = {:?}\n[prompt]\ninit_text = \"one two three\"\n[data]\ntrain = {:?}\ntest = {:?}\n\
         verbalizer = \"tell me: {{{{input}}}} !\"\n[train]\nbatch_size = 2\nnum_epochs = 3\nkeep = \"last\"\n",
        smollm2(),
        at("train.csv"),
        at("test.csv")
    );
    std::fs::write(at("run.toml"), config).unwrap();
    let (report, _) = inspect(&[&at("run.toml")]);
    assert_eq!(report["virtual_tokens"], 3);
    assert_eq!(report["shared_text"], "tell me:");
    assert_eq!((&report["steps_per_epoch"], &report["steps"]), (&3.into(), &9.into()));
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.iter().map(|f| f["split"].as_str().unwrap()).collect::<Vec<_>>(), ["train", "test"]);
    assert_eq!(files[0]["inputs_shared_with_train"], Value::Null);
    assert_eq!(files[1]["inputs_shared_with_train"], 2);
    assert!(report["batches"]["mean_rows"].as_f64() < report["batches"]["mean_padded_rows"].as_f64());
    let memory = &report["memory"][0];
    let parts = ["weights", "tape", "workspace", "prompt"].map(|key| memory[key].as_u64().unwrap());
    assert_eq!(parts.iter().sum::<u64>(), memory["total"].as_u64().unwrap());
    // What the CPU has free holds this, or the system does not say.
    assert_eq!((&report["plan"]["recompute"], &report["plan"]["missing"]), (&0.into(), &0.into()));
    let plan = |budget: &str| {
        let config = std::fs::read_to_string(at("run.toml")).unwrap();
        std::fs::write(at("small.toml"), format!("{config}memory_budget = {budget:?}\n")).unwrap();
        inspect(&[&at("small.toml")]).0["plan"].clone()
    };
    // The weights take 538 MB and 134 are kept free: all but the last of 30 blocks are recomputed.
    let small = plan("1MB");
    assert_eq!((&small["budget"], &small["recompute"]), (&1_000_000.into(), &29.into()));
    assert_eq!(small["missing"].as_u64().unwrap() + 1_000_000, small["total"].as_u64().unwrap());
    assert_eq!(plan("4GB")["recompute"], 0);

    std::fs::write(at("bad.toml"), "[train]\nbatch_size = 0\nbatch = 1\n").unwrap();
    refused(&[&at("bad.toml")], &["bad.toml", "batch"]);
}

/// Tunes two steps, and holds what was foretold against what was.
#[test]
fn a_run_goes_as_its_configuration_said() {
    let (folder, model) = (tempfile::tempdir().unwrap(), smollm2());
    let config = std::fs::read_to_string("configs/tutorial.toml").unwrap();
    let config = config.replace("validation = \"data/validation.csv\"", "").replace("\"best\"", "\"last\"");
    let config =
        config.replace("max_steps = 0", "max_steps = 2").replace("name = \"tutorial\"", "name = \"two\"");
    let path = folder.path().join("two.toml");
    std::fs::write(&path, config).unwrap();
    let (path, runs) = (path.to_str().unwrap(), format!("runs={}", folder.path().display()));
    let (said, _) = inspect(&[path, "--model", &model]);
    let (tuned, notes) = json(&["tune", path, "--model", &model, "--device", "cpu", "--set", &runs]);

    assert!(notes.contains("memory ") && notes.contains("0 of 30 layers recomputed"), "{notes}");
    let run = folder.path().join("two");
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for step in 0..2 {
        assert_eq!(said["batches"]["rows"][step], lines[step]["rows"], "step {}", step + 1);
    }
    assert_eq!((&said["steps"], &said["virtual_tokens"]), (&2.into(), &tuned["num_virtual_tokens"]));
    if let Some(peak) = tuned["peak_memory_bytes"].as_f64() {
        let memory = &said["memory"][1];
        let largest = lines[..2].iter().map(|line| line["rows"].as_f64().unwrap()).fold(0.0, f64::max);
        let tape = memory["tape"].as_f64().unwrap() * largest / memory["rows"].as_f64().unwrap();
        let rest = ["weights", "workspace", "prompt"].map(|key| memory[key].as_f64().unwrap());
        let estimate = tape + rest.iter().sum::<f64>();
        // The process has its own 60 MB or so on top.
        assert!((0.95..1.25).contains(&(peak / estimate)), "estimated {estimate} bytes, took {peak}");
    }

    let run = run.to_str().unwrap();
    let (report, _) = inspect(&[run, "--model", &model]);
    assert_eq!((&report["steps"], &report["epochs"]), (&2.into(), &1.into()));
    assert_eq!((&report["first_step"], &report["last_step"]), (&lines[0], &lines[1]));
    assert_eq!((&report["last_epoch"], &report["best_epoch"]), (&lines[2], &lines[2]));
    let tokenizer = TextTokenizer::open(Path::new(&model)).unwrap();
    let text = report["adapter"]["config"]["prompt_tuning_init_text"].as_str().unwrap();
    let ids = tokenizer.encode(text, true).unwrap();
    let tokens = report["adapter"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), ids.len());
    for (id, token) in ids.iter().zip(tokens) {
        // The first of two steps is taken at a learning rate of 0; the second moves every value by 0.01.
        assert_eq!((&token["initial"]["id"], &token["nearest"][0]["id"]), (&(*id).into(), &(*id).into()));
        let moved = token["initial"]["moved"].as_f64().unwrap();
        assert!(moved > 0.0 && moved < 0.01 * 576f64.sqrt() * 1.1, "moved {moved}");
    }

    // A run under way: its last line is not whole, its adapter not there.
    std::fs::remove_dir_all(folder.path().join("two/adapter")).unwrap();
    std::fs::write(folder.path().join("two/metrics.jsonl"), &metrics[..metrics.len() - 5]).unwrap();
    let (report, notes) = inspect(&[run]);
    assert_eq!(
        (&report["steps"], &report["epochs"], &report["adapter"]),
        (&2.into(), &0.into(), &Value::Null)
    );
    assert!(notes.contains("none yet"), "{notes}");
    std::fs::write(folder.path().join("two/metrics.jsonl"), "{}\nnonsense\n").unwrap();
    refused(&[run], &["metrics.jsonl", "line 1", "line 2"]);
}

#[test]
fn what_is_nothing_of_these_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    refused(&[folder.path().to_str().unwrap()], &["adapter_config.json, metrics.jsonl, config.json"]);
    refused(&[&at("none.csv")], &["none.csv"]);
    refused(&[&at("none.toml")], &["none.toml"]);
    refused(&[&at("none.gguf")], &["no such file or folder"]);
    refused(&["nonsense"], &["org/name"]);
    std::fs::write(at("a.txt"), "").unwrap();
    refused(&[&at("a.txt")], &["another kind of file"]);
}

//! PEFT itself, in Python, loads an adapter that gneiss wrote and computes the same logits.
//!
//! The Python is the one that GNEISS_PYTHON names, else .venv/bin/python, else python3. Where it has no PEFT
//! the test says so and passes, unless GNEISS_REQUIRE_PEFT=1.

use crate::common::close::assert_tensors_close;
use crate::common::python::python_with;
use crate::fixtures::*;
use crate::peft_kinds::Kinds;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Passes, PrefixGroup, Sequence};
use gneiss::checkpoint::Checkpoint;
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PromptTuningInit};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What `peft_logits.py` prints for an adapter of a checkpoint in tests/golden.
fn by_peft(python: &Path, checkpoint: &str, adapter: &Path, sequences: &[Vec<u32>]) -> Value {
    let ids = |s: &Vec<u32>| s.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let output = Command::new(python)
        .arg(folder("peft_logits.py"))
        .arg("--checkpoint")
        .arg(folder(checkpoint))
        .arg("--adapter")
        .arg(adapter)
        .args(["--ids", &sequences.iter().map(ids).collect::<Vec<_>>().join(";")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn peft_computes_the_same_from_an_adapter_of_gneiss() {
    let Some(python) = python_with(&["peft"], "GNEISS_REQUIRE_PEFT") else { return };
    let (golden, model) = (golden("granite"), model("granite", DType::F32));
    let prompt = golden.tensors["train_accumulate_4.final_prompt"].clone();
    let (n, _) = prompt.dims2().unwrap();
    let id = folder("granite").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let config = AdapterConfig::new(&id, model.config(), n, PromptTuningInit::Random, None);
    let card = ModelCard { name: "parity".into(), ..ModelCard::default() };
    Adapter { prompt: Prefix::Embeddings(prompt.clone()), config, task: None }
        .write(folder.path(), &card)
        .unwrap();

    let cases = golden.json["generate"]["sequences"].as_array().unwrap();
    let sequences: Vec<Vec<u32>> = cases.iter().map(|s| ids(&s["input"])).collect();
    let theirs = by_peft(&python, "granite", folder.path(), &sequences);
    assert_eq!(theirs["prompt_embeddings_shape"], serde_json::json!([n, 40]));
    let rows: Vec<Vec<f32>> = serde_json::from_value(theirs["logits"].clone()).unwrap();
    let theirs = Tensor::new(rows, &Device::Cpu).unwrap();

    let sequence = |input: &Vec<u32>| Sequence { input: input.clone(), target: Vec::new() };
    let group = PrefixGroup {
        before: Vec::new(),
        prompt: 0..n as u32,
        head: Vec::new(),
        sequences: sequences.iter().map(sequence).collect(),
    };
    let batch = Passes::new(&[group], usize::MAX).prefix_pass;
    let read = Adapter::read(folder.path()).unwrap().prompt.values().clone();
    let tape = model.forward(&batch, &read, None, 0).unwrap();
    assert_tensors_close("logits of PEFT", &model.logits(tape.hidden()).unwrap(), &theirs, 1e-4);
}

/// The prompt of a folder that PEFT wrote, written by gneiss under each of the two methods.
#[test]
fn peft_reads_keys_and_values_that_gneiss_wrote() {
    let Some(python) = python_with(&["peft"], "GNEISS_REQUIRE_PEFT") else { return };
    let kinds = Kinds::read();
    let sequences = kinds.sequences();
    for (name, frozen) in [("granite", 0), ("llama_bias", 1)] {
        let id = folder(name).display().to_string();
        let prompt = Adapter::read(&folder(&format!("peft_kinds/{name}/prefix"))).unwrap().prompt;
        let model = Checkpoint::open_without_tokenizer(&folder(name)).unwrap().config;
        let config = AdapterConfig::keys_values(&id, &model, prompt.num_virtual_tokens(), frozen);
        let written = tempfile::tempdir().unwrap();
        let adapter = Adapter { prompt, config, task: None };
        adapter.write(written.path(), &ModelCard::default()).unwrap();

        let theirs = by_peft(&python, name, written.path(), &sequences);
        let rows: Vec<Vec<f32>> = serde_json::from_value(theirs["prompt_embeddings"].clone()).unwrap();
        assert_eq!(rows, adapter.prompt.values().to_vec2::<f32>().unwrap(), "{name}");
        let last: Vec<Vec<f64>> = serde_json::from_value(theirs["logits"].clone()).unwrap();
        let expected = kinds.logits(&Value::from(format!("{name}.prefix")));
        let mut row = 0;
        for (logits, sequence) in last.iter().zip(&sequences) {
            row += sequence.len();
            let worst = logits.iter().zip(&expected[row - 1]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-4, "{name}, {sequence:?}: a logit differs by {worst}");
        }
    }
}

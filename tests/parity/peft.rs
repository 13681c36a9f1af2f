//! PEFT itself, in Python, loads an adapter that gneiss wrote and computes the same logits.
//!
//! The Python is the one that GNEISS_PYTHON names, else .venv/bin/python, else python3. Where it has no PEFT
//! the test says so and passes, unless GNEISS_REQUIRE_PEFT=1.

use crate::common::close::assert_tensors_close;
use crate::common::python::python_with;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Passes, PrefixGroup, Sequence};
use gneiss::prompt::Prefix;
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PromptTuningInit};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What `peft_logits.py` prints for an adapter of tests/golden/granite.
fn by_peft(python: &Path, adapter: &Path, sequences: &[Vec<u32>]) -> Value {
    let ids = |s: &Vec<u32>| s.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let output = Command::new(python)
        .arg(folder("peft_logits.py"))
        .arg("--checkpoint")
        .arg(folder("granite"))
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
    let Some(python) = python_with("peft", "GNEISS_REQUIRE_PEFT") else { return };
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
    let theirs = by_peft(&python, folder.path(), &sequences);
    assert_eq!(theirs["prompt_embeddings_shape"], serde_json::json!([n, 40]));
    let rows: Vec<Vec<f32>> = serde_json::from_value(theirs["logits"].clone()).unwrap();
    let theirs = Tensor::new(rows, &Device::Cpu).unwrap();

    let sequence = |input: &Vec<u32>| Sequence { input: input.clone(), target: Vec::new() };
    let group = PrefixGroup {
        prompt: 0..n as u32,
        head: Vec::new(),
        sequences: sequences.iter().map(sequence).collect(),
    };
    let batch = Passes::new(&[group], usize::MAX).prefix_pass;
    let read = Adapter::read(folder.path()).unwrap().prompt.values().clone();
    let tape = model.forward(&batch, &read, None, 0).unwrap();
    assert_tensors_close("logits of PEFT", &model.logits(tape.hidden()).unwrap(), &theirs, 1e-4);
}

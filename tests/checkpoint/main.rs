//! Reading a checkpoint: configuration, weights from safetensors and GGUF, tokenizer.

#[path = "../common/mod.rs"]
mod common;
mod config;
mod configured;
mod forms;
mod gguf;
mod gguf_mixers;
mod hub;
mod rope;
mod safetensors;
mod tokenizer;
mod vocabularies;

use common::smollm2::path as smollm2;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::Weights;

/// A file of tests/fixtures.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A fixture that is JSON.
fn fixture_json(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(fixture(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Asserts that an error's message has all these parts.
#[track_caller]
fn assert_says<T: std::fmt::Debug>(result: gneiss::Result<T>, parts: &[&str]) {
    let message = result.expect_err("expected an error").to_string();
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// Reads a tensor as f32 on the CPU, whatever its shape.
fn read(weights: &Weights, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = weights.tensor(name, shape, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), shape, "{name}");
    values(&tensor)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

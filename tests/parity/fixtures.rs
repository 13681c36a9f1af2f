//! Reads `cases.json` and `golden.safetensors` of one checkpoint.

use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Example, PrefixGroup};
use gneiss::checkpoint::{BareCheckpoint, Checkpoint};
use gneiss::model::{Decoder, Dtypes};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub const CHECKPOINTS: [&str; 8] = [
    "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts",
    "mamba_groups",
];

pub struct Golden {
    pub json: Value,
    pub tensors: HashMap<String, Tensor>,
}

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn golden(name: &str) -> Golden {
    golden_in(&folder(name).join("cases.json"), &folder(name).join("golden.safetensors"))
}

pub fn golden_in(cases: &Path, tensors: &Path) -> Golden {
    let text = std::fs::read_to_string(cases).unwrap();
    let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
    Golden { json: serde_json::from_str(&text).unwrap(), tensors }
}

pub fn model(name: &str, dtype: DType) -> Decoder {
    model_in(&folder(name), dtype)
}

pub fn model_in(folder: &Path, dtype: DType) -> Decoder {
    let BareCheckpoint { config, weights, .. } = Checkpoint::open_without_tokenizer(folder).unwrap();
    let dtypes = Dtypes::for_weights(dtype, &Device::Cpu).unwrap();
    Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

pub fn example(value: &Value) -> Example {
    Example { input: ids(&value["input"]), target: ids(&value["target"]), line: 0 }
}

impl Golden {
    pub fn tensor(&self, name: &Value) -> &Tensor {
        &self.tensors[name.as_str().unwrap()]
    }

    /// The prompts of a case one after another, the groups that name their rows, and the prompts' gradients.
    pub fn case(&self, case: &Value) -> (Tensor, Vec<PrefixGroup>, Tensor) {
        let (mut prompts, mut groups, mut gradients, mut row) = (vec![], vec![], vec![], 0);
        for group in case["groups"].as_array().unwrap() {
            let prompt = self.tensor(&group["prompt"]);
            let n = prompt.dims()[0] as u32;
            let examples: Vec<Example> = group["examples"].as_array().unwrap().iter().map(example).collect();
            groups.push(PrefixGroup::new(row..row + n, &examples));
            row += n;
            prompts.push(prompt.clone());
            gradients.push(self.tensor(&group["grad"]).clone());
        }
        (Tensor::cat(&prompts, 0).unwrap(), groups, Tensor::cat(&gradients, 0).unwrap())
    }
}

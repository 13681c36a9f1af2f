//! Golden checkpoints from GGUF files (`tests/fixtures/make_gguf_mixers.py`) in place of their folders.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use candle_core::{DType, Device};
use gneiss::checkpoint::{GgufFile, Weights};
use gneiss::model::{Decoder, Dtypes};
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits};
use std::path::Path;

#[test]
fn experts_and_mamba_from_gguf_agree_with_peft() {
    for name in ["experts", "mamba_experts"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.gguf"));
        let file = GgufFile::open(&path).unwrap();
        let (config, weights) = (file.config().clone(), Weights::from(file));
        let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
        let model = Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
        let golden = golden(name);
        for case in golden.json["cases"].as_array().unwrap() {
            let (prompts, groups, gradient) = golden.case(case);
            let ours = tune::gradient(
                &model,
                &Prefix::Embeddings(prompts.clone()),
                &groups,
                Limits::rows(usize::MAX),
            )
            .unwrap();
            let what = format!("{name}.gguf, {}", case["name"]);
            let (loss, expected) = (ours.loss().unwrap(), case["loss"].as_f64().unwrap());
            assert!((loss - expected).abs() < 1e-4 * expected, "{what}: loss {loss}, expected {expected}");
            assert_tensors_close(&what, ours.gradient.unwrap().values(), &gradient, 1e-4);
        }
    }
}

//! Baked GGUF files, read by gneiss, by the gguf package, by transformers and by llama.cpp.

use crate::bake::SETUPS;
use crate::engines::gguf_base;
use crate::fixtures::*;
use crate::python::python_with;
use candle_core::Tensor;
use gneiss::export::{Format, ValueType};
use gneiss::model::{GgufFile, TextTokenizer};
use serde_json::json;
use std::path::{Path, PathBuf};

/// A base with the prompt of its golden continuations, and where the file goes.
struct Place {
    here: tempfile::TempDir,
    golden: Golden,
    tokens: u32,
}

impl Place {
    fn new(setup: &Setup) -> Self {
        let here = tempfile::tempdir().unwrap();
        base(here.path(), setup);
        let golden = golden(setup.golden);
        let soft = &golden.tensors[golden.json["generate"]["prompt"].as_str().unwrap()];
        adapter(&here.path().join("a"), here.path(), soft, Some("say {{input}}!"));
        Self { here, tokens: setup.tokens as u32, golden }
    }

    fn bake(&self, name: &str, value_type: Option<ValueType>) -> PathBuf {
        let out = self.here.path().join(format!("{name}.gguf"));
        let adapters = [format!("p={}", self.here.path().join("a").display())];
        baked(self.here.path(), &adapters, &out, Format::Gguf, value_type);
        assert!(out.with_extension("prompts.json").is_file());
        out
    }

    /// The golden inputs behind the prompt's tokens, and what transformers and PEFT continue them with.
    fn sequences(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let generate = &self.golden.json["generate"];
        let new = self.tokens..self.tokens + generate["num_virtual_tokens"].as_u64().unwrap() as u32;
        let sequences = generate["sequences"].as_array().unwrap();
        sequences
            .iter()
            .map(|s| (new.clone().chain(ids(&s["input"])).collect(), ids(&s["generated"])))
            .collect()
    }
}

/// Logits over the ids and their continuation but for its last token.
fn over(path: &Path, (input, generated): &(Vec<u32>, Vec<u32>)) -> Tensor {
    let all: Vec<u32> = input.iter().chain(&generated[..generated.len() - 1]).copied().collect();
    logits(&model(path), &all).narrow(0, input.len() - 1, generated.len()).unwrap()
}

#[test]
fn gneiss_reads_back_what_peft_computes() {
    // gneiss takes Llama 3's rotary factors from GGUF for the values of Meta's models alone, which llama_bias has not.
    for setup in SETUPS.iter().filter(|setup| setup.tokens >= 127 && setup.golden != "llama_bias") {
        let place = Place::new(setup);
        let exact = place.bake("f32", None);
        let (read, own) =
            (TextTokenizer::open(&exact).unwrap(), TextTokenizer::open(place.here.path()).unwrap());
        assert_eq!(read.stop_token_ids, own.stop_token_ids);
        let text = "a<s>b wet dogs 123,\n\n the Café";
        assert_eq!(read.encode(text, true).unwrap(), own.encode(text, true).unwrap());
        let tokens: Vec<u32> = (place.tokens..place.tokens + 5).collect();
        assert_eq!(read.encode("<|p:0|><|p:1|><|p:2|><|p:3|><|p:4|>", false).unwrap(), tokens);
        for sequence in place.sequences() {
            let found = over(&exact, &sequence);
            assert_eq!(found.argmax(1).unwrap().to_vec1::<u32>().unwrap(), sequence.1, "{}", setup.golden);
            let scale = difference(&found, &found.zeros_like().unwrap());
            for (value_type, most) in
                [(ValueType::F16, 0.004), (ValueType::Bf16, 0.04), (ValueType::Q8_0, 0.04)]
            {
                let path = place.here.path().join(format!("{value_type}.gguf"));
                let path =
                    if path.exists() { path } else { place.bake(&value_type.to_string(), Some(value_type)) };
                let worst = difference(&over(&path, &sequence), &found);
                assert!(
                    worst > 0.0 && worst < most * scale,
                    "{}, {value_type}: {worst} of {scale}",
                    setup.golden
                );
            }
        }
    }
}

/// A quantised base is copied byte by byte; only the embedding is written in full.
#[test]
fn a_gguf_base_stays_as_it_is() {
    for (name, first) in [("granite", 37), ("llama", 8)] {
        let here = tempfile::tempdir().unwrap();
        gguf_base(here.path(), name);
        let file = tests("fixtures").join(format!("{name}.gguf"));
        let width = GgufFile::open(&file).unwrap().config().hidden_size;
        let soft = prompt(6, width);
        adapter(&here.path().join("a"), &file, &soft, None);
        let out = here.path().join("out.gguf");
        let adapters = [format!("p={}", here.path().join("a").display())];
        let written = baked(&file, &adapters, &out, Format::Gguf, None);
        assert_eq!((written.rounding, written.embedding_type.as_str()), (0.0, "f32"));
        assert_eq!(written.prompts["p"]["token_ids"], json!([first, first + 5]));

        let (before, after) = (GgufFile::open(&file).unwrap(), GgufFile::open(&out).unwrap());
        let mut config = before.config().clone();
        config.vocab_size = written.vocab_size;
        config.tie_word_embeddings = false;
        assert_eq!(*after.config(), config);
        for (key, value) in before.values() {
            let grown = ["tokens", "token_type"].iter().any(|list| key.ends_with(list));
            assert!(grown || format!("{value:?}") == format!("{:?}", after.values()[key]), "{key}");
        }
        // Logits of the base, of tokens that it had.
        let ids = [3, 4, 5, 4];
        let [old, new] = [&file, &out]
            .map(|path| logits(&model(path), &ids).narrow(1, 0, first).unwrap().contiguous().unwrap());
        assert!(difference(&old, &new) < 1e-6);
        let embedding = gneiss::model::Weights::open_gguf(&out).unwrap();
        let shape = [written.vocab_size, width];
        let rows = embedding.tensor(
            "model.embed_tokens.weight",
            &shape,
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        );
        let rows = rows.unwrap().narrow(0, first, 6).unwrap();
        assert_eq!(rows.to_vec2::<f32>().unwrap(), soft.to_vec2::<f32>().unwrap());

        // The same dequantised and written in another type: q and k keep their order.
        let f32 = here.path().join("f32.gguf");
        baked(&file, &adapters, &f32, Format::Gguf, Some(ValueType::F32));
        let [a, b] = [&out, &f32].map(|path| logits(&model(path), &[first as u32, 3, 4, 5]));
        assert!(difference(&a, &b) < 1e-4 * 32.0);
    }
}

/// The gguf package reads keys and tensors as they are in the base.
#[test]
fn the_gguf_package_reads_it() {
    let Some(python) = python_with("gguf", "GNEISS_REQUIRE_PEFT") else { return };
    for setup in SETUPS.iter().filter(|setup| setup.tokens >= 127) {
        let place = Place::new(setup);
        for (name, value_type) in
            [("f32", None), ("q8_0", Some(ValueType::Q8_0)), ("bf16", Some(ValueType::Bf16))]
        {
            let out = place.bake(name, value_type);
            let folder = place.here.path().to_str().unwrap();
            script(
                &python,
                "gguf_file.py",
                &[out.to_str().unwrap(), folder, name, &place.tokens.to_string()],
            );
        }
    }
}

/// transformers reads GGUF of Llama without biases: it gives the logits of the baked folder of the same base.
#[test]
fn transformers_reads_it() {
    let Some(python) = python_with("gguf, transformers", "GNEISS_REQUIRE_PEFT") else { return };
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[1]);
    let config = here.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    json["model_type"] = "llama".into();
    json["architectures"] = json!(["LlamaForCausalLM"]);
    std::fs::write(&config, json.to_string()).unwrap();
    adapter(&here.path().join("a"), here.path(), &prompt(5, 40), None);
    let adapters = [format!("p={}", here.path().join("a").display())];
    let [folder, file] = ["out", "out.gguf"].map(|name| here.path().join(name));
    baked(here.path(), &adapters, &folder, Format::Safetensors, None);
    baked(here.path(), &adapters, &file, Format::Gguf, None);
    script(&python, "gguf_transformers.py", &[folder.to_str().unwrap(), file.to_str().unwrap()]);
}

/// llama.cpp generates what PEFT generated, from the prompt's tokens and the input.
#[test]
fn llama_cpp_continues_as_peft_does() {
    let Some(python) = python_with("llama_cpp", "GNEISS_REQUIRE_LLAMA_CPP") else { return };
    for setup in SETUPS.iter().filter(|setup| setup.tokens >= 127) {
        let place = Place::new(setup);
        let sequences = json!(place.sequences()).to_string();
        for (name, value_type) in [("f32", None), ("f16", Some(ValueType::F16))] {
            let out = place.bake(name, value_type);
            let text = "<|p:0|><|p:1|><|p:2|><|p:3|><|p:4|><s>wet dogs, 12\n";
            let own = TextTokenizer::open(place.here.path()).unwrap();
            let mut ids: Vec<u32> = (place.tokens..place.tokens + 5).collect();
            ids.extend(own.encode("<s>wet dogs, 12\n", false).unwrap());
            script(
                &python,
                "llama_cpp_file.py",
                &[out.to_str().unwrap(), &sequences, text, &json!(ids).to_string()],
            );
        }
    }
}

//! Baked GGUF files, read by gneiss, by the gguf package, by transformers and by llama.cpp.

use crate::bake::SETUPS;
use crate::common::python::python_with;
use crate::engines::gguf_base;
use crate::fixtures::*;
use candle_core::Tensor;
use gneiss::checkpoint::{GgufFile, TextTokenizer};
use gneiss::export::{Format, ValueType};
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
            // Rounded values send some rows to other experts.
            let more = if setup.golden.contains("experts") { 5.0 } else { 1.0 };
            for (value_type, most) in
                [(ValueType::F16, 0.004), (ValueType::Bf16, 0.04), (ValueType::Q8_0, 0.04)]
            {
                let most = more * most;
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
        let embedding = gneiss::checkpoint::Weights::open_gguf(&out).unwrap();
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

/// A GGUF base of either kind of vocabulary gives the same tokens and ends after baking, as GGUF and as a folder.
#[test]
fn vocabularies_of_gguf_bases_are_kept() {
    let texts = std::fs::read_to_string(tests("fixtures").join("vocabularies.json")).unwrap();
    let texts: serde_json::Value = serde_json::from_str(&texts).unwrap();
    let texts = texts["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap());
    let texts: Vec<&str> = texts.collect();
    for name in ["bpe", "pieces"] {
        let here = tempfile::tempdir().unwrap();
        let file = tests("fixtures").join(format!("{name}.gguf"));
        let own = TextTokenizer::open(&file).unwrap();
        adapter(&here.path().join("a"), &file, &prompt(3, 4), None);
        let adapters = [format!("p={}", here.path().join("a").display())];
        let [out, folder] = ["out.gguf", "out"].map(|name| here.path().join(name));
        let written = baked(&file, &adapters, &out, Format::Gguf, None);
        assert!(written.warnings.is_empty(), "{:?}", written.warnings);
        baked(&file, &adapters, &folder, Format::Safetensors, None);

        let (before, after) = (GgufFile::open(&file).unwrap(), GgufFile::open(&out).unwrap());
        for (key, value) in before.values() {
            let grown = ["tokens", "token_type", "scores"].iter().any(|list| key.ends_with(list));
            assert!(grown || format!("{value:?}") == format!("{:?}", after.values()[key]), "{key}");
        }
        let (first, rows) = (own.tokenizer.get_vocab_size(true), after.config().vocab_size);
        for key in ["tokens", "token_type"] {
            let key = format!("tokenizer.ggml.{key}");
            let list = |file: &GgufFile| file.values()[&key].to_vec().unwrap().clone();
            let (old, new) = (list(&before), list(&after));
            assert_eq!((old.len(), new.len()), (first, rows));
            // The second of two tokens of one text has another.
            let same = first - usize::from(name == "bpe" && key.ends_with("tokens"));
            assert_eq!(format!("{:?}", &old[..same]), format!("{:?}", &new[..same]));
            let different: std::collections::HashSet<String> =
                new.iter().map(|item| format!("{item:?}")).collect();
            assert!(key.ends_with("type") || different.len() == rows);
        }
        for read in [TextTokenizer::open(&out).unwrap(), TextTokenizer::open(&folder).unwrap()] {
            assert_eq!(read.eos_token_id, own.eos_token_id);
            assert_eq!(read.stop_token_ids, own.stop_token_ids);
            for text in &texts {
                for special in [false, true] {
                    assert_eq!(
                        read.encode(text, special).unwrap(),
                        own.encode(text, special).unwrap(),
                        "{text:?}"
                    );
                }
            }
            let prompt: Vec<u32> = (0..3).map(|i| (first + i) as u32).collect();
            assert_eq!(read.encode("<|p:0|><|p:1|><|p:2|>", false).unwrap(), prompt);
        }
    }
}

/// Readers of GGUF end at tokens of some texts without being told, and at two others that keys name.
#[test]
fn ends_of_a_folder_are_kept_or_refused() {
    // What ends a text stands in generation_config.json.
    let bake = |ends: &[&str]| {
        let here = tempfile::tempdir().unwrap();
        base(here.path(), &SETUPS[0]);
        let path = here.path().join("tokenizer.json");
        let mut json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let known = TextTokenizer::open(here.path()).unwrap().tokenizer;
        let first = known.get_vocab_size(true);
        let added = ["</s>", "<one>", "<two>", "<three>", "<|im_end|>"];
        let added: Vec<&str> = added.into_iter().filter(|text| known.token_to_id(text).is_none()).collect();
        for (id, content) in (first..).zip(&added) {
            json["added_tokens"].as_array_mut().unwrap().push(json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer: tokenizers::Tokenizer = json.to_string().parse().unwrap();
        let ids: Vec<u32> = ends.iter().map(|text| tokenizer.token_to_id(text).unwrap()).collect();
        for file in ["tokenizer_config.json", "config.json"] {
            let path = here.path().join(file);
            if let Ok(text) = std::fs::read_to_string(&path) {
                let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
                json.as_object_mut().unwrap().retain(|key, _| !key.starts_with("eos_token"));
                std::fs::write(&path, json.to_string()).unwrap();
            }
        }
        let generation = json!({"eos_token_id": ids});
        std::fs::write(here.path().join("generation_config.json"), generation.to_string()).unwrap();
        adapter(&here.path().join("a"), here.path(), &prompt(2, 40), None);
        let prompts =
            gneiss::export::read_prompts(&[format!("p={}", here.path().join("a").display())]).unwrap();
        let out = here.path().join("out.gguf");
        let options = gneiss::export::Bake {
            model: here.path(),
            prompts,
            out: &out,
            format: Format::Gguf,
            value_type: None,
        };
        let written = gneiss::export::bake(options, &mut |_, _, _| ());
        (written.map(|written| (written.warnings, TextTokenizer::open(&out).unwrap().stop_token_ids)), ids)
    };
    let (written, ids) = bake(&["<one>", "<|im_end|>", "</s>", "<two>", "<three>"]);
    let (warnings, mut read) = written.unwrap();
    assert!(warnings.is_empty() && read[0] == ids[0], "{warnings:?}");
    let mut expected = ids;
    read.sort_unstable();
    expected.sort_unstable();
    assert_eq!(read, expected);
    let (written, _) = bake(&["</s>", "<one>", "<two>", "<three>"]);
    let error = written.unwrap_err().to_string();
    assert!(error.contains("`<three>` as one more end of a text in GGUF is not supported"), "{error}");
    let (written, _) = bake(&["<one>"]);
    let (warnings, _) = written.unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("`</s>`, `<|im_end|>`"), "{warnings:?}");
}

/// The gguf package reads keys and tensors as they are in the base.
#[test]
fn the_gguf_package_reads_it() {
    let Some(python) = python_with(&["gguf"], "GNEISS_REQUIRE_PEFT") else { return };
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
    let Some(python) = python_with(&["gguf", "transformers"], "GNEISS_REQUIRE_PEFT") else { return };
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
    let Some(python) = python_with(&["llama_cpp"], "GNEISS_REQUIRE_LLAMA_CPP") else { return };
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

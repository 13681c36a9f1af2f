//! Baked folders: what is in the files, and PEFT's logits through gneiss's own reading of them.

use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::TextTokenizer;
use gneiss::export::{Format, PROMPTS, ValueType};
use serde_json::Value;
use std::path::Path;

pub const SETUPS: [Setup; 6] = [
    // The new tokens' ids lie in rows that the base has to spare, the last of them beyond.
    Setup { golden: "granite", tokens: 121, bos: false, class: "PreTrainedTokenizerFast", shards: 1 },
    Setup { golden: "granite", tokens: 131, bos: false, class: "GPT2Tokenizer", shards: 3 },
    Setup { golden: "llama_bias", tokens: 149, bos: true, class: "PreTrainedTokenizerFast", shards: 1 },
    Setup { golden: "hybrid_dense", tokens: 127, bos: true, class: "PreTrainedTokenizerFast", shards: 2 },
    Setup { golden: "experts", tokens: 133, bos: false, class: "PreTrainedTokenizerFast", shards: 1 },
    Setup { golden: "mamba_experts", tokens: 137, bos: false, class: "PreTrainedTokenizerFast", shards: 2 },
];

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Bytes of a tensor in whichever safetensors file of a folder holds it.
fn tensor(folder: &Path, name: &str) -> Option<Tensor> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files
        .into_iter()
        .find_map(|path| candle_core::safetensors::load(path, &Device::Cpu).unwrap().remove(name))
}

/// PEFT's logits of a golden case, by tokens in front of the text.
#[test]
fn a_baked_folder_gives_the_logits_of_peft() {
    for setup in SETUPS.iter().filter(|setup| setup.tokens >= 127) {
        let here = tempfile::tempdir().unwrap();
        let (model_folder, out) = (here.path().join("base"), here.path().join("out"));
        std::fs::create_dir(&model_folder).unwrap();
        base(&model_folder, setup);
        let golden = golden(setup.golden);
        let case = &golden.json["cases"][0];
        let group = &case["groups"][0];
        let soft = &golden.tensors[group["prompt"].as_str().unwrap()];
        adapter(&here.path().join("a"), &model_folder, soft, None);
        let written = baked(
            &model_folder,
            &[format!("p={}", here.path().join("a").display())],
            &out,
            Format::Safetensors,
            None,
        );
        let vocab = setup.tokens as u32;
        assert_eq!(
            written.prompts["p"]["token_ids"],
            serde_json::json!([vocab, vocab as usize + soft.dims()[0] - 1])
        );
        assert_eq!((written.rounding, written.embedding_type.as_str()), (0.0, "f32"));

        let baked = model(&out);
        let expected = &golden.tensors[case["logits"].as_str().unwrap()];
        let mut row = 0;
        for example in group["examples"].as_array().unwrap() {
            let (input, target) = (ids(&example["input"]), ids(&example["target"]));
            let new = vocab..vocab + soft.dims()[0] as u32;
            let all: Vec<u32> = new.chain(input).chain(target[..target.len() - 1].iter().copied()).collect();
            let found = logits(&baked, &all);
            let found = found.narrow(0, all.len() - target.len(), target.len()).unwrap();
            let wanted = expected.narrow(0, row, target.len()).unwrap();
            let old = found.narrow(1, 0, wanted.dims()[1]).unwrap();
            let worst = difference(&old.contiguous().unwrap(), &wanted);
            assert!(worst < 1e-4, "{}: {worst}", setup.golden);
            row += target.len();
        }
        assert!(row > 3);
    }
}

#[test]
fn rows_are_copied_and_nothing_else_changes() {
    for setup in &SETUPS {
        let here = tempfile::tempdir().unwrap();
        let (model_folder, out) = (here.path().join("base"), here.path().join("out"));
        std::fs::create_dir(&model_folder).unwrap();
        base(&model_folder, setup);
        let width = tensor(&model_folder, "model.embed_tokens.weight").unwrap().dims()[1];
        let (a, b) = (prompt(7, width), prompt(5, width).neg().unwrap());
        adapter(&here.path().join("a"), &model_folder, &a, Some("say {{input}}!"));
        adapter(&here.path().join("b"), &model_folder, &b, None);
        let adapters = ["a", "b"].map(|name| format!("{name}={}", here.path().join(name).display()));
        let written = baked(&model_folder, &adapters, &out, Format::Safetensors, None);

        let rows =
            |t: &Tensor, from: usize, n: usize| t.narrow(0, from, n).unwrap().to_vec2::<f32>().unwrap();
        let first = setup.tokens;
        let (old, new) = ["base", "out"]
            .map(|f| tensor(&here.path().join(f), "model.embed_tokens.weight").unwrap())
            .into();
        assert_eq!(rows(&new, 0, first), rows(&old, 0, first));
        assert_eq!(rows(&new, first, 7), a.to_vec2::<f32>().unwrap());
        assert_eq!(rows(&new, first + 7, 5), b.to_vec2::<f32>().unwrap());
        assert_eq!(new.dims()[0], old.dims()[0].max(first + 12));
        let head = tensor(&out, "lm_head.weight").unwrap();
        let old_head = tensor(&model_folder, "lm_head.weight").unwrap_or(old);
        assert_eq!(rows(&head, 0, first), rows(&old_head, 0, first));
        let unlikely = rows(&head, first, 12);
        assert!(unlikely.iter().all(|row| *row == unlikely[0]) && unlikely[0] == written.unlikely.row);

        for name in gneiss::checkpoint::Weights::open_folder(&model_folder).unwrap().names() {
            if !name.contains("embed_tokens") && !name.contains("lm_head") {
                let [old, new] = [&model_folder, &out].map(|folder| tensor(folder, &name).unwrap());
                assert_eq!(
                    old.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                    new.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                );
            }
        }
        let (mut old, mut new) =
            (json_of(&model_folder.join("config.json")), json_of(&out.join("config.json")));
        assert_eq!(new["vocab_size"], head.dims()[0]);
        assert_eq!(new["tie_word_embeddings"], false);
        for json in [&mut old, &mut new] {
            ["vocab_size", "tie_word_embeddings"].into_iter().for_each(|key| json[key] = Value::Null);
        }
        assert_eq!(old, new);
    }
}

/// `unlikely` is the mean of rows of real tokens, so under the best of them at any state.
#[test]
fn the_heads_row_is_a_mean_of_real_rows() {
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[1]);
    let a = here.path().join("a");
    adapter(&a, here.path(), &prompt(3, 40), None);
    let out = here.path().join("out");
    let written = baked(here.path(), &[format!("p={}", a.display())], &out, Format::Safetensors, None);
    let unlikely = &written.unlikely;
    assert_eq!(unlikely.tokens.len(), 127 / 8);
    let specials_and_end = 0..4;
    assert!(unlikely.tokens.iter().all(|id| !specials_and_end.contains(id) && *id < 131));
    let embedding = tensor(here.path(), "model.embed_tokens.weight").unwrap().to_vec2::<f32>().unwrap();
    for (column, value) in unlikely.row.iter().enumerate() {
        let mean = unlikely.tokens.iter().map(|id| f64::from(embedding[*id as usize][column])).sum::<f64>();
        let mean = mean / unlikely.tokens.len() as f64;
        assert!((f64::from(*value) - mean).abs() < 1e-6);
    }
    // Less likely than a token is on the mean, even of random weights.
    assert!(
        unlikely.states > 100 && unlikely.mean <= unlikely.worst && unlikely.mean < 1.0 / 131.0,
        "{unlikely:?}"
    );
}

#[test]
fn other_types_are_rounded_and_say_so() {
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[2]);
    let a = here.path().join("a");
    let soft = prompt(3, 42);
    adapter(&a, here.path(), &soft, None);
    for (value_type, dtype, name, most) in [
        (ValueType::Bf16, DType::BF16, "bfloat16", 1.0 / 256.0),
        (ValueType::F16, DType::F16, "float16", 1.0 / 2048.0),
    ] {
        let out = here.path().join(name);
        let written =
            baked(here.path(), &[format!("p={}", a.display())], &out, Format::Safetensors, Some(value_type));
        assert!(written.rounding > 0.0 && written.rounding < most, "{}", written.rounding);
        assert_eq!(json_of(&out.join("config.json"))["dtype"], name);
        for tensor in
            candle_core::safetensors::load(out.join("model.safetensors"), &Device::Cpu).unwrap().values()
        {
            assert_eq!(tensor.dtype(), dtype);
        }
        let embedding = tensor(&out, "model.embed_tokens.weight").unwrap();
        let expected = soft.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
        let rows = embedding.narrow(0, 149, 3).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(rows.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }
}

/// The template of `prompts.json` puts a beginning-of-text token behind the prompt, where tuning has it.
#[test]
fn templates_give_the_tokens_of_tuning() {
    for setup in &SETUPS {
        let here = tempfile::tempdir().unwrap();
        base(here.path(), setup);
        let a = here.path().join("a");
        let width = tensor(here.path(), "model.embed_tokens.weight").unwrap().dims()[1];
        adapter(&a, here.path(), &prompt(4, width), Some("say {0, 1} {{input}}!"));
        let out = here.path().join("out");
        baked(here.path(), &[format!("p={}", a.display())], &out, Format::Safetensors, None);
        let listed = json_of(&out.join(PROMPTS))["p"].clone();
        assert_eq!(
            (listed["template_is_exact"].as_bool(), listed["add_special_tokens"].as_bool()),
            (Some(true), Some(false))
        );
        assert_eq!(listed["labels"], serde_json::json!(["0", "1"]));
        let bos = if setup.bos { "<s>" } else { "" };
        let tokens = "<|p:0|><|p:1|><|p:2|><|p:3|>";
        assert_eq!(listed["template"], format!("{tokens}{bos}say {{0, 1}} {{{{input}}}}!"));

        let (before, after) =
            [here.path(), &out].map(|folder| TextTokenizer::from_folder(folder).unwrap()).into();
        let text = listed["template"].as_str().unwrap().replace("{{input}}", "wet dogs 12\n");
        let first = setup.tokens as u32;
        let expected: Vec<u32> =
            (first..first + 4).chain(before.encode("say {0, 1} wet dogs 12\n!", true).unwrap()).collect();
        assert_eq!(after.encode(&text, false).unwrap(), expected);
        assert_eq!(
            after.encode("a<s>b wet </s>", true).unwrap(),
            before.encode("a<s>b wet </s>", true).unwrap()
        );
        assert_eq!(after.decode(&expected[..4], true).unwrap(), "");
        assert_eq!(after.stop_token_ids, before.stop_token_ids);
    }
}

/// A token that tokenizer_config.json alone defines keeps its id, and the new ones follow it.
#[test]
fn configured_tokens_keep_their_ids() {
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[0]);
    let config = here.path().join("tokenizer_config.json");
    let mut json = json_of(&config);
    json["additional_special_tokens"] = serde_json::json!(["<|pad|>", "<|call|>"]);
    std::fs::write(&config, json.to_string()).unwrap();
    let (a, out) = (here.path().join("a"), here.path().join("out"));
    adapter(&a, here.path(), &prompt(3, 40), None);
    baked(here.path(), &[format!("p={}", a.display())], &out, Format::Safetensors, None);
    for (folder, text, expected) in [
        (here.path(), "<|call|>", vec![121]),
        (&out, "<|call|>", vec![121]),
        (&out, "<|p:0|><|p:1|><|p:2|><|call|>", vec![122, 123, 124, 121]),
    ] {
        assert_eq!(TextTokenizer::open(folder).unwrap().encode(text, true).unwrap(), expected);
    }
}

/// A chat template stays where the base has it, in a file or in a list of several, and grows in front.
#[test]
fn chat_templates_grow_in_front() {
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[1]);
    let a = here.path().join("a");
    adapter(&a, here.path(), &prompt(2, 40), None);
    let adapters = [format!("p={}", a.display())];
    let config = here.path().join("tokenizer_config.json");
    let mut json = json_of(&config);
    json["chat_template"] =
        serde_json::json!([{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "\nT"}]);
    std::fs::write(&config, json.to_string()).unwrap();
    let own = "{\"p\": \"<|p:0|><|p:1|>\"}";

    let out = here.path().join("list");
    baked(here.path(), &adapters, &out, Format::Safetensors, None);
    assert!(!out.join("chat_template.jinja").exists());
    for (template, old) in json_of(&out.join("tokenizer_config.json"))["chat_template"]
        .as_array()
        .unwrap()
        .iter()
        .zip([CHAT, "\nT"])
    {
        let text = template["template"].as_str().unwrap();
        assert!(text.ends_with(old) && text.contains(own), "{text}");
    }
    std::fs::write(here.path().join("chat_template.jinja"), "J").unwrap();
    let out = here.path().join("file");
    baked(here.path(), &adapters, &out, Format::Safetensors, None);
    let text = std::fs::read_to_string(out.join("chat_template.jinja")).unwrap();
    assert!(text.ends_with("J") && text.contains(own), "{text}");
    let gguf = here.path().join("x.gguf");
    baked(here.path(), &adapters, &gguf, Format::Gguf, None);
    let file = gneiss::checkpoint::GgufFile::open(&gguf).unwrap();
    assert_eq!(*file.values()["tokenizer.chat_template"].to_string().unwrap(), text);
}

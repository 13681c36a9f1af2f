//! Baked prompts that stand after a text: folder and GGUF file give what gneiss computes with the prompt, and so does transformers.

use crate::bake::SETUPS;
use crate::common::python::python_with;
use crate::fixtures::*;
use candle_core::{Device, Tensor};
use gneiss::batch::{Example, Passes};
use gneiss::checkpoint::chat_template::{Chat, Renderer};
use gneiss::checkpoint::{TextTokenizer, find_chat_template};
use gneiss::data::InputHead;
use gneiss::export::{Format, PROMPTS, PromptEmbeds, prompt_embeds, read_prompts};
use gneiss::prompt::peft::{Adapter, ModelCard, PeftType};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const HEAD: &str = "<|tool|>system: be kind\n";
const VERBALIZER: &str = "<|tool|>system: be kind\nsay {0, 1} {{input}}!";

/// A base, the prompt `p` after [`HEAD`], and the prompt `start`.
struct Place {
    here: tempfile::TempDir,
    tokens: u32,
    adapter: Adapter,
}

impl Place {
    fn new(setup: &Setup) -> Self {
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir(here.path().join("base")).unwrap();
        let model_folder = here.path().join("base");
        base(&model_folder, setup);
        let width = model(&model_folder).config().hidden_size;
        for name in ["p", "start"] {
            adapter(&here.path().join(name), &model_folder, &prompt(4, width), Some(VERBALIZER));
        }
        let mut adapter = Adapter::read(&here.path().join("p")).unwrap();
        let token_ids = TextTokenizer::from_folder(&model_folder).unwrap().encode(HEAD, true).unwrap();
        adapter.prompt = adapter.prompt.after(&token_ids).unwrap();
        adapter.config.peft_type = PeftType::GneissPromptTuning;
        adapter.task.as_mut().unwrap().before = Some(InputHead { text: HEAD.into(), token_ids });
        adapter.write(&here.path().join("p"), &ModelCard::default()).unwrap();
        Self { here, tokens: setup.tokens as u32, adapter }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.here.path().join(name)
    }

    fn bake(&self, name: &str, format: Format) -> PathBuf {
        let adapters = ["p", "start"].map(|adapter| format!("{adapter}={}", self.path(adapter).display()));
        let out = self.path(name);
        let written = baked(&self.path("base"), &adapters, &out, format, None);
        assert!(written.inexact.is_empty(), "{:?}", written.inexact);
        out
    }

    /// Logits after each of the last five tokens of a text, with the prompt in its place.
    fn expected(&self, text: &[u32]) -> Tensor {
        let model = model(&self.path("base"));
        let (input, target) = text.split_at(text.len() - 5);
        let target = target.iter().copied().chain([0]).collect();
        let group = self.adapter.prompt.group(&[Example { input: input.to_vec(), target, line: 1 }]).unwrap();
        let batch = Passes::new(&[group], usize::MAX).prefix_pass;
        let hidden = model.hidden(&batch, self.adapter.prompt.values(), None).unwrap();
        model.logits(&hidden).unwrap()
    }
}

fn listed(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn baked_prompt_stands_after_its_text() {
    for setup in SETUPS.iter().filter(|setup| setup.tokens >= 127) {
        let place = Place::new(setup);
        let tokenizer = TextTokenizer::from_folder(&place.path("base")).unwrap();
        let text = tokenizer.encode(&VERBALIZER.replace("{{input}}", "wet dogs 12\n"), true).unwrap();
        let expected = place.expected(&text);
        let before = place.adapter.prompt.before().len();
        let new = place.tokens..place.tokens + 4;
        let ids: Vec<u32> =
            text[..before].iter().copied().chain(new).chain(text[before..].iter().copied()).collect();
        // gneiss takes Llama 3's rotary factors from GGUF for the values of Meta's models alone.
        let formats = match setup.golden {
            "llama_bias" => &[("out", Format::Safetensors)][..],
            _ => &[("out", Format::Safetensors), ("out.gguf", Format::Gguf)],
        };
        for (name, format) in formats {
            let out = place.bake(name, *format);
            let prompts = match format {
                Format::Safetensors => listed(&out.join(PROMPTS)),
                Format::Gguf => listed(&out.with_extension("prompts.json")),
            };
            let bos = if setup.bos { "<s>" } else { "" };
            let tokens = "<|p:0|><|p:1|><|p:2|><|p:3|>";
            assert_eq!(prompts["p"]["template"], format!("{bos}{HEAD}{tokens}say {{0, 1}} {{{{input}}}}!"));
            assert_eq!((&prompts["p"]["before"], &prompts["start"]["before"]), (&json!(HEAD), &Value::Null));
            assert_eq!(prompts["p"]["template_is_exact"], true, "{name}");
            let model = model(&out);
            let found = logits(&model, &ids).narrow(0, ids.len() - 6, 6).unwrap();
            let found = found.narrow(1, 0, setup.tokens).unwrap().contiguous().unwrap();
            let expected = expected.narrow(1, 0, setup.tokens).unwrap().contiguous().unwrap();
            let worst = difference(&found, &expected);
            assert!(worst < 1e-4, "{}, {name}: {worst}", setup.golden);
            check_chat(&out, setup);
        }
    }
}

/// gneiss's own rendering of the baked chat template.
fn check_chat(out: &Path, setup: &Setup) {
    let renderer = Renderer::new(&find_chat_template(out).unwrap().unwrap()).unwrap();
    let to_jinja = |value: Value| serde_json::from_value::<minijinja::Value>(value).unwrap();
    let render = |system: &str, soft_prompt: Option<&str>| {
        renderer.render(&Chat {
            messages: vec![
                to_jinja(json!({"role": "system", "content": system})),
                to_jinja(json!({"role": "user", "content": "go"})),
            ],
            add_generation_prompt: true,
            kwargs: soft_prompt.map(|name| to_jinja(json!({"soft_prompt": name}))),
        })
    };
    let plain = format!("<s>{HEAD}<|tool|>user: go\n<|tool|>assistant:");
    assert_eq!(render("be kind", None).unwrap(), plain);
    let tokens = |name: &str| (0..4).map(|i| format!("<|{name}:{i}|>")).collect::<String>();
    assert_eq!(render("be kind", Some("start")).unwrap(), tokens("start") + &plain);
    if setup.bos {
        let expected = plain.replacen(HEAD, &format!("{HEAD}{}", tokens("p")), 1);
        assert_eq!(render("be kind", Some("p")).unwrap(), expected);
    }
    let message = render("be brief", Some("p")).unwrap_err();
    assert!(message.contains("expected a conversation that begins with"), "{message}");
}

#[test]
fn transformers_computes_the_same_from_a_baked_prompt_after_its_text() {
    let Some(python) = python_with(&["peft"], "GNEISS_REQUIRE_PEFT") else { return };
    let setups = SETUPS.iter().filter(|setup| ["llama_bias", "mamba_experts"].contains(&setup.golden));
    let places: Vec<(Place, bool)> = setups.map(|setup| (Place::new(setup), setup.bos)).collect();
    let case = |(place, bos): &(Place, bool)| {
        let out = place.bake("out", Format::Safetensors);
        json!({"base": place.path("base"), "baked": out, "adapter": place.path("p"), "bos": bos})
    };
    let cases = Value::Array(places.iter().map(case).collect());
    assert_eq!(script(&python, "after_head.py", &[&cases.to_string()]), "2 checkpoints\n");
}

#[test]
fn prompt_embeds_have_the_prompt_after_its_text() {
    let place = Place::new(&SETUPS[1]);
    let prompts = read_prompts(&[format!("p={}", place.path("p").display())]).unwrap();
    let (model_folder, out) = (place.path("base"), place.path("embeds.pt"));
    let write = |text: Option<&str>| {
        let text = text.map(|text| (model_folder.as_path(), text));
        prompt_embeds(&PromptEmbeds { prompt: &prompts[0], text, out: &out, value_type: None })
    };
    let text = prompts[0].render("dogs").unwrap();
    let ids = TextTokenizer::from_folder(&model_folder).unwrap().encode(&text, true).unwrap();
    assert_eq!(write(Some(&text)).unwrap().rows, ids.len() + 4);
    let found = gneiss::prompt::torch_reader::read(&std::fs::read(&out).unwrap()).unwrap();
    let before = place.adapter.prompt.before().len();
    let rows = |from: usize, n: usize| found.narrow(0, from, n).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(rows(before, 4), place.adapter.prompt.values().to_vec2::<f32>().unwrap());
    let embedding = model(&model_folder).embedding().clone();
    let tokens = embedding.index_select(&Tensor::new(&ids[..], &Device::Cpu).unwrap(), 0).unwrap();
    let tokens = tokens.to_vec2::<f32>().unwrap();
    assert_eq!(
        (rows(0, before), rows(before + 4, ids.len() - before)),
        (tokens[..before].to_vec(), tokens[before..].to_vec())
    );
    assert!(write(None).unwrap_err().to_string().contains("--text: required for p"));
    let message = write(Some("say dogs!")).unwrap_err().to_string();
    assert!(message.contains("--text") && message.contains("be kind"), "{message}");
}

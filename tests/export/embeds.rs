//! Prompt embeddings, as torch reads them.

use crate::bake::SETUPS;
use crate::common::python::python_with;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::export::{PromptEmbeds, ValueType, prompt_embeds, read_prompts};

#[test]
fn torch_loads_what_was_written() {
    let Some(python) = python_with(&["torch"], "GNEISS_REQUIRE_PEFT") else { return };
    let here = tempfile::tempdir().unwrap();
    base(here.path(), &SETUPS[3]);
    let (a, soft) = (here.path().join("a"), prompt(300, 48));
    adapter(&a, here.path(), &soft, Some("say {{input}}!"));
    let prompts = read_prompts(&[a.display().to_string()]).unwrap();
    let text = prompts[0].render("wet 12").unwrap();
    assert_eq!(text, "say wet 12!");
    let tensors =
        candle_core::safetensors::load(tests("golden/hybrid_dense/model.safetensors"), &Device::Cpu).unwrap();
    // A byte or a pair each, behind the token that begins every text: <s> s a y Ġ we t Ġ 1 2 !
    let id = |token: &str| tokenizer_json(127, true)["model"]["vocab"][token].as_u64().unwrap() as u32;
    let ids: Vec<u32> =
        ["<s>", "s", "a", "y", "\u{120}", "w", "e", "t", "\u{120}", "1", "2", "!"].map(id).into();
    let rows = tensors["model.embed_tokens.weight"]
        .index_select(&Tensor::new(ids, &Device::Cpu).unwrap(), 0)
        .unwrap();
    let whole = Tensor::cat(&[&soft, &rows], 0).unwrap();
    for (name, value_type, dtype) in [
        ("float32", None, DType::F32),
        ("float16", Some(ValueType::F16), DType::F16),
        ("bfloat16", Some(ValueType::Bf16), DType::BF16),
    ] {
        for (text, expected) in [(None, &soft), (Some((here.path(), text.as_str())), &whole)] {
            let (out, wanted) = (here.path().join("x.pt"), here.path().join("expected.safetensors"));
            let n =
                prompt_embeds(&PromptEmbeds { prompt: &prompts[0], text, out: &out, value_type }).unwrap();
            assert_eq!(n.rows, expected.dims()[0]);
            let expected = expected.to_dtype(dtype).unwrap();
            candle_core::safetensors::save(&[("x", expected)].into(), &wanted).unwrap();
            script(&python, "embeds.py", &[out.to_str().unwrap(), wanted.to_str().unwrap(), name]);
        }
    }
}

//! A real model, read from GGUF, against transformers that read the same file.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Passes, PrefixGroup, Sequence};
use gneiss::checkpoint::{Checkpoint, TextTokenizer};
use gneiss::config::{InitMethod, PromptOptions};
use gneiss::model::{Decoder, Dtypes};
use gneiss::prompt::Prefix;
use gneiss::prompt::init::initial;
use gneiss::tune::{self, Limits};

pub fn open(dtype: DType) -> (Decoder, TextTokenizer) {
    let Checkpoint { config, weights, tokenizer, .. } =
        Checkpoint::open(&crate::common::smollm2::path()).unwrap();
    let dtypes = Dtypes::for_weights(dtype, &Device::Cpu).unwrap();
    let model = Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
    (model, tokenizer)
}

/// One test, so that the weights are in memory once.
#[test]
fn smollm2_agrees_with_transformers() {
    let (golden, (model, tokenizer)) = (golden("smollm2"), open(DType::F32));
    token_ids(&golden, &tokenizer);
    compare_last_logits(&golden, &model);
    text_init(&golden, &model, &tokenizer);
    prompt_gradient(&golden, &model);
}

fn token_ids(golden: &Golden, tokenizer: &TextTokenizer) {
    let sequences = golden.json["sequences"].as_array().unwrap();
    assert_eq!(sequences.len(), 4);
    for sequence in sequences {
        let text = sequence["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&sequence["ids"]), "{text:?}");
    }
}

/// All four sequences in one pack, with no prompt and no target.
pub fn last_logits(golden: &Golden, model: &Decoder) -> Tensor {
    let sequences = golden.json["sequences"].as_array().unwrap().iter();
    let sequences: Vec<Sequence> =
        sequences.map(|s| Sequence { input: ids(&s["ids"]), target: Vec::new() }).collect();
    let group = PrefixGroup { before: Vec::new(), prompt: 0..0, head: Vec::new(), sequences };
    let batch = Passes::new(&[group], usize::MAX).prefix_pass;
    let no_prompt = Tensor::zeros((0, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
    let tape = model.forward(&batch, &no_prompt, None, 0).unwrap();
    model.logits(tape.hidden()).unwrap()
}

fn compare_last_logits(golden: &Golden, model: &Decoder) {
    let (logits, expected) = (last_logits(golden, model), golden.tensor(&golden.json["last_logits"]));
    assert_eq!(expected.dims(), [4, 49152]);
    assert_tensors_close("last logits", &logits, expected, 1e-3);
    let best = |t: &Tensor| t.argmax(1).unwrap().to_vec1::<u32>().unwrap();
    assert_eq!(best(&logits), best(expected));
}

fn text_init(golden: &Golden, model: &Decoder, tokenizer: &TextTokenizer) {
    let text = golden.json["prompt_text"].as_str().unwrap().to_owned();
    let options =
        PromptOptions { init_method: InitMethod::Text, init_text: text.clone(), ..PromptOptions::default() };
    let prompt_ids = ids(&golden.json["prompt_ids"]);
    assert_eq!(tokenizer.encode(&text, true).unwrap(), prompt_ids);
    let rows = |prompt: &Tensor| prompt.to_vec2::<f32>().unwrap();
    let embeddings = |ids: &[u32]| {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        rows(&model.embedding().index_select(&ids, 0).unwrap())
    };
    let initial = |options: &PromptOptions| initial(options, model, tokenizer, 42).unwrap().values().clone();
    let prompt = initial(&options);
    assert_eq!(rows(&prompt), embeddings(&prompt_ids));
    // transformers dequantises to the same rows: they are the prompt of its case.
    let of_transformers = golden.tensor(&golden.json["cases"][0]["groups"][0]["prompt"]);
    assert_tensors_close("rows of the text", &prompt, of_transformers, 1e-6);
    // Cut, or repeated, to the length asked for.
    for n in [3, prompt_ids.len() + 3] {
        let options = PromptOptions { num_virtual_tokens: n, ..options.clone() };
        let tiled: Vec<u32> = prompt_ids.iter().cycle().take(n).copied().collect();
        assert_eq!(rows(&initial(&options)), embeddings(&tiled));
    }
}

fn prompt_gradient(golden: &Golden, model: &Decoder) {
    let case = &golden.json["cases"][0];
    assert_eq!(case["name"], "peft");
    let (prompts, groups, gradient) = golden.case(case);
    let expected = case["loss"].as_f64().unwrap();
    for max_rows in [usize::MAX, 20] {
        let objective =
            tune::gradient(model, &Prefix::Embeddings(prompts.clone()), &groups, Limits::rows(max_rows))
                .unwrap();
        assert_eq!(objective.target_tokens() as u64, case["target_tokens"].as_u64().unwrap());
        let error = (objective.loss().unwrap() - expected).abs() / expected;
        assert!(error < 1e-3, "loss {}, expected {expected}", objective.loss().unwrap());
        assert_tensors_close("prompt gradient", objective.gradient.unwrap().values(), &gradient, 1e-3);
    }
}

//! Soft prompts that stand after the first tokens of every input, against transformers with embeddings in that order.

use crate::common::close::assert_tensors_close;
use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::batch::{Example, Packing, Passes, PrefixGroup};
use gneiss::evaluate::nll;
use gneiss::generate::{Engine, Event, Request, generate};
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use gneiss::tune::{self, Limits, Mean};
use serde_json::Value;
use std::collections::BTreeMap;

const CHECKPOINTS: [&str; 2] = ["granite", "mamba_experts"];

fn after_head(name: &str) -> Golden {
    let file = |extension: &str| folder("after_head").join(format!("{name}.{extension}"));
    let json = std::fs::read_to_string(file("json")).unwrap();
    let tensors = candle_core::safetensors::load(file("safetensors"), &Device::Cpu).unwrap();
    Golden { json: serde_json::from_str(&json).unwrap(), tensors }
}

fn before(case: &Value, tokens: &[u32]) -> Vec<u32> {
    tokens[..case["before"].as_u64().unwrap() as usize].to_vec()
}

/// The prompts of a case one below the other, the groups that name their rows, and the prompts' gradients.
fn groups(golden: &Golden, case: &Value) -> (Tensor, Vec<PrefixGroup>, Tensor) {
    let (mut prompts, mut groups, mut gradients, mut row) = (vec![], vec![], vec![], 0);
    for group in case["groups"].as_array().unwrap() {
        let prompt = golden.tensor(&group["prompt"]).clone();
        let examples: Vec<Example> = group["examples"].as_array().unwrap().iter().map(example).collect();
        let rows = row..row + prompt.dims()[0] as u32;
        row = rows.end;
        groups.push(PrefixGroup::after(&before(group, &examples[0].input), rows, &examples).unwrap());
        prompts.push(prompt);
        gradients.push(golden.tensor(&group["grad"]).clone());
    }
    (Tensor::cat(&prompts, 0).unwrap(), groups, Tensor::cat(&gradients, 0).unwrap())
}

#[test]
fn logits_loss_and_gradient_agree_with_transformers() {
    for name in CHECKPOINTS {
        let (golden, model) = (after_head(name), model(name, DType::F32));
        let cases = golden.json["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 4);
        for case in cases {
            let what = |part: &str| format!("{name}, {}: {part}", case["name"]);
            let (prompts, groups, gradient) = groups(&golden, case);
            let batch = Passes::new(&groups, usize::MAX).prefix_pass;
            let tape = model.forward(&batch, &prompts, None, 0).unwrap();
            let expected = golden.tensor(&case["logits"]);
            assert_tensors_close(&what("logits"), &model.logits(tape.hidden()).unwrap(), expected, 1e-4);
            let prompts = Prefix::Embeddings(prompts);
            for max_rows in [usize::MAX, 12, 1] {
                let objective = tune::gradient(&model, &prompts, &groups, Limits::rows(max_rows)).unwrap();
                let (ours, loss) = (objective.loss().unwrap(), case["loss"].as_f64().unwrap());
                assert!((ours - loss).abs() < 1e-4 * loss, "{}: {ours} against {loss}", what("loss"));
                let ours = objective.gradient.as_ref().unwrap().values();
                assert_tensors_close(&what(&format!("gradient, {max_rows} rows")), ours, &gradient, 1e-4);
                let evaluated = tune::evaluate(&model, &prompts, &groups, max_rows).unwrap();
                assert_eq!(evaluated.nll().unwrap(), objective.nll().unwrap(), "{}", what("evaluate"));
            }
        }
    }
}

#[test]
fn gradient_is_the_slope_of_the_loss() {
    for name in CHECKPOINTS {
        let (golden, model) = (after_head(name), model(name, DType::F64));
        let case = &golden.json["cases"][2];
        assert_eq!(case["name"], "two_groups");
        let (prompts, groups, _) = groups(&golden, case);
        let prompts = prompts.to_dtype(DType::F64).unwrap();
        let values = prompts.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for max_rows in [usize::MAX, 10] {
            let packing = Packing { max_rows, prefix_pass_rows: 0, long_above: None };
            let passes = Passes::packed(&groups, packing);
            let prefix = Prefix::Embeddings(prompts.clone());
            let gradient =
                tune::gradient_of(&model, &prefix, &passes, 0, Mean::All).unwrap().gradient.unwrap();
            let gradient = gradient.values().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let largest = gradient.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for i in (0..values.len()).step_by(values.len() / 8) {
                let loss = |by: f64| {
                    let mut moved = values.clone();
                    moved[i] += by;
                    let moved = Tensor::from_vec(moved, prompts.shape(), prompts.device()).unwrap();
                    let moved = Prefix::Embeddings(moved);
                    tune::evaluate(&model, &moved, &groups, usize::MAX).unwrap().loss().unwrap()
                };
                let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
                let error = (slope - gradient[i]).abs();
                assert!(error < 1e-7 * largest.max(1.0), "{name}, {i}: {} against {slope}", gradient[i]);
            }
        }
    }
}

/// The prompt of the generation after the tokens before it, and at the start.
struct Generation {
    model: Decoder,
    after: Prefix,
    start: Prefix,
    sequences: Vec<Value>,
}

fn generation(name: &str) -> Generation {
    let golden = after_head(name);
    let case = &golden.json["generate"];
    let sequences = case["sequences"].as_array().unwrap().clone();
    let before = before(case, &ids(&sequences[0]["input"]));
    let start = Prefix::Embeddings(golden.tensor(&case["prompt"]).clone());
    Generation {
        model: model(name, DType::F32),
        after: start.clone().after(&before).unwrap(),
        start,
        sequences,
    }
}

fn request(sequence: &Value) -> Request {
    Request { tokens: ids(&sequence["input"]), max_new_tokens: 6, ..Request::default() }
}

#[test]
fn greedy_continuations_agree_with_transformers() {
    for name in CHECKPOINTS {
        let Generation { model, after, start, sequences } = generation(name);
        for step_rows in [512, 5, 1] {
            let requests = sequences.iter().map(request).collect();
            let ours = generate(&model, Some(&after), requests, step_rows, &mut |_| ()).unwrap();
            for (ours, sequence) in ours.iter().zip(&sequences) {
                assert_eq!(ours.tokens, ids(&sequence["generated"]), "{name}, {step_rows} rows");
            }
        }
        // After a prompt in both places and after none in one batch; several of each, so that heads are shared.
        let mut engine = Engine::new(&model, 400, 16).unwrap();
        let prefixes = [Some(&after), Some(&start), None].map(|prefix| engine.add_prefix(prefix).unwrap());
        let mut expected = BTreeMap::new();
        for sequence in sequences.iter().chain(&sequences).chain(&sequences) {
            let base = generate(&model, None, vec![request(sequence)], 512, &mut |_| ()).unwrap().remove(0);
            let wanted = [ids(&sequence["generated"]), ids(&sequence["at_the_start"]), base.tokens];
            for (prefix, wanted) in prefixes.iter().zip(wanted) {
                expected.insert(engine.submit(*prefix, request(sequence)).unwrap(), wanted);
            }
        }
        let mut found: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        while !engine.is_idle() {
            for (id, event) in engine.step().unwrap().events {
                if let Event::Token(token) = event {
                    found.entry(id).or_default().push(token.id);
                }
            }
        }
        assert_eq!(found, expected, "{name}");
    }
}

/// All tokens are scored, those before the prompt too: the first has no log-probability, as nothing precedes it.
#[test]
fn scores_of_all_tokens_agree_with_transformers() {
    for name in CHECKPOINTS {
        let Generation { model, after, sequences, .. } = generation(name);
        for sequence in &sequences {
            let expected: Vec<f64> =
                sequence["logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            let tokens = ids(&sequence["input"]);
            for scored in [tokens.len(), tokens.len() - 1, tokens.len() - 2, 1] {
                let mut engine = Engine::new(&model, 100, 4).unwrap();
                let prefix = engine.add_prefix(Some(&after)).unwrap();
                engine.submit(prefix, Request { scored, max_new_tokens: 0, ..request(sequence) }).unwrap();
                let mut found = Vec::new();
                while !engine.is_idle() {
                    for (_, event) in engine.step().unwrap().events {
                        if let Event::Scored(tokens) = event {
                            found = tokens;
                        }
                    }
                }
                assert_eq!(
                    found.iter().map(|token| token.id).collect::<Vec<_>>(),
                    tokens[tokens.len() - scored..]
                );
                if scored == tokens.len() {
                    assert_eq!(found.remove(0).logprob, None, "{name}");
                }
                for (token, expected) in found.iter().rev().zip(expected.iter().rev()) {
                    let ours = token.logprob.unwrap();
                    assert!((ours - expected).abs() < 1e-4, "{name}: {ours} against {expected}");
                }
            }
        }
    }
}

#[test]
fn text_that_begins_otherwise_is_refused() {
    let Generation { model, after, sequences, .. } = generation("granite");
    let mut engine = Engine::new(&model, 100, 16).unwrap();
    let prefix = engine.add_prefix(Some(&after)).unwrap();
    let tokens = ids(&sequences[2]["input"]);
    let other = vec![(tokens[0] + 1) % 7, tokens[1], tokens[2], tokens[3]];
    let embeds = Tensor::zeros((4, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
    for (tokens, embeds) in [(other.clone(), None), (tokens[..3].to_vec(), None), (vec![], Some(embeds))] {
        let request = Request { tokens, embeds, ..Request::default() };
        let message = engine.submit(prefix, request).unwrap_err().to_string();
        assert!(
            message.contains("after_head") && message.contains(&format!("{:?}", after.before())),
            "{message}"
        );
    }
    let example = |input: &[u32]| Example { input: input.to_vec(), target: vec![1], line: 7 };
    let message =
        nll(&model, Some(&after), &[example(&tokens), example(&other)], 64, &mut |_| ()).unwrap_err();
    assert!(message.to_string().contains("line 7"), "{message}");
    // Groups that have the prompt in another place than the prefix.
    let group = PrefixGroup::new(0..after.num_virtual_tokens() as u32, &[example(&tokens)]);
    let message = tune::gradient(&model, &after, &[group], Limits::rows(64)).unwrap_err().to_string();
    assert!(message.contains("before the prompt"), "{message}");
    // Keys and values are given, and nothing stands before them.
    let keys_values = model.keys_values(after.values()).unwrap();
    let message = Prefix::KeysValues(keys_values.clone()).after(after.before()).unwrap_err().to_string();
    assert!(message.contains("prompt.position"), "{message}");
    let group = after.group(&[example(&tokens)]).unwrap();
    let message = tune::evaluate(&model, &Prefix::KeysValues(keys_values), &[group], 64).unwrap_err();
    assert!(message.to_string().contains("keys and values at the start"), "{message}");
}

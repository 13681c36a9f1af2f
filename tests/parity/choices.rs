//! Answers bound to choices, and texts that are embeddings, against transformers.

use crate::fixtures::*;
use candle_core::{DType, Device, Tensor};
use gneiss::generate::{Choices, Engine, Event, PrefixId, Request, Sampling, SequenceId, StopReason};
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens, their log-probabilities, and how it ended.
type Answer = (Vec<u32>, Vec<f64>, Option<StopReason>);

fn run(engine: &mut Engine) -> BTreeMap<SequenceId, Answer> {
    let mut all: BTreeMap<SequenceId, Answer> = BTreeMap::new();
    while !engine.is_idle() {
        for (id, event) in engine.step().unwrap().events {
            let (tokens, logprobs, ended) = all.entry(id).or_default();
            assert_eq!(*ended, None);
            match event {
                Event::Token(token) => {
                    tokens.push(token.id);
                    logprobs.extend(token.logprob);
                }
                Event::Finished(reason) => *ended = Some(reason),
                other => panic!("{other:?}"),
            }
        }
    }
    all
}

fn cases(checkpoint: &str) -> (Vec<Value>, u32) {
    let text = std::fs::read_to_string(folder("choices.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let all = golden["cases"].as_array().unwrap().iter();
    let some: Vec<Value> = all.filter(|case| case["checkpoint"] == checkpoint).cloned().collect();
    assert_eq!(some.len(), 8);
    (some, golden["end"].as_u64().unwrap() as u32)
}

fn prompt(name: &str) -> Tensor {
    let golden = golden(name);
    golden.tensor(&golden.json["generate"]["prompt"]).clone()
}

fn choices(case: &Value, end: u32) -> Arc<Choices> {
    let sequences: Vec<Vec<u32>> = case["choices"].as_array().unwrap().iter().map(ids).collect();
    Arc::new(Choices::new(&sequences, Arc::from([end])))
}

fn embeddings(model: &Decoder, tokens: &[u32]) -> Tensor {
    model.embedding().index_select(&Tensor::new(tokens, &Device::Cpu).unwrap(), 0).unwrap()
}

/// All cases of a checkpoint in one batch beside an answer that is not bound, by tokens and by embeddings.
fn answers_are_those_of_transformers(name: &str) {
    let (model, prompt, (cases, end)) = (model(name, DType::F32), prompt(name), cases(name));
    let mut engine = Engine::new(&model, 400, 24).unwrap();
    let prefixes = [
        engine.add_prefix(None).unwrap(),
        engine.add_prefix(Some(&Prefix::Embeddings(prompt.clone()))).unwrap(),
    ];
    let mut wanted: BTreeMap<SequenceId, (&Value, &str)> = BTreeMap::new();
    for case in &cases {
        let input = ids(&case["input"]);
        let request = Request {
            tokens: input.clone(),
            max_new_tokens: 8,
            choices: Some(choices(case, end)),
            logprobs: Some(0),
            ..Request::default()
        };
        let with_prompt = case["prompt"].as_bool().unwrap();
        let prefix = prefixes[usize::from(with_prompt)];
        wanted.insert(engine.submit(prefix, request.clone()).unwrap(), (case, "tokens"));
        let rows = embeddings(&model, &input);
        let as_embeds =
            |rows: &Tensor| Request { tokens: Vec::new(), embeds: Some(rows.clone()), ..request.clone() };
        wanted.insert(engine.submit(prefix, as_embeds(&rows)).unwrap(), (case, "embeddings"));
        if with_prompt {
            let whole = Tensor::cat(&[&prompt, &rows], 0).unwrap();
            let id = engine.submit(prefixes[0], as_embeds(&whole)).unwrap();
            wanted.insert(id, (case, "prompt and text as embeddings"));
        }
    }
    let free = Request { tokens: ids(&cases[0]["input"]), max_new_tokens: 6, ..Request::default() };
    let free = engine.submit(prefixes[1], free).unwrap();
    let mut answers = run(&mut engine);
    let (unbound, _, reason) = answers.remove(&free).unwrap();
    let golden = golden(name);
    assert_eq!(unbound, ids(&golden.json["generate"]["sequences"][0]["generated"]));
    assert_eq!(reason, Some(StopReason::MaxTokens));
    assert_eq!(answers.len(), 20);
    for (id, (case, how)) in wanted {
        let (tokens, logprobs, reason) = &answers[&id];
        assert_eq!((tokens, *reason), (&ids(&case["answer"]), Some(StopReason::StopToken)), "{how}: {case}");
        let expected: Vec<f64> =
            case["logprobs"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(logprobs.len(), expected.len());
        for (ours, expected) in logprobs.iter().zip(&expected) {
            assert!((ours - expected).abs() < 1e-3, "{how}: {ours} and {expected}: {case}");
        }
    }
}

#[test]
fn choices_of_granite() {
    answers_are_those_of_transformers("granite");
}

#[test]
fn choices_of_llama_with_biases() {
    answers_are_those_of_transformers("llama_bias");
}

/// What is given back of a request's block lets hundreds through a cache for two; so does what a request leaves that
/// is cancelled, or that can't begin.
#[test]
fn embeddings_give_their_rows_back() {
    let (model, prompt) = (model("granite", DType::F32), prompt("granite"));
    let rows = embeddings(&model, &[50, 4, 9]);
    let request = |n| Request { embeds: Some(rows.clone()), max_new_tokens: n, ..Request::default() };
    let mut engine = Engine::new(&model, 5 + 2 * (5 + 3 + 5), 64).unwrap();
    let prefix: PrefixId = engine.add_prefix(Some(&Prefix::Embeddings(prompt.clone()))).unwrap();
    let alone = engine.submit(prefix, request(6)).unwrap();
    let expected = run(&mut engine).remove(&alone).unwrap();
    assert_eq!((expected.0.len(), expected.2), (6, Some(StopReason::MaxTokens)));
    for _ in 0..20 {
        let ids: Vec<SequenceId> = (0..5).map(|_| engine.submit(prefix, request(6)).unwrap()).collect();
        engine.step().unwrap();
        engine.cancel(ids[0]);
        let one = engine.submit(prefix, request(1)).unwrap();
        let answers = run(&mut engine);
        ids[2..].iter().for_each(|id| assert_eq!(answers[id], expected));
        assert_eq!(answers[&one].0, expected.0[..1]);
    }
    for (embeds, tokens, words) in [
        (Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(), vec![], "expected embeddings [T, "),
        (rows.clone(), vec![1], "without tokens"),
        (rows.narrow(0, 0, 0).unwrap(), vec![], "at least one token"),
    ] {
        let request = Request { embeds: Some(embeds), tokens, ..Request::default() };
        let error = engine.submit(prefix, request).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Draws of the same choices by several seeds: all are choices, and more than one.
#[test]
fn drawn_answers_are_choices() {
    let (model, (cases, end)) = (model("granite", DType::F32), cases("granite"));
    let mut engine = Engine::new(&model, 400, 64).unwrap();
    let prefix = engine.add_prefix(None).unwrap();
    let case = &cases[2];
    for seed in 0..24 {
        let sampling = Sampling { temperature: 1.8, seed, ..Sampling::default() };
        let request = Request {
            tokens: ids(&case["input"]),
            max_new_tokens: 8,
            min_new_tokens: if seed % 2 == 0 { 0 } else { 2 },
            sampling,
            stop_token_ids: if seed % 3 == 0 { Arc::from([]) } else { Arc::from([end]) },
            choices: Some(choices(case, end)),
            ..Request::default()
        };
        engine.submit(prefix, request).unwrap();
    }
    let sequences: Vec<Vec<u32>> = case["choices"].as_array().unwrap().iter().map(ids).collect();
    let mut seen = std::collections::BTreeSet::new();
    for (tokens, _, reason) in run(&mut engine).into_values() {
        assert!(sequences.contains(&tokens), "{tokens:?} is none of {sequences:?}");
        assert_eq!(reason, Some(StopReason::StopToken));
        seen.insert(tokens);
    }
    assert!(seen.len() > 1);
    let beyond = Arc::new(Choices::new(&[vec![1_000_000]], Arc::from([end])));
    let request = Request { tokens: vec![1], choices: Some(beyond), ..Request::default() };
    assert!(engine.submit(prefix, request).unwrap_err().to_string().contains("found 1000000"));
}

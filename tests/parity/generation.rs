//! Greedy continuations against transformers', alone, together and behind several prompts in one batch.

use crate::fixtures::*;
use candle_core::{DType, Tensor};
use gneiss::batch::Example;
use gneiss::evaluate::nll;
use gneiss::generate::{Engine, Event, Generated, PrefixId, Request, SequenceId, StopReason, generate};
use gneiss::model::Decoder;
use gneiss::prompt::Prefix;
use std::collections::BTreeMap;

struct Wanted {
    input: Vec<u32>,
    generated: Vec<u32>,
}

struct Fixture {
    model: Decoder,
    prompt: Tensor,
    wanted: Vec<Wanted>,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let (golden, model) = (golden(name), model(name, DType::F32));
        let case = &golden.json["generate"];
        let sequences = case["sequences"].as_array().unwrap();
        let wanted: Vec<Wanted> = sequences
            .iter()
            .map(|s| Wanted { input: ids(&s["input"]), generated: ids(&s["generated"]) })
            .collect();
        assert_eq!(wanted.len(), 4);
        let prompt = golden.tensor(&case["prompt"]).clone();
        assert_eq!(prompt.dims()[0] as u64, case["num_virtual_tokens"].as_u64().unwrap());
        assert!(wanted.iter().all(|w| w.generated.len() as u64 == case["max_new_tokens"].as_u64().unwrap()));
        Self { model, prompt, wanted }
    }

    fn requests(&self) -> Vec<Request> {
        let request = |w: &Wanted| Request {
            tokens: w.input.clone(),
            max_new_tokens: w.generated.len(),
            ..Request::default()
        };
        self.wanted.iter().map(request).collect()
    }

    fn generate(&self, requests: Vec<Request>, step_rows: usize) -> Vec<Generated> {
        generate(
            &self.model,
            Some(&Prefix::Embeddings(self.prompt.clone())),
            requests,
            step_rows,
            &mut |_| (),
        )
        .unwrap()
    }

    fn same(&self, what: &str, ours: &[Generated]) {
        assert_eq!(ours.len(), self.wanted.len());
        for (ours, wanted) in ours.iter().zip(&self.wanted) {
            assert_eq!(ours.tokens, wanted.generated, "{what}, behind {:?}", wanted.input);
            assert_eq!(ours.stop_reason, StopReason::MaxTokens);
        }
    }
}

/// All tokens of each request, and how it ended.
fn run(engine: &mut Engine) -> BTreeMap<SequenceId, (Vec<u32>, Option<StopReason>)> {
    let mut all: BTreeMap<SequenceId, (Vec<u32>, Option<StopReason>)> = BTreeMap::new();
    while !engine.is_idle() {
        for (id, event) in engine.step().unwrap().events {
            let (tokens, ended) = all.entry(id).or_default();
            assert_eq!(*ended, None);
            match event {
                Event::Token(token) => tokens.push(token.id),
                Event::Finished(reason) => *ended = Some(reason),
                other => panic!("{other:?}"),
            }
        }
    }
    all
}

fn continuations(name: &str) {
    let fixture = Fixture::new(name);
    let alone: Vec<Generated> = fixture
        .requests()
        .into_iter()
        .map(|request| fixture.generate(vec![request], 512).remove(0))
        .collect();
    fixture.same("alone", &alone);
    fixture.same("together", &fixture.generate(fixture.requests(), 512));
    for step_rows in [1, 2, 5] {
        fixture.same("in parts", &fixture.generate(fixture.requests(), step_rows));
    }
    stops_in_time(&fixture);
    joins_and_leaves(&fixture);
    heads_change_nothing(&fixture);
}

/// With the third token of a continuation as a stop token, only what is before its first appearance is left; with a
/// least length it comes later, or never.
fn stops_in_time(fixture: &Fixture) {
    for (request, wanted) in fixture.requests().into_iter().zip(&fixture.wanted) {
        let stop = wanted.generated[2];
        let request = Request { stop_token_ids: [stop].into(), ..request };
        let ours = fixture.generate(vec![request.clone()], 512).remove(0);
        let before: Vec<u32> = wanted.generated.iter().take_while(|t| **t != stop).copied().collect();
        assert_eq!((&ours.tokens, ours.stop_reason), (&before, StopReason::StopToken), "stop {stop}");
        let longer =
            fixture.generate(vec![Request { min_new_tokens: before.len() + 1, ..request }], 512).remove(0);
        assert!(longer.tokens.len() > before.len());
        assert_eq!(longer.tokens[..before.len()], before);
        assert_ne!(longer.tokens[before.len()], stop);
    }
}

/// Requests behind a prompt, behind its rows backwards and behind none, in one batch that others join, in a cache that
/// holds about two of them at a time.
fn joins_and_leaves(fixture: &Fixture) {
    let backwards: Vec<u32> = (0..fixture.prompt.dims()[0] as u32).rev().collect();
    let backwards =
        fixture.prompt.index_select(&Tensor::new(backwards, fixture.prompt.device()).unwrap(), 0).unwrap();
    let [prompt, backwards] = [&fixture.prompt, &backwards].map(|rows| Prefix::Embeddings(rows.clone()));
    let prompts = [Some(&prompt), Some(&backwards), None];
    let alone: Vec<Vec<Vec<u32>>> = prompts
        .iter()
        .map(|prompt| {
            let one = |request| {
                generate(&fixture.model, *prompt, vec![request], 512, &mut |_| ()).unwrap().remove(0)
            };
            fixture.requests().into_iter().map(|request| one(request).tokens).collect()
        })
        .collect();
    assert_ne!(alone[0], alone[2], "a prompt that changes nothing shows nothing");
    let most = fixture.requests().iter().map(|r| r.tokens.len() + r.max_new_tokens).max().unwrap();
    let mut engine = Engine::new(&fixture.model, 2 * fixture.prompt.dims()[0] + 2 * most + 3, 16).unwrap();
    let ids: Vec<PrefixId> = prompts.iter().map(|prompt| engine.add_prefix(*prompt).unwrap()).collect();
    let mut expected = BTreeMap::new();
    let mut found = BTreeMap::new();
    for (i, request) in fixture.requests().into_iter().enumerate() {
        for (prefix, alone) in ids.iter().zip(&alone) {
            let id = engine.submit(*prefix, request.clone()).unwrap();
            expected.insert(id, alone[i].clone());
        }
        // Others join while these are under way.
        for (id, event) in engine.step().unwrap().events {
            if let Event::Token(token) = event {
                found.entry(id).or_insert_with(Vec::new).push(token.id);
            }
        }
    }
    let cancelled = engine.submit(ids[0], fixture.requests().remove(0)).unwrap();
    engine.cancel(cancelled);
    for (id, (tokens, _)) in run(&mut engine) {
        found.entry(id).or_insert_with(Vec::new).extend(tokens);
    }
    assert_eq!(found, expected);
}

/// The same with a beginning of each text computed once for all.
fn heads_change_nothing(fixture: &Fixture) {
    let mut engine = Engine::new(&fixture.model, 2000, 64).unwrap();
    let prefix = engine.add_prefix(Some(&Prefix::Embeddings(fixture.prompt.clone()))).unwrap();
    for wanted in &fixture.wanted {
        for n in [1, wanted.input.len() - 1, wanted.input.len()] {
            engine.share_head(prefix, &wanted.input[..n]).unwrap();
        }
    }
    let ids: Vec<_> = fixture.requests().into_iter().map(|r| engine.submit(prefix, r).unwrap()).collect();
    let all = run(&mut engine);
    for (id, wanted) in ids.iter().zip(&fixture.wanted) {
        assert_eq!(all[id].0, wanted.generated);
    }
}

#[test]
fn granite_continues_as_transformers_does() {
    continuations("granite");
}

#[test]
fn llama_with_biases_continues_as_transformers_does() {
    continuations("llama_bias");
}

#[test]
fn dense_granitemoehybrid_continues_as_transformers_does() {
    continuations("hybrid_dense");
}

#[test]
fn experts_continue_as_transformers_does() {
    continuations("experts");
    continuations("shared_experts");
}

#[test]
fn mamba_continues_as_transformers_does() {
    continuations("mamba");
    continuations("mamba_experts");
    continuations("mamba_groups");
}

/// Scores of a text's last tokens are the losses that PEFT is held against (tests/parity/peft.rs), whatever head is
/// shared and however many rows go through at a time.
#[test]
fn scores_are_negative_losses() {
    let fixture = Fixture::new("granite");
    let prompt = Prefix::Embeddings(fixture.prompt.clone());
    for (wanted, prompt) in fixture.wanted.iter().zip([Some(&prompt), None].into_iter().cycle()) {
        let example = Example { input: wanted.input.clone(), target: wanted.generated.clone(), line: 1 };
        let losses = nll(&fixture.model, prompt, &[example], 512, &mut |_| ()).unwrap();
        let tokens = [wanted.input.as_slice(), &wanted.generated].concat();
        for (step_rows, scored) in
            [(512, wanted.generated.len()), (3, wanted.generated.len()), (4, tokens.len())]
        {
            let mut engine = Engine::new(&fixture.model, 500, step_rows).unwrap();
            let prefix = engine.add_prefix(prompt).unwrap();
            engine.share_head(prefix, &tokens[..2]).unwrap();
            let request = Request {
                tokens: tokens.clone(),
                scored,
                max_new_tokens: 0,
                logprobs: Some(3),
                ..Request::default()
            };
            let id = engine.submit(prefix, request).unwrap();
            let mut events = Vec::new();
            while !engine.is_idle() {
                events.extend(engine.step().unwrap().events);
            }
            let (of, Event::Scored(scores)) = &events[0] else { panic!("{events:?}") };
            assert_eq!((*of, scores.len()), (id, scored));
            assert_eq!(events[1..], [(id, Event::Finished(StopReason::MaxTokens))]);
            assert_eq!(scores.iter().map(|t| t.id).collect::<Vec<_>>(), tokens[tokens.len() - scored..]);
            let last = &scores[scored - losses.len()..];
            for (score, loss) in last.iter().zip(&losses) {
                assert!((score.logprob.unwrap() + loss).abs() < 1e-4, "{score:?}, loss {loss}");
                assert_eq!(score.top.len(), 3);
                assert!(score.top[0].1 >= score.logprob.unwrap());
            }
            // Before a text's first token stand the virtual tokens, or nothing.
            assert_eq!(scores[0].logprob.is_some(), prompt.is_some() || scored < tokens.len());
        }
    }
}

#[test]
fn a_request_that_can_not_be_served_is_refused() {
    let fixture = Fixture::new("granite");
    let mut engine = Engine::new(&fixture.model, 40, 16).unwrap();
    let prefix = engine.add_prefix(Some(&Prefix::Embeddings(fixture.prompt.clone()))).unwrap();
    let request = |tokens: &[u32], max_new_tokens| Request {
        tokens: tokens.to_vec(),
        max_new_tokens,
        ..Request::default()
    };
    for (request, expected) in [
        (request(&[], 1), "at least one token"),
        (request(&[1_000_000], 1), "token ids under"),
        (request(&[1], 0), "something to generate"),
        (request(&[1], 60), "rows of keys and values"),
        (request(&[1], 1_000_000), "positions"),
        (Request { scored: 3, ..request(&[1], 1) }, "up to 1 tokens to score"),
    ] {
        let error = engine.submit(prefix, request).unwrap_err();
        assert!(error.is_bad_input());
        assert!(error.to_string().contains(expected), "{error}");
    }
    engine.remove_prefix(prefix);
    assert!(engine.submit(prefix, request(&[1], 1)).unwrap_err().to_string().contains("unloaded"));
    // Its rows are free again.
    assert!(engine.add_prefix(Some(&Prefix::Embeddings(fixture.prompt.clone()))).is_ok());
    let wide = Tensor::cat(&[&fixture.prompt; 12], 0).unwrap();
    assert!(
        engine
            .add_prefix(Some(&Prefix::Embeddings(wide.clone())))
            .unwrap_err()
            .to_string()
            .contains("free rows")
    );
}

#[test]
fn a_deadline_ends_what_waits_and_what_runs() {
    let fixture = Fixture::new("granite");
    let mut engine = Engine::new(&fixture.model, 200, 16).unwrap();
    let prefix = engine.add_prefix(None).unwrap();
    let now = std::time::Instant::now();
    let past = Request { tokens: vec![1], max_new_tokens: 9, deadline: Some(now), ..Request::default() };
    let later = Request {
        deadline: Some(now + std::time::Duration::from_millis(60)),
        max_new_tokens: 150,
        ..past.clone()
    };
    let (past, later) = (engine.submit(prefix, past).unwrap(), engine.submit(prefix, later).unwrap());
    let first = engine.step().unwrap().events;
    assert_eq!(first[0], (past, Event::Finished(StopReason::TimeLimit)));
    assert!(matches!(first[1], (id, Event::Token(_)) if id == later), "{first:?}");
    std::thread::sleep(std::time::Duration::from_millis(80));
    assert_eq!(engine.step().unwrap().events, [(later, Event::Finished(StopReason::TimeLimit))]);
    assert!(engine.is_idle());
}

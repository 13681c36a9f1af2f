//! Generation on a device that runs out of memory.

use super::*;
use crate::batch::Example;
use crate::checkpoint::Checkpoint;
use crate::device::{Work, faults};
use crate::evaluate::nll;
use crate::model::{Decoding, Dtypes};
use candle_core::{DType, Device};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

fn model() -> Decoder {
    golden("granite")
}

fn golden(name: &str) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

fn request(seed: u32) -> Request {
    let tokens = (0..5 + seed % 4).map(|i| (seed * 7 + i * 3) % 90).collect();
    Request { tokens, max_new_tokens: 3 + seed as usize % 3, ..Request::default() }
}

/// What `generate` gives, and the rows that it was calls of, on a device where `fails` says so.
fn with(
    model: &Decoder,
    fails: impl FnMut(Work, usize) -> bool + 'static,
) -> (Result<Vec<Generated>>, Vec<usize>) {
    let mut rows = Vec::new();
    let prompt = Prefix::Embeddings(model.embedding().narrow(0, 10, 2).unwrap());
    let requests = (0..8).map(request).collect();
    let generated = faults::with(fails, || {
        generate(model, Some(&prompt), requests, 32, &mut |done| rows.push(done.max_rows))
    });
    rows.dedup();
    (generated, rows)
}

#[test]
fn generate_goes_on_with_fewer_rows_and_the_same_tokens() {
    let model = model();
    let (expected, rows) = with(&model, |_, _| false);
    let expected = expected.unwrap();
    assert_eq!(rows, [32]);
    // Passes of at most 5 rows fit; of two; logits of two rows at a time; of one.
    let cases: [(Work, usize, usize); 4] =
        [(Work::Pass, 5, 4), (Work::Pass, 2, 2), (Work::Logits, 2, 32), (Work::Logits, 1, 32)];
    for (what, most, last) in cases {
        let seen = Rc::new(RefCell::new(0));
        let failed = seen.clone();
        let (found, rows) = with(&model, move |work, rows| {
            let fails = work == what && rows > most;
            *failed.borrow_mut() += usize::from(fails);
            fails
        });
        assert_eq!(found.unwrap(), expected, "{what:?}, {most}");
        assert!(*seen.borrow() > 0 && *rows.last().unwrap() == last, "{what:?}, {most}: {rows:?}");
    }
}

/// A pass that fails before a Mamba2 layer has written its state is run again; after that, its requests end, and later ones are
/// answered as ever.
#[test]
fn a_pass_that_changed_states_is_not_run_again() {
    let model = golden("mamba");
    let (expected, _) = with(&model, |_, _| false);
    let (found, rows) = with(&model, |work, rows| work == Work::Pass && rows > 5);
    assert_eq!(found.unwrap(), expected.unwrap());
    assert_eq!(rows.last(), Some(&4));

    let answer = |engine: &mut Engine, prefix| {
        let id = engine.submit(prefix, request(3)).unwrap();
        let mut tokens = Vec::new();
        while !engine.is_idle() {
            for (of, event) in engine.step().unwrap().events {
                match event {
                    Event::Token(token) if of == id => tokens.push(token.id),
                    Event::Finished(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        tokens
    };
    let prompt = Prefix::Embeddings(model.embedding().narrow(0, 10, 2).unwrap());
    let mut engine = Engine::new(&model, 200, 32).unwrap();
    let prefix = engine.add_prefix(Some(&prompt)).unwrap();
    let expected = answer(&mut engine, prefix);
    let ids = [1, 2].map(|seed| engine.submit(prefix, request(seed)).unwrap());
    engine.step().unwrap();
    let output = faults::with(|work, _| work == Work::Logits, || engine.step().unwrap());
    let ended: Vec<_> =
        output.events.iter().filter(|(_, event)| matches!(event, Event::NoMemory(_))).collect();
    assert_eq!((ended.len(), engine.running().len()), (2, 0), "{output:?}");
    assert!(ids.iter().all(|id| ended.iter().any(|(ended, _)| ended == id)), "{output:?}");
    assert_eq!(answer(&mut engine, prefix), expected);
}

/// Padded decoding steps: the same tokens, whether they are chosen by the largest logit or drawn, and the same log-probabilities
/// but for the last digits, since a product of other rows adds up in another order.
#[test]
fn padded_steps_give_the_same_answers() {
    let model = model();
    let prompt = Prefix::Embeddings(model.embedding().narrow(0, 10, 2).unwrap());
    let answers = |decoding: Option<Decoding>| {
        let mut engine = Engine::with_decoding(&model, (300, 24), decoding).unwrap();
        let prefixes = [Some(&prompt), None].map(|prompt| engine.add_prefix(prompt).unwrap());
        for seed in 0..11 {
            let mut request = Request { max_new_tokens: 4 + seed as usize % 5, ..request(seed) };
            request.sampling.temperature = f64::from(seed % 3) / 2.0;
            request.logprobs = (seed % 4 == 0).then_some(2);
            engine.submit(prefixes[seed as usize % 2], request).unwrap();
        }
        let mut events = Vec::new();
        while !engine.is_idle() {
            events.extend(engine.step().unwrap().events);
        }
        events
    };
    let (expected, found) = (answers(None), answers(Some(Decoding::padded())));
    assert!(expected.len() > 60 && found.len() == expected.len(), "{expected:?}");
    for (found, expected) in found.iter().zip(&expected) {
        match (found, expected) {
            ((a, Event::Token(found)), (b, Event::Token(expected))) => {
                assert_eq!((a, found.id), (b, expected.id));
                let close = |a: f64, b: f64| (a - b).abs() < 1e-5;
                assert!(
                    close(found.logprob.unwrap_or(0.0), expected.logprob.unwrap_or(0.0)),
                    "{found:?}, {expected:?}"
                );
            }
            _ => assert_eq!(found, expected),
        }
    }
}

#[test]
fn generate_takes_fewer_requests_where_the_cache_does_not_fit() {
    let model = model();
    let (expected, _) = with(&model, |_, _| false);
    let (found, rows) = with(&model, |work, rows| work == Work::Cache && rows > 40);
    assert_eq!(found.unwrap(), expected.unwrap());
    assert!(rows.len() == 1 && rows[0] < 32, "{rows:?}");
}

#[test]
fn generate_says_that_nothing_fits() {
    let model = model();
    for what in [Work::Pass, Work::Logits, Work::Cache] {
        let (found, _) = with(&model, move |work, _| work == what);
        assert!(matches!(found, Err(Error::OutOfMemory { .. })), "{what:?}: {found:?}");
    }
}

#[test]
fn nll_takes_smaller_passes() {
    let model = model();
    let prompt = Prefix::Embeddings(model.embedding().narrow(0, 10, 2).unwrap());
    let example = |i: u32| Example {
        input: (0..4 + i % 3).map(|j| (i * 13 + j * 7) % 90).collect(),
        target: vec![5 + i % 3, 9],
        line: 1,
    };
    let examples: Vec<Example> = (0..15).map(example).collect();
    let at = |most: usize| {
        let mut calls = Vec::new();
        let found = faults::with(
            move |work, rows| work == Work::Pass && rows > most,
            || nll(&model, Some(&prompt), &examples, 16, &mut |done| calls.push((done.texts, done.max_rows))),
        );
        (found, calls)
    };
    let (expected, calls) = at(1000);
    let expected = expected.unwrap();
    assert!(calls.len() == 1 && calls[0] == (15, 16), "{calls:?}");
    let (found, calls) = at(9);
    for (found, expected) in found.unwrap().iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5 * expected, "{found} for {expected}");
    }
    assert_eq!(calls, [(15, 8)]);
    assert!(matches!(at(1).0, Err(Error::OutOfMemory { .. })));
}

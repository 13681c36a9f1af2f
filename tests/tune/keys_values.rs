//! Prompts that are keys and values (prefix tuning).

use super::passes::load_f64;
use super::recompute::groups;
use super::*;
use gneiss::generate::{Engine, Event, Request, SequenceId, generate};
use gneiss::model::keys_values_width;
use gneiss::prompt::Prefix;
use std::collections::BTreeMap;

const DENSE: [&str; 5] = ["granite", "llama_bias", "hybrid_dense", "experts", "shared_experts"];
const MAMBA: [&str; 3] = ["mamba", "mamba_experts", "mamba_groups"];

/// The keys and values that a model makes of the prompt of each group.
fn keys_values(model: &Decoder, prompts: &Tensor, groups: &[PrefixGroup]) -> Prefix {
    let own = groups.iter().map(|group| {
        let rows = prompts.narrow(0, group.prompt.start as usize, group.prompt.len()).unwrap();
        model.keys_values(&rows).unwrap()
    });
    Prefix::KeysValues(Tensor::cat(&own.collect::<Vec<_>>(), 0).unwrap())
}

/// The same groups, of which those that `keeps` does not name have no head: their sequences hold its tokens.
fn without_heads(groups: &[PrefixGroup], keeps: impl Fn(usize) -> bool) -> Vec<PrefixGroup> {
    let mut groups = groups.to_vec();
    for (_, group) in groups.iter_mut().enumerate().filter(|(i, _)| !keeps(*i)) {
        for sequence in &mut group.sequences {
            sequence.input = [&group.head[..], &sequence.input].concat();
        }
        group.head.clear();
    }
    groups
}

/// All groups with heads, the first alone, and none.
fn variants(groups: &[PrefixGroup]) -> [Vec<PrefixGroup>; 3] {
    [groups.to_vec(), without_heads(groups, |i| i == 0), without_heads(groups, |_| false)]
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The tokens of all requests of an engine.
fn answers(engine: &mut Engine) -> BTreeMap<SequenceId, Vec<u32>> {
    let mut answers = BTreeMap::<_, Vec<u32>>::new();
    while !engine.is_idle() {
        for (sequence, event) in engine.step().unwrap().events {
            if let Event::Token(token) = event {
                answers.entry(sequence).or_default().push(token.id);
            }
        }
    }
    answers
}

#[test]
fn keys_and_values_of_a_prompt_are_that_prompt() {
    for name in DENSE {
        let model = load_f64(name);
        for n in [1, 3] {
            let (prompts, groups) = groups(&model, n);
            assert!(groups.iter().all(|group| group.head.len() == 2), "{groups:?}");
            let prefix = keys_values(&model, &prompts, &groups);
            assert_eq!(prefix.values().dims()[1], keys_values_width(model.config()));
            let expected = tune::evaluate(&model, &Prefix::Embeddings(prompts), &groups, usize::MAX).unwrap();
            let expected = expected.nll().unwrap();
            for groups in variants(&groups) {
                for max_rows in [usize::MAX, 30, 1] {
                    let found = tune::evaluate(&model, &prefix, &groups, max_rows).unwrap().nll().unwrap();
                    let mut sorted = [found.clone(), expected.clone()];
                    // With other passes the tokens stand in another order.
                    sorted.iter_mut().for_each(|nll| nll.sort_by(f64::total_cmp));
                    let far = largest_difference(&sorted[0], &sorted[1]);
                    assert!(far < 1e-10, "{name}, {n} groups, {max_rows} rows: {far}");
                }
            }
        }
    }
}

/// In one pass after the heads' and in several, with groups that have heads and that have none.
#[test]
fn gradient_of_keys_and_values_is_the_slope_of_the_loss() {
    for name in DENSE.into_iter().chain(MAMBA) {
        let model = load_f64(name);
        let (prompts, groups) = groups(&model, 3);
        let prefix = keys_values(&model, &prompts, &groups);
        let values = prefix.values().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mut first: Option<Vec<f64>> = None;
        for groups in variants(&groups) {
            for max_rows in [usize::MAX, 30, 1] {
                let limits = Limits { max_rows, recompute: 0 };
                let gradient = tune::gradient(&model, &prefix, &groups, limits).unwrap().gradient.unwrap();
                assert_eq!(gradient.values().dims(), prefix.values().dims());
                let gradient = gradient.values().flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let far = largest_difference(&gradient, first.get_or_insert_with(|| gradient.clone()));
                assert!(far < 1e-12, "{name}, {max_rows} rows: {far}");
            }
        }
        let gradient = first.unwrap();
        let largest = gradient.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert!(largest > 1e-6, "{name}: {largest}");
        for i in (0..values.len()).step_by(values.len() / 40) {
            let loss = |by: f64| {
                let mut moved = values.clone();
                moved[i] += by;
                let moved = Tensor::from_vec(moved, prefix.values().shape(), &Device::Cpu).unwrap();
                tune::evaluate(&model, &Prefix::KeysValues(moved), &groups, usize::MAX)
                    .unwrap()
                    .loss()
                    .unwrap()
            };
            let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
            let far = (slope - gradient[i]).abs();
            assert!(
                far < 1e-7 * largest.max(1.0),
                "{name}: element {i} is {}, the slope {slope}",
                gradient[i]
            );
        }
    }
}

#[test]
fn recomputed_layers_change_no_bit_of_the_gradient_of_keys_and_values() {
    for name in ["granite", "mamba_experts"] {
        let model = load(name);
        let (prompts, groups) = groups(&model, 3);
        let prefix = keys_values(&model, &prompts, &groups);
        for groups in variants(&groups) {
            for max_rows in [usize::MAX, 30] {
                let run = |recompute| {
                    let limits = Limits { max_rows, recompute };
                    let objective = tune::gradient(&model, &prefix, &groups, limits).unwrap();
                    (objective.nll().unwrap(), bits(objective.gradient.unwrap().values()))
                };
                let all_kept = run(0);
                for recompute in 1..=model.config().num_hidden_layers {
                    assert!(run(recompute) == all_kept, "{name}, {max_rows} rows, {recompute} layers");
                }
            }
        }
    }
}

/// Greedy, with a head that all share and without one.
#[test]
fn keys_and_values_are_continued_as_the_prompt() {
    for name in DENSE {
        let model = load(name);
        let (prompts, groups) = groups(&model, 1);
        let prefix = keys_values(&model, &prompts, &groups);
        let vocab = model.config().vocab_size as u32;
        for shared in [0, 5] {
            let request = |i: u32| Request {
                tokens: (0..shared).chain([i + 1, i * 7 + 2, 3]).map(|id| id % vocab).collect(),
                max_new_tokens: 8,
                ..Request::default()
            };
            let run = |prompt: &Prefix| {
                let requests = (0..6).map(request).collect();
                let answers = generate(&model, Some(prompt), requests, 64, &mut |_| ()).unwrap();
                answers.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>()
            };
            assert_eq!(
                run(&prefix),
                run(&Prefix::Embeddings(prompts.clone())),
                "{name}, {shared} shared tokens"
            );
        }
    }
}

/// Requests after keys and values, after embeddings and after no prompt, in one batch.
#[test]
fn kinds_of_prompts_in_one_batch_answer_as_alone() {
    for name in DENSE.into_iter().chain(MAMBA) {
        let model = load(name);
        let (prompts, groups) = groups(&model, 1);
        let prefix = keys_values(&model, &prompts.affine(0.7, 0.0).unwrap(), &groups);
        let prompts = [Some(prefix), Some(Prefix::Embeddings(prompts)), None];
        let request = |i: usize| Request {
            tokens: vec![3, 4, i as u32 + 5, i as u32 * 3 + 1],
            max_new_tokens: 6,
            ..Request::default()
        };
        let mut engine = Engine::new(&model, 200, 64).unwrap();
        let mut submitted = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let id = engine.add_prefix(prompt.as_ref()).unwrap();
            submitted.extend((0..2).map(|j| engine.submit(id, request(2 * i + j)).unwrap()));
        }
        let answers = answers(&mut engine);
        for (n, sequence) in submitted.iter().enumerate() {
            let prompt = prompts[n / 2].as_ref();
            let alone = generate(&model, prompt, vec![request(n)], 64, &mut |_| ()).unwrap();
            assert_eq!(answers[sequence], alone[0].tokens, "{name}, request {n}");
        }
    }
}

/// A prompt that is keys and values starts Mamba2 layers from zero, whatever request had the slot before.
#[test]
fn keys_and_values_start_mamba2_layers_from_zero() {
    for name in MAMBA {
        let model = load(name);
        let (prompts, groups) = groups(&model, 1);
        let prefix = keys_values(&model, &prompts, &groups);
        let tokens = [vec![5u32, 6, 7, 8], vec![9u32, 3]];
        let loss = |input: &Vec<u32>, target: Vec<u32>| {
            let example = Example { input: input.clone(), target, line: 1 };
            let group = PrefixGroup::new(0..prefix.num_virtual_tokens() as u32, [&example]);
            tune::evaluate(&model, &prefix, &[group], usize::MAX).unwrap().nll().unwrap()
        };
        let request =
            |tokens: &Vec<u32>| Request { tokens: tokens.clone(), max_new_tokens: 4, ..Request::default() };
        let mut engine = Engine::new(&model, 200, 64).unwrap();
        for _ in 0..2 {
            let id = engine.add_prefix(Some(&prefix)).unwrap();
            for input in &tokens {
                engine.submit(id, request(input)).unwrap();
            }
            let answers = answers(&mut engine);
            engine.remove_prefix(id);
            for (input, answer) in tokens.iter().zip(answers.values()) {
                assert_eq!(answer.len(), 4);
                // Each token is the likeliest one after those before it.
                for end in 1..=answer.len() {
                    let found = loss(input, answer[..end].to_vec())[end - 1];
                    for other in 0..20 {
                        let with_other = [&answer[..end - 1], &[other]].concat();
                        assert!(found <= loss(input, with_other)[end - 1] + 1e-5, "{name}");
                    }
                }
            }
        }
    }
}

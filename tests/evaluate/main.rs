//! The metrics against scikit-learn, SciPy, statsmodels, rouge-score and torchmetrics (`tests/golden/metrics.py`), and
//! the perplexity against PEFT's losses.

#[path = "../common/mod.rs"]
mod common;
// The fixtures of `parity`, of which some are used here.
#[allow(dead_code)]
#[path = "../parity/fixtures.rs"]
mod fixtures;

use candle_core::DType;
use common::close::assert_close;
use gneiss::batch::Example;
use gneiss::evaluate::compare::mcnemar;
use gneiss::evaluate::metrics::wilson;
use gneiss::evaluate::{By, Paired, RowScores, Scores, TextScores, nll};
use gneiss::prompt::Prefix;
use serde_json::Value;

fn golden(part: &str) -> Value {
    let text = std::fs::read_to_string(fixtures::folder("metrics.json")).unwrap();
    let mut golden: Value = serde_json::from_str(&text).unwrap();
    golden[part].take()
}

fn cases(part: &str) -> Vec<Value> {
    let cases = golden(part).as_array().unwrap().clone();
    assert!(!cases.is_empty());
    cases
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(float).collect()
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[test]
fn scores_of_labels_are_scikit_learns() {
    for case in cases("classification") {
        let name = case["name"].as_str().unwrap();
        let (expected, predicted) = (strings(&case["expected"]), strings(&case["predicted"]));
        let pairs = expected.iter().zip(&predicted).map(|(e, p)| (e.as_str(), p.as_str()));
        let labels = strings(&case["labels"]);
        let scores = Scores::from_pairs(&labels, pairs);
        let close = |what: &str, ours: &[f64], theirs: &Value| {
            assert_close(&format!("{name}: {what}"), ours, &floats(theirs), 1e-12);
        };
        close("interval", &scores.interval, &case["interval"]);
        close("macro", &[scores.macro_precision, scores.macro_recall, scores.macro_f1], &case["macro"]);
        let each = |of: fn(&gneiss::evaluate::ClassScores) -> f64| -> Vec<f64> {
            scores.classes.iter().map(of).collect()
        };
        close("precision", &each(|c| c.precision), &case["precision"]);
        close("recall", &each(|c| c.recall), &case["recall"]);
        close("F1", &each(|c| c.f1), &case["f1"]);
        close("rows", &each(|c| c.support as f64), &case["support"]);
        assert!((scores.accuracy - float(&case["accuracy"])).abs() < 1e-12, "{name}");
        assert_eq!(serde_json::to_value(&scores.confusion).unwrap(), case["confusion"], "{name}");
        assert_eq!(scores.classes.iter().map(|c| c.label.clone()).collect::<Vec<_>>(), labels);
        let strange = predicted.iter().filter(|p| !labels.contains(p)).count();
        assert_eq!((scores.total, scores.no_label), (expected.len(), strange), "{name}");
        let right = expected.iter().zip(&predicted).filter(|(e, p)| e == p).count();
        assert_eq!(scores.correct, right, "{name}");
    }
    let nothing = Scores::from_pairs(&["0".into(), "1".into()], []);
    assert_eq!((nothing.accuracy, nothing.macro_f1, nothing.interval), (0.0, 0.0, [0.0, 1.0]));
}

#[test]
fn wilsons_interval_is_scipys() {
    for case in cases("wilson") {
        let n = |key: &str| case[key].as_u64().unwrap() as usize;
        assert_close(&case.to_string(), &wilson(n("part"), n("of")), &floats(&case["interval"]), 1e-12);
    }
}

/// torchmetrics computes in f32, rouge-score in f64.
#[test]
fn scores_of_texts_are_those_of_torchmetrics_and_rouge_score() {
    let cases = cases("texts");
    let texts: Vec<(&str, &str)> =
        cases.iter().map(|c| (c["expected"].as_str().unwrap(), c["generated"].as_str().unwrap())).collect();
    for (case, (expected, generated)) in cases.iter().zip(&texts) {
        let scores = RowScores::compare(expected, generated);
        assert_close(&format!("F1 of {case}"), &[scores.token_f1], &[float(&case["token_f1"])], 1e-6);
        assert_close(&format!("ROUGE-L of {case}"), &[scores.rouge_l], &[float(&case["rouge_l"])], 1e-12);
    }
    let all = TextScores::from_pairs(texts.iter().copied());
    let mean = |key: &str| cases.iter().map(|c| float(&c[key])).sum::<f64>() / cases.len() as f64;
    assert_close("means", &[all.token_f1, all.rouge_l], &[mean("token_f1"), mean("rouge_l")], 1e-6);
    assert_eq!(all.total, cases.len());
}

#[test]
fn mcnemars_p_value_is_scipys() {
    for case in cases("mcnemar") {
        let n = |key: &str| case[key].as_u64().unwrap() as usize;
        let (p, expected) = (mcnemar(n("fixed"), n("broken")), float(&case["p_value"]));
        assert!((p - expected).abs() <= 1e-8 * expected, "{case}: {p:e}");
    }
}

/// A bound of 10,000 resamples is off by 0.027 standard errors (one standard deviation), and by a step where the
/// difference is of whole rows; 0.12 standard errors are four and a half of them.
fn assert_interval(what: &str, ours: [f64; 2], case: &Value, step: f64) {
    let tolerance = 0.12 * float(&case["standard_error"]) + step;
    assert_close(what, &ours, &floats(&case["interval"]), tolerance);
}

#[test]
fn the_paired_difference_is_scipys() {
    let golden = golden("bootstrap");
    for case in golden["answers"].as_array().unwrap() {
        let counts = ["both", "fixed", "broken", "neither"].map(|key| case[key].as_u64().unwrap() as usize);
        let rows = [(true, true), (false, true), (true, false), (false, false)];
        let rows = rows.iter().zip(counts).flat_map(|(row, n)| std::iter::repeat_n(*row, n));
        let (base, tuned): (Vec<bool>, Vec<bool>) = rows.unzip();
        let paired = Paired::from_answers("dogs", By::Generated, &base, &tuned);
        assert_eq!((paired.fixed, paired.broken), (counts[1], counts[2]), "{case}");
        let n = base.len() as f64;
        assert_close("difference", &[paired.difference], &[(counts[1] as f64 - counts[2] as f64) / n], 1e-12);
        let step = if counts[1] + counts[2] > 0 { 1.0 / n } else { 0.0 };
        assert_interval(&case.to_string(), paired.interval, case, step + 1e-12);
        assert_eq!(paired.p_value, mcnemar(counts[1], counts[2]));
    }
    for case in golden["scores"].as_array().unwrap() {
        let paired =
            Paired::from_scores("dogs", By::TokenF1, &floats(&case["base"]), &floats(&case["tuned"]));
        let ours = [paired.fixed as f64, paired.broken as f64, paired.difference, paired.p_value];
        let theirs = ["better", "worse", "difference", "p_value"].map(|key| float(&case[key]));
        assert_close(&case.to_string(), &ours, &theirs, 1e-12);
        assert_interval(&case.to_string(), paired.interval, case, 0.0);
    }
}

/// The perplexity is exp of the mean over all target tokens, which transformers and PEFT computed; in one pass and in
/// many, between which progress is told.
#[test]
fn perplexity_is_that_of_pefts_loss() {
    for name in fixtures::CHECKPOINTS {
        let (golden, model) = (fixtures::golden(name), fixtures::model(name, DType::F32));
        let (mut compared, mut split) = (0, false);
        for case in golden.json["cases"].as_array().unwrap() {
            let [group] = &case["groups"].as_array().unwrap()[..] else { continue };
            let prompt = golden.tensor(&group["prompt"]);
            let examples: Vec<Example> =
                group["examples"].as_array().unwrap().iter().map(fixtures::example).collect();
            let expected = case["loss"].as_f64().unwrap().exp();
            for max_rows in [usize::MAX, 1] {
                let mut told = Vec::new();
                let nll = nll(
                    &model,
                    Some(&Prefix::Embeddings(prompt.clone())),
                    &examples,
                    max_rows,
                    &mut |done| told.push(done.texts),
                )
                .unwrap();
                assert_eq!(nll.len() as u64, case["target_tokens"].as_u64().unwrap());
                let perplexity = (nll.iter().sum::<f64>() / nll.len() as f64).exp();
                let what = format!("{name}, {}, {max_rows} rows", case["name"]);
                assert!((perplexity / expected - 1.0).abs() < 2e-4, "{what}: {perplexity}, {expected}");
                assert_eq!(told.last(), Some(&examples.len()), "{what}");
                split |= told.len() > 1;
            }
            compared += 1;
        }
        assert!(compared >= 4 && split, "{name}");
    }
}

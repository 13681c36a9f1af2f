//! `[sweep]`: which trials it makes, and what it refuses.

use super::{LEAST, message};
use gneiss::config::{Config, SweepOptions, TrialConfig};
use std::collections::BTreeSet;
use toml::Value;

fn sweep(text: &str) -> Config {
    Config::parse(&format!("name = \"s\"\n{LEAST}{text}"), "test.toml", &[]).unwrap()
}

fn trials(text: &str) -> Vec<TrialConfig> {
    sweep(text).trials().unwrap()
}

#[track_caller]
fn refused(text: &str, parts: &[&str]) {
    let text = format!("{LEAST}{text}");
    let error = match Config::parse(&text, "test.toml", &[]) {
        Ok(config) => config.trials().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

fn rates(trials: &[TrialConfig]) -> Vec<f64> {
    trials.iter().map(|trial| trial.config.train.learning_rate).collect()
}

#[test]
fn a_grid_has_all_combinations_the_last_key_fastest() {
    let trials = trials(
        "[sweep.parameters]\n\"train.learning_rate\" = { min = 0.001, max = 0.1, log = true, count = 3 }\n\
         \"prompt.num_virtual_tokens\" = { values = [25, 100] }\n\"train.seed\" = { min = 1, max = 2, count = 2 }\n",
    );
    let found: Vec<_> = trials
        .iter()
        .map(|t| (t.config.prompt.num_virtual_tokens, t.config.train.learning_rate, t.config.train.seed))
        .collect();
    let expected: Vec<_> = [25, 100]
        .into_iter()
        .flat_map(|n| [0.001, 0.01, 0.1].into_iter().flat_map(move |rate| [1, 2].map(|seed| (n, rate, seed))))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(trials[11].config.name, "012");
    assert_eq!(trials[11].config.runs, "runs/s/trials");
    assert_eq!(trials[0].values[0], ("prompt.num_virtual_tokens".to_owned(), Value::Integer(25)));
    assert!(trials.iter().all(|trial| trial.config.sweep.is_default()));
    let text = trials[3].config.to_toml().unwrap();
    assert!(!text.contains("sweep"), "{text}");
    assert_eq!(Config::parse(&text, "trial", &[]).unwrap(), trials[3].config);
}

#[test]
fn ranges_are_spread_by_numbers_or_by_logarithms() {
    let of = |range: &str| {
        rates(&trials(&format!("[sweep.parameters]\n\"train.learning_rate\" = {{ {range} }}\n")))
    };
    assert_eq!(of("min = 0.001, max = 0.1, log = true, count = 4"), [0.001, 0.004642, 0.02154, 0.1]);
    assert_eq!(of("min = 0.1, max = 0.4, count = 4"), [0.1, 0.2, 0.3, 0.4]);
    let tokens =
        trials("[sweep.parameters]\n\"prompt.num_virtual_tokens\" = { min = 1, max = 3, count = 9 }\n");
    assert_eq!(tokens.len(), 3, "whole numbers, each of them once");
}

#[test]
fn keys_need_no_quotes() {
    let found = trials(
        "[sweep.parameters]\ntrain.seed = { values = [1, 2] }\nprompt.init_text.values = [\"a\", \"b\"]\n",
    );
    assert_eq!(found.len(), 4);
    assert_eq!(found[3].config.prompt.init_text, "b");
}

#[test]
fn a_random_search_repeats_and_has_no_trial_twice() {
    let text = "[sweep]\nmethod = \"random\"\ntrials = 20\nseed = 3\n[sweep.parameters]\n\
                \"train.learning_rate\" = { min = 0.001, max = 0.1, log = true }\n\"train.batch_size\" = { values = [4, 8] }\n";
    let (first, again) = (trials(text), trials(text));
    assert_eq!(first, again);
    assert_eq!(first.len(), 20);
    let rates = rates(&first);
    assert!(rates.iter().all(|rate| (0.001..=0.1).contains(rate)), "{rates:?}");
    assert!(
        rates.iter().filter(|rate| **rate < 0.01).count() >= 5,
        "as many below the middle as above: {rates:?}"
    );
    let values: BTreeSet<String> = first.iter().map(|trial| format!("{:?}", trial.values)).collect();
    assert_eq!(values.len(), 20);
    assert_ne!(trials(&text.replace("seed = 3", "seed = 4")), first);
    refused(
        "[sweep]\nmethod = \"random\"\ntrials = 5\n[sweep.parameters]\n\"train.batch_size\" = { values = [4, 8] }\n",
        &["5 trials and 2", "combinations"],
    );
}

#[test]
fn a_sweep_comes_back_from_its_own_text() {
    let config = sweep(
        "[sweep]\nkeep = 2\nmetric = \"validation_accuracy\"\n[sweep.parameters]\n\
         \"train.learning_rate\" = { min = 0.001, max = 1, log = true, count = 4 }\n\
         \"train.schedule\" = { values = [\"linear\", \"constant\"] }\n",
    );
    let again = Config::parse(&config.to_toml().unwrap(), "again", &[]).unwrap();
    assert_eq!(again, config);
    assert_eq!(again.trials().unwrap(), config.trials().unwrap());
    let mut seeds = sweep("");
    seeds.sweep = SweepOptions::seeds(seeds.train.seed, 3);
    let found: Vec<u64> = seeds.trials().unwrap().iter().map(|trial| trial.config.train.seed).collect();
    assert_eq!(found, [42, 43, 44]);
    assert_eq!(Config::parse(&seeds.to_toml().unwrap(), "seeds", &[]).unwrap(), seeds);
}

#[test]
fn keys_that_can_not_vary_are_refused_by_name() {
    for key in [
        "model.id", "data.train", "train.max_rows", "train.memory_budget", "train.keep", "name", "sweep.seed",
    ] {
        refused(
            &format!("[sweep.parameters]\n\"{key}\" = {{ values = [1] }}\n"),
            &[key, "same for all trials"],
        );
    }
    refused(
        "[sweep.parameters]\n\"train.sead\" = { values = [1] }\n",
        &["train.sead", "did you mean `train.seed`?"],
    );
    refused("[sweep]\nmetod = \"grid\"\n", &["line 10", "sweep.metod", "did you mean `sweep.method`?"]);
}

#[test]
fn values_are_checked_as_those_of_the_key() {
    let of = |key: &str, value: &str, parts: &[&str]| {
        refused(&format!("[sweep.parameters]\n\"{key}\" = {value}\n"), &[&["line 10", key], parts].concat());
    };
    of("train.learning_rate", "0.1", &["expected { values = [...] }", "found float"]);
    of("train.learning_rate", "{ value = [0.1] }", &["expected { values = [...] }", "found value"]);
    of("train.learning_rate", "{ values = [0.1], min = 0.1 }", &["found min, values"]);
    of("train.learning_rate", "{ values = [] }", &["at least one value"]);
    of("train.learning_rate", "{ values = [0.1, 0.2, 0.1] }", &["0.1 again at place 3"]);
    of("train.learning_rate", "{ values = [0.1, \"much\"] }", &["expected a number", "\"much\""]);
    of("train.schedule", "{ values = [\"linear\", \"cubic\"] }", &["unknown value `cubic`"]);
    of("train.schedule", "{ min = 1, max = 2, count = 2 }", &["no number"]);
    of("train.seed", "{ min = 3, max = 3, count = 2 }", &["min below max"]);
    of("train.learning_rate", "{ min = 0, max = 1, log = true, count = 2 }", &["above 0 with log"]);
    of("train.learning_rate", "{ min = 0, max = 1, count = 1 }", &["count: expected 2 or more"]);
    of("train.learning_rate", "{ min = 0.1, max = 1 }", &["count: required with method = \"grid\""]);
    refused(
        "[sweep.parameters]\n\"train.learning_rate\" = { values = [0.1, -1.0] }\n",
        &["trial 002 (train.learning_rate = -1.0)", "train.learning_rate", "above 0"],
    );
}

#[test]
fn a_sweep_needs_parameters_a_validation_file_and_bounds() {
    refused("", &["[sweep.parameters]: required"]);
    let text = LEAST.replace("validation = \"validation.csv\"", "") + "[train]\nkeep = \"last\"\n";
    let config =
        Config::parse(&format!("{text}[sweep.parameters]\n\"train.seed\" = {{ values = [1] }}\n"), "t", &[]);
    assert!(config.unwrap().trials().unwrap_err().to_string().contains("data.validation"));
    let bad = "[sweep]\nreduction_factor = 0\ngrace_period = 0\nkeep = 0\ntrials = 4\n";
    let message = message(&format!("{LEAST}{bad}"), &[]);
    for part in [
        "line 10", "sweep.reduction_factor", "sweep.grace_period", "sweep.keep", "line 13",
        "expected 0 with method",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    refused("[sweep]\nmethod = \"random\"\n", &["sweep.trials", "expected 1 or more"]);
    refused(
        "[sweep.parameters]\n\"train.seed\" = { min = 1, max = 1000, count = 1000 }\n",
        &["at most 999", "found 1000", "random"],
    );
}

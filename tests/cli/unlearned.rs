//! Runs that can't learn say so, and what they leave can be read for ever after.

use super::*;
use std::fs;

/// Every command that reads a run.
fn is_read(place: &Place) {
    for command in
        [&["inspect", "runs/dogs"][..], &["inspect", "runs/dogs", "--json"], &["report", "runs/dogs"]]
    {
        place.gneiss(command.iter().copied()).success();
    }
    place.gneiss(["report", "runs/dogs", "runs/dogs", "--out", "both.html"]).success();
}

/// `tune` with these settings.
fn tune(place: &Place, sets: &[&str]) -> Assert {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    place.gneiss(["tune", "dogs.toml"].into_iter().chain(sets))
}

fn warnings(place: &Place) -> String {
    place.json("runs/dogs/summary.json")["warnings"].to_string()
}

#[test]
fn a_rate_that_overflows_leaves_a_run_that_can_be_read() {
    for rate in ["1e16", "1e18", "1e20", "1e37", "1e300"] {
        let place = Place::new();
        let tuned = tune(&place, &[&format!("train.learning_rate={rate}")]);
        let (_, stderr) = texts(&tuned);
        let code = tuned.get_output().status.code();
        let says = match code {
            Some(0) => stderr.contains("left the vocabulary's range"),
            _ => code == Some(1) && stderr.contains("step ") && stderr.contains("lower train.learning_rate"),
        };
        assert!(says, "{rate}: {code:?} {stderr}");
        for (name, content) in place.files("runs/dogs") {
            let text = String::from_utf8_lossy(&content).replace(' ', "");
            let is_json = name.extension().is_some_and(|e| e == "json");
            for key in ["norm", "moved", "mean", "max", "cosine", "loss", "grad_norm"] {
                assert!(!is_json || !text.contains(&format!("\"{key}\":null")), "{rate}: {key} in {name:?}");
            }
        }
        Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
        is_read(&place);
        let eval = place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs"]);
        let (_, stderr) = texts(&eval);
        assert!(
            eval.get_output().status.success() || stderr.contains("the prompt's tuning diverged"),
            "{stderr}"
        );
    }
}

#[test]
fn a_run_whose_only_step_is_warm_up_says_that_it_learns_nothing() {
    let place = Place::new();
    let (_, stderr) = texts(&tune(&place, &["train.batch_size=64", "train.num_epochs=1"]).success());
    for part in
        ["warning    the run has one step, which is warm-up", "train.warmup_ratio = 0", "has not moved"]
    {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
    }
    let step: Value = serde_json::from_str(
        fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap().lines().next().unwrap(),
    )
    .unwrap();
    assert_eq!(step["learning_rate"], 0.0);
    assert!(warnings(&place).contains("warm-up") && warnings(&place).contains("has not moved"));
    let page = fs::read_to_string(place.path("runs/dogs/report.html")).unwrap();
    assert!(page.contains("the run has one step, which is warm-up"));
    is_read(&place);

    let text =
        CONFIG.replace("batch_size = 4", "batch_size = 64").replace("num_epochs = 3", "num_epochs = 1");
    assert_ne!(text, CONFIG);
    place.write("one.toml", &text);
    let (_, stderr) = texts(&place.gneiss(["inspect", "one.toml"]).success());
    assert!(stderr.contains("warning    the run has one step, which is warm-up"), "{stderr}");

    // It goes on, and what was said of its end is no longer true.
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=3"]).success();
    assert!(!warnings(&place).contains("warm-up") && !warnings(&place).contains("has not moved"));

    // The same step without warm-up moves the prompt.
    let sets = ["train.batch_size=64", "train.num_epochs=1", "train.warmup_ratio=0"];
    let (_, stderr) = texts(&tune(&place, &sets).success());
    assert!(!stderr.contains("has not moved") && !stderr.contains("warm-up"), "{stderr}");
}

#[test]
fn a_run_that_is_all_warm_up_says_which_rate_it_reaches() {
    let place = Place::new();
    let (_, stderr) = texts(&tune(&place, &["train.max_steps=4", "train.warmup_ratio=1"]).success());
    // Rates of 0, 1, 2 and 3 quarters of 0.05.
    let expected = "all 4 steps of the run are warm-up: the learning rate is at most 3.75e-2, and never";
    assert!(stderr.contains(expected) && !stderr.contains("has not moved"), "{stderr}");
}

#[test]
fn a_rate_too_small_for_f32_is_told() {
    let place = Place::new();
    let (_, stderr) = texts(&tune(&place, &["train.learning_rate=1e-30"]).success());
    assert!(stderr.contains("has not moved: after 9 steps"), "{stderr}");
    is_read(&place);
}

#[test]
fn a_single_row_is_tuned_and_told() {
    let place = Place::new();
    place.write("train.csv", "input,output\nshiny dog,1\n");
    let (_, stderr) = texts(&tune(&place, &["train.num_epochs=3"]).success());
    assert!(stderr.contains("every row is labelled \"1\""), "{stderr}");
    is_read(&place);
}

/// A run folder of gneiss 0.1.0, which wrote null for a number that is not finite.
#[test]
fn a_run_with_nulls_for_numbers_is_read() {
    let place = Place::new();
    tune(&place, &[]).success();
    let change = |name: &str, change: &dyn Fn(&mut Value)| {
        let path = place.path("runs/dogs").join(name);
        let lines = fs::read_to_string(&path).unwrap();
        let changed = |text: &str| {
            let mut value: Value = serde_json::from_str(text).unwrap();
            change(&mut value);
            value.to_string() + "\n"
        };
        let text = match name.ends_with(".jsonl") {
            true => lines.lines().map(changed).collect(),
            false => changed(&lines),
        };
        fs::write(path, text).unwrap();
    };
    change("tokens.json", &|tokens| {
        for token in tokens["tokens"].as_array_mut().unwrap() {
            token["moved"] = Value::Null;
            token["after"]["norm"] = Value::Null;
            token["after"]["nearest"][0]["cosine"] = Value::Null;
        }
    });
    change("metrics.jsonl", &|line| {
        for key in ["loss", "grad_norm", "validation_loss", "train_loss"] {
            if let Some(value) = line.get_mut(key) {
                *value = Value::Null;
            }
        }
    });
    change("summary.json", &|summary| {
        for key in ["train_loss", "validation_loss", "examples_per_second"] {
            summary[key] = Value::Null;
        }
    });
    is_read(&place);
    place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs"]).success();
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=4"]).success();
    is_read(&place);
}

#[test]
fn tune_keeps_a_warning_of_the_checkpoint_in_the_summary_and_prints_it_once() {
    let place = Place::new();
    let mut config = place.json("model/config.json");
    config["sliding_window"] = 8.into();
    place.write("model/config.json", &config.to_string());
    let (_, stderr) = texts(&tune(&place, &["train.num_epochs=1"]).success());
    assert_eq!(stderr.matches("`sliding_window`").count(), 1, "{stderr}");
    assert!(warnings(&place).contains("`sliding_window`"), "{}", warnings(&place));
    let (_, stderr) = texts(&place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=2"]));
    assert!(stderr.matches("`sliding_window`").count() <= 1, "{stderr}");
    assert_eq!(warnings(&place).matches("`sliding_window`").count(), 1);
}

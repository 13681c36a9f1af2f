//! A run that learns the effect of a text.

use super::*;
use gneiss::evaluate::Evaluation;

const TEXT: &str =
    "data.teacher_text=dog shiny gentle or happy : say 1 word50 late rude or smelly : say 0 word51";

#[test]
fn tune_distils_a_text_and_eval_compares_with_it() {
    let place = Place::new();
    let tune = ["tune", "dogs.toml", "--set", TEXT, "--set", "train.num_epochs=20"];
    let (stdout, stderr) = texts(&place.gneiss(tune).success());
    assert!(
        stderr.contains("teacher    17 tokens before every input; the loss is the KL divergence"),
        "{stderr}"
    );
    assert!(stdout.contains(" (KL divergence from the teacher)"), "{stdout}");
    let summary = place.json("runs/dogs/summary.json");
    assert_eq!(summary["loss"], "kl_divergence");
    let metrics = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    let epochs: Vec<Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line.get("best").is_some())
        .collect();
    let loss = |epoch: &Value| epoch["validation_loss"].as_f64().unwrap();
    let least = epochs.iter().map(loss).fold(f64::INFINITY, f64::min);
    assert!(least < 0.7 * loss(&epochs[0]) && least > 0.0, "{metrics}");
    assert_eq!(summary["validation_loss"].as_f64(), Some(least), "the lowest divergence is kept");
    let report = std::fs::read_to_string(place.path("runs/dogs/report.html")).unwrap();
    assert!(report.contains("KL divergence from the teacher, nats per target token"));
    let card = std::fs::read_to_string(place.path("runs/dogs/adapter/README.md")).unwrap();
    assert!(
        card.contains("KL divergence from the teacher") && card.contains("a text of 17 tokens"),
        "{card}"
    );

    let (stdout, _) =
        texts(&place.gneiss(["eval", "dogs.toml", "--set", TEXT, "--adapter", "runs/dogs"]).success());
    assert!(stdout.contains("base, teacher's text  tuned, soft prompt"), "{stdout}");
    let evaluation: Evaluation = serde_json::from_value(place.json("runs/dogs/evaluation.json")).unwrap();
    assert!(evaluation.teacher);
    assert_eq!(Some(evaluation.hard_prompt.as_str()), TEXT.strip_prefix("data.teacher_text="));

    // The same run goes on with its own text alone.
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=21"]).success();
    place.refuses(
        ["tune", "--resume", "runs/dogs", "--set", "data.teacher_text=dog"],
        &["--resume", "new run"],
    );
    place.gneiss(["tune", "dogs.toml", "--find-lr", "--set", TEXT]).success();
    let (stdout, _) = texts(&place.gneiss(["inspect", "runs/dogs/config.toml"]).success());
    assert!(stdout.contains("17 tokens of text"), "{stdout}");
}

#[test]
fn a_text_that_no_teacher_can_read_is_refused_by_name() {
    let place = Place::new();
    let with = |text: &str| format!("data.teacher_text={text}");
    place.refuses(["tune", "dogs.toml", "--set", &with("'   '")], &["data.teacher_text", "white space"]);
    let long = with(&"dog ".repeat(300));
    place.refuses(
        ["tune", "dogs.toml", "--set", &long],
        &["data.teacher_text", "256", "max_position_embeddings"],
    );
}

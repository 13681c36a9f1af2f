//! `gneiss init`.

use super::*;

#[test]
fn init_writes_a_configuration_that_inspect_takes_and_tune_runs() {
    let place = Place::new();
    place.write("pets-train.csv", &reviews(12).replace("input,output", "review,mood"));
    place.write("pets-validation.csv", &reviews(4).replace("input,output", "review,mood"));
    let args = [
        "init", "pets-train.csv", "--model", "model", "--verbalizer", "say {{input}} :", "--init-text",
        "say 1 or 0",
    ];
    let (stdout, stderr) = texts(&place.gneiss(args).success());
    assert_eq!(stdout, "pets.toml\n");
    assert!(
        stderr.contains("columns    review, mood") && stderr.contains("gneiss inspect pets.toml"),
        "{stderr}"
    );
    let config = Config::load(&place.path("pets.toml"), &[]).unwrap();
    let data = &config.data;
    assert_eq!((data.input.as_str(), data.output.as_str()), ("review", "mood"));
    assert_eq!((data.validation.as_str(), data.test.as_str()), ("pets-validation.csv", ""));
    assert_eq!(data.task, gneiss::config::Task::Classification);
    // "say", three words and ":"; a label and the end of the text.
    assert_eq!((data.max_input_tokens, data.max_output_tokens), (16, 2));
    let (report, warnings) = texts(&place.gneiss(["inspect", "pets.toml"]).success());
    assert!(report.contains("pets.toml, valid") && report.contains("0 inputs cut"), "{report}");
    assert!(!warnings.contains("warning"), "{warnings}");
    place.gneiss(["tune", "pets.toml", "--set", "train.max_steps=2"]).success();

    let before = std::fs::read_to_string(place.path("pets.toml")).unwrap();
    place.refuses(args, &["pets.toml", "does not exist", "--out"]);
    assert_eq!(std::fs::read_to_string(place.path("pets.toml")).unwrap(), before);
}

#[test]
fn init_proposes_texts_by_columns_and_labels() {
    let place = Place::new();
    place.write(
        "mail.csv",
        "id;body;team\n1;Where is it?;sales\n2;It is broken \"again\".;help\n3;Hm;sales\n4;Oh;help\n",
    );
    place.gneiss(["init", "mail.csv", "--out", "a.toml"]).success();
    let config = Config::load(&place.path("a.toml"), &[]).unwrap();
    assert_eq!((config.data.input.as_str(), config.data.output.as_str()), ("body", "team"));
    assert_eq!(config.data.verbalizer, "classify {help, sales} Body: {{input}}\nTeam:\n");
    assert_eq!(
        config.prompt.init_text,
        "Find the team of the body. Answer with one of these only: help, sales."
    );
    assert_eq!(config.name, "mail");
    assert_eq!((config.train.num_epochs, config.train.early_stopping), (20, 0));

    place
        .gneiss([
            "init", "mail.csv", "--out", "b.toml", "--task", "generation", "--input", "team", "--output",
            "body",
        ])
        .success();
    let config = Config::load(&place.path("b.toml"), &[]).unwrap();
    assert_eq!(config.data.task, gneiss::config::Task::Generation);
    assert_eq!(config.data.verbalizer, "Team: {{input}}\nBody:\n");

    place.refuses(["init"], &["init: expected the training file"]);
    place.refuses(["init", "none.csv"], &["none.csv", "o such file"]);
    place.refuses(["init", "mail.csv", "--input", "text"], &["no column `text`", "`body`"]);
    place.refuses(["init", "mail.csv", "--out", "c.toml", "--verbalizer", "no place"], &["{{input}}"]);
    place.write("one.csv", "a\nb\n");
    place.refuses(["init", "one.csv"], &["one.csv", "a column of inputs and a column of outputs"]);
    assert!(!place.path("c.toml").exists());
}

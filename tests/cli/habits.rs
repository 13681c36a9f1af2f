//! What users of command lines expect: version, completions, manual pages, quiet, colours, hints, progress as JSON.

use super::*;

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn version_is_one_line_and_the_long_one_describes_the_build() {
    let place = Place::new();
    let (short, _) = texts(&place.gneiss(["-V"]).success());
    assert_eq!(short, format!("gneiss {}\n", env!("CARGO_PKG_VERSION")));
    let (long, _) = texts(&place.gneiss(["--version"]).success());
    assert!(long.starts_with(&short), "{long}");
    for key in ["commit", "target", "CPU", "features"] {
        assert!(long.lines().any(|line| line.starts_with(key)), "no {key} in: {long}");
    }
    #[cfg(target_arch = "x86_64")]
    assert_eq!(long.contains("avx2"), is_x86_feature_detected!("avx2"), "{long}");
    assert_eq!(long.contains("serve"), cfg!(feature = "serve"), "{long}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let place = Place::new();
    let commands = ["tune", "sweep", "eval", "report", "init", "completions"];
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (script, stderr) = texts(&place.gneiss(["completions", shell]).success());
        for part in commands.iter().chain(&["find-lr", "gneiss"]) {
            assert!(script.contains(part), "{shell}: no {part}");
        }
        assert_eq!(stderr, "");
    }
    place.refuses(["completions", "tcsh"], &["tcsh", "bash", "zsh"]);

    let (page, _) = texts(&place.gneiss(["man"]).success());
    assert!(page.contains(".TH gneiss 1") && page.contains("gneiss\\-tune(1)"), "{page}");
    assert!(!page.contains("avx"), "a page says nothing of the machine that wrote it: {page}");
    let (page, _) = texts(&place.gneiss(["man", "tune"]).success());
    assert!(page.contains(".TH gneiss-tune 1"), "{page}");
    assert!(page.contains("\\-\\-find\\-lr") && page.contains("\\-\\-quiet"), "{page}");
    place.refuses(["man", "tuna"], &["tuna", "tune"]);
    let (written, _) = texts(&place.gneiss(["man", "--out", "man"]).success());
    let files = place.files("man");
    assert_eq!(files.len(), written.lines().count());
    for command in commands {
        assert!(files.contains_key(Path::new(&format!("gneiss-{command}.1"))), "{command}");
    }
    assert!(files.contains_key(Path::new("gneiss.1")));
}

#[test]
fn quiet_leaves_warnings_and_errors() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["--quiet", "tune", "dogs.toml"]).success());
    assert!(stdout.contains("validation loss"), "{stdout}");
    let said: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("warning    ")).collect();
    assert_eq!(said, [""; 0], "{stderr}");
    place.write("test.csv", "input,output\nnew dog,maybe\n");
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "-q"]).success());
    assert!(stderr.contains("warning    data.test: a label that no row"), "{stderr}");
    place.refuses(["-q", "tune", "cats.toml"], &["cats.toml"]);
}

#[test]
fn commands_say_what_to_do_next() {
    let place = Place::new();
    let next = |args: &[&str]| {
        let (_, stderr) = texts(&place.gneiss(args.iter().copied()).success());
        let lines = stderr.lines().filter_map(|line| line.strip_prefix("next       "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(next(&["inspect", "train.csv"]), ["gneiss init train.csv"]);
    assert_eq!(next(&["inspect", "dogs.toml"]), ["gneiss tune dogs.toml"]);
    let eval = next(&["tune", "dogs.toml"]).remove(0);
    assert_eq!(eval, "gneiss eval runs/dogs/config.toml --adapter runs/dogs");
    // The hints can be run as they are.
    let serve = next(&eval.split(' ').skip(1).collect::<Vec<_>>()).remove(0);
    assert_eq!(serve, "gneiss serve --model model --adapter dogs=runs/dogs");
    assert_eq!(next(&["inspect", "runs/dogs"]), ["gneiss report runs/dogs"]);
    assert_eq!(next(&["tune", "dogs.toml", "--json"]), [""; 0]);
    assert_eq!(
        next(&["tune", "dogs.toml", "--set", "data.test="]),
        ["gneiss generate --model model --adapter runs/dogs TEXT"]
    );
}

#[test]
fn colours_respect_no_color() {
    let help = |variables: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").envs(variables.iter().copied());
        let (stdout, _) = texts(&command.arg("--help").assert().success());
        stdout.contains('\u{1b}')
    };
    assert!(!help(&[]), "a pipe gets no colours");
    assert!(help(&[("CLICOLOR_FORCE", "1")]));
    assert!(!help(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
}

#[test]
fn progress_as_json_has_every_step_and_epoch() {
    let place = Place::new();
    let args = ["--progress", "json", "tune", "dogs.toml", "--json"];
    let (stdout, stderr) = texts(&place.gneiss(args).success());
    let events = lines(&stderr);
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    assert_eq!(of("start")[0]["run"], json!("runs/dogs"));
    assert_eq!((&of("start")[0]["steps"], &of("start")[0]["done"]), (&json!(9), &json!(0)));
    assert_eq!(of("progress").last().unwrap()["stage"], json!("loading"));
    // The records of metrics.jsonl, in their order.
    let metrics = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    let records =
        events.iter().filter(|event| event["event"] == "step" || event["event"] == "epoch").map(|event| {
            let mut record = event.clone();
            record.as_object_mut().unwrap().remove("event");
            record
        });
    assert_eq!(records.collect::<Vec<_>>(), lines(&metrics));
    assert_eq!((of("step").len(), of("epoch").len()), (9, 3));
    let messages = of("message").len();
    assert!(messages > 3 && !stderr.contains("next  "), "{stderr}");
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["run"], json!("runs/dogs"));

    let (_, stderr) = texts(&place.gneiss(["tune", "cats.toml", "--progress", "json"]).code(2));
    let error = lines(&stderr).pop().unwrap();
    assert_eq!((&error["event"], &error["exit_code"]), (&json!("error"), &json!(2)));
    assert!(error["text"].as_str().unwrap().contains("cats.toml"), "{error}");

    let (_, stderr) =
        texts(&place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs", "--progress", "json"]).success());
    let last = lines(&stderr).into_iter().rfind(|event| event["stage"] == "dogs, answers").unwrap();
    assert_eq!((&last["done"], &last["total"]), (&json!(6), &json!(6)));
}

#[test]
fn a_sweep_s_progress_names_its_trials() {
    let place = Place::new();
    let config =
        format!("{CONFIG}\n[sweep.parameters]\n\"train.learning_rate\" = {{ values = [0.01, 0.05] }}\n");
    place.write("sweep.toml", &config);
    let (_, stderr) = texts(&place.gneiss(["sweep", "sweep.toml", "--json", "--progress", "json"]).success());
    let events = lines(&stderr);
    for trial in [1, 2] {
        let steps = events.iter().filter(|event| event["event"] == "step" && event["trial"] == trial);
        assert!(steps.count() > 0, "trial {trial}");
    }
    let (csv, _) = texts(&place.gneiss(["report", "runs/dogs", "--csv"]).success());
    assert!(csv.contains("runs/dogs/trials/001,1,1,") && csv.contains("runs/dogs/trials/002,1,1,"), "{csv}");
}

#[test]
fn a_report_as_csv_has_a_line_a_step() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let before = place.files("runs/dogs");
    let (table, _) = texts(&place.gneiss(["report", "runs/dogs", "--csv"]).success());
    assert_eq!(place.files("runs/dogs"), before, "nothing is written");
    let mut reader = csv::Reader::from_reader(table.as_bytes());
    let rows: Vec<BTreeMap<String, String>> = reader.deserialize().map(Result::unwrap).collect();
    let metrics = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    let steps: Vec<Value> = lines(&metrics).into_iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(rows.len(), steps.len());
    for (row, step) in rows.iter().zip(&steps) {
        assert_eq!(row["run"], "runs/dogs");
        for (key, value) in step.as_object().unwrap() {
            assert_eq!(row[key].parse::<f64>().unwrap(), value.as_f64().unwrap(), "{key}");
        }
        assert_eq!(row["validation_loss"].is_empty(), row["step"].parse::<usize>().unwrap() % 3 != 0);
    }
    let (path, _) = texts(&place.gneiss(["report", "runs/dogs", "--csv", "--out", "a.csv"]).success());
    assert_eq!(path, "a.csv\n");
    assert_eq!(std::fs::read_to_string(place.path("a.csv")).unwrap(), table);
}

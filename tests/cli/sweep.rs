//! `gneiss sweep`: trials as runs, pruning, resumption, the folder.

use super::resume::{WEIGHTS, ended};
use super::*;
use std::time::{Duration, Instant};

/// Rates and lengths; 6 trials, 3 or 2 steps an epoch.
const SWEEP: &str = r#"
[sweep]
reduction_factor = 1

[sweep.parameters]
"train.learning_rate" = { values = [0.02, 0.08, 0.005] }
"prompt.num_virtual_tokens" = { values = [3, 5] }
"#;

impl Place {
    /// With a configuration `sweep.toml` of a run with so many epochs, and a table of a sweep.
    fn with_sweep(epochs: usize, table: &str) -> Self {
        let place = Self::new();
        let config = CONFIG.replace("num_epochs = 3", &format!("num_epochs = {epochs}"));
        let config = config.replace("name = \"dogs\"", "name = \"s\"");
        place.write("sweep.toml", &format!("{config}{table}"));
        place
    }

    /// The status of a trial of `runs/s`.
    fn status(&self, trial: usize) -> String {
        let summary = self.json(&format!("runs/s/trials/{trial:03}/summary.json"));
        summary["status"]["state"].as_str().unwrap().to_owned()
    }

    fn decisions(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("runs/s/sweep.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn prompt(&self, run: &str) -> Vec<f32> {
        let adapter = Adapter::read(&self.path(run).join("adapter")).unwrap();
        adapter.prompt.values().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Tunes the configuration of a trial of `runs/s` by itself, as `runs/alone`.
    fn tune_alone(&self, trial: usize) {
        let config = format!("runs/s/trials/{trial:03}/config.toml");
        if self.path("runs/alone").exists() {
            std::fs::remove_dir_all(self.path("runs/alone")).unwrap();
        }
        self.gneiss(["tune", &config, "--set", "name=alone", "--set", "runs=runs"]).success();
    }
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

/// By turns, in f32 and in bf16: bit for bit the run that `gneiss tune` makes of the same configuration.
#[test]
fn a_trial_is_the_run_of_its_configuration() {
    for dtype in ["f32", "bf16"] {
        let place = Place::with_sweep(3, SWEEP);
        place.gneiss(["sweep", "sweep.toml", "--dtype", dtype]).success();
        for trial in [1, 4, 6] {
            let run = format!("runs/s/trials/{trial:03}");
            place.tune_alone(trial);
            assert_eq!(place.records(&run), place.records("runs/alone"), "{dtype}, trial {trial}");
            let (ours, alone) = (place.files(&run), place.files("runs/alone"));
            for name in [WEIGHTS, "tokens.json"] {
                assert!(ours[Path::new(name)] == alone[Path::new(name)], "{dtype}, trial {trial}: {name}");
            }
            let (ours, alone) =
                (place.json(&format!("{run}/summary.json")), place.json("runs/alone/summary.json"));
            for key in [
                "status", "steps", "epochs", "kept_step", "kept_epoch", "train_loss", "validation_loss",
                "resumed", "warnings",
            ] {
                assert_eq!(ours[key], alone[key], "{dtype}, trial {trial}: {key}");
            }
        }
        let files: BTreeSet<PathBuf> = place.files("runs/s/trials/001").into_keys().collect();
        let more: Vec<_> =
            files.difference(&place.files("runs/alone").into_keys().collect()).cloned().collect();
        assert_eq!(more, [PathBuf::from("validation.json")]);
    }
}

/// Trials of other lengths, batch sizes and numbers of epochs in one pass are the runs alone: in bf16 on the CPU bit for bit, in
/// f32 to rounding.
#[test]
fn trials_in_one_pass_are_those_by_turns() {
    let table = "[sweep]\nreduction_factor = 1\nmax_prompts = 5\n[sweep.parameters]\n\
                 \"prompt.num_virtual_tokens\" = { values = [3, 7] }\n\"train.batch_size\" = { values = [3, 8] }\n\
                 \"train.num_epochs\" = { values = [2, 3] }\n";
    for (dtype, tolerance) in [("bf16", 0.0), ("f32", 1e-3)] {
        let place = Place::with_sweep(3, table);
        place.gneiss(["sweep", "sweep.toml", "--dtype", dtype]).success();
        assert_eq!(place.decisions()[0], json!({"event": "started", "trials": 8, "max_prompts": 5}));
        for trial in 1..=8 {
            place.tune_alone(trial);
            let (ours, alone) =
                (place.prompt(&format!("runs/s/trials/{trial:03}")), place.prompt("runs/alone"));
            assert_eq!(ours.len(), alone.len());
            let mean = ours.iter().zip(&alone).map(|(a, b)| (a - b).abs()).sum::<f32>() / ours.len() as f32;
            // AdamW moves a value by at most about the rate a step; the least number of steps is 4.
            assert!(mean <= tolerance * 0.05, "{dtype}, trial {trial}: {mean:e}");
        }
    }
}

/// Prompts of both kinds, with and without a reparameterization: those of one kind are in one pass.
#[test]
fn kinds_of_prompts_are_tried_in_one_sweep() {
    let table = "[sweep]\nreduction_factor = 1\nmax_prompts = MANY\n[sweep.parameters]\n\
                 \"prompt.kind\" = { values = [\"embeddings\", \"prefix\"] }\n\
                 \"prompt.reparameterization\" = { values = [\"none\", \"residual\"] }\n";
    for (max_prompts, tolerance) in [(1, 0.0), (4, 1e-3)] {
        let place = Place::with_sweep(3, &table.replace("MANY", &max_prompts.to_string()));
        place.gneiss(["sweep", "sweep.toml", "--dtype", "f32"]).success();
        for trial in 1..=4 {
            place.tune_alone(trial);
            let run = format!("runs/s/trials/{trial:03}");
            let (ours, alone) = (place.prompt(&run), place.prompt("runs/alone"));
            let most = ours.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(
                ours.len() == alone.len() && most <= tolerance,
                "{max_prompts} prompts, trial {trial}: {most:e}"
            );
        }
    }
}

/// 6 trials, 6 epochs, rungs after 1 and 3.
#[test]
fn the_worse_trials_are_pruned_and_the_best_has_a_link() {
    let table = SWEEP.replace("reduction_factor = 1", "reduction_factor = 3\ngrace_period = 1");
    let place = Place::with_sweep(6, &table);
    // The model knows nothing of the labels, so that all trials begin above chance; the guard is tested below.
    let labels = reviews(12).replace(",1\n", ",shiny dog\n").replace(",0\n", ",rude dog\n");
    place.write("train.csv", &labels);
    place
        .write("validation.csv", &labels.lines().take(5).map(|line| format!("{line}\n")).collect::<String>());
    place.write("test.csv", &labels);
    let args = ["sweep", "sweep.toml", "--set", "data.task=generation"];
    let (stdout, stderr) = texts(&place.gneiss(args).success());
    let decisions = place.decisions();
    let rungs: Vec<&Value> = decisions.iter().filter(|record| record["event"] == "rung").collect();
    assert_eq!(rungs.iter().map(|rung| rung["epoch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    assert_eq!((numbers(&rungs[0]["kept"]).len(), numbers(&rungs[0]["pruned"]).len()), (2, 4));
    assert_eq!((numbers(&rungs[1]["kept"]).len(), numbers(&rungs[1]["pruned"]).len()), (1, 1));
    let best = decisions.last().unwrap();
    assert_eq!((&best["event"], &best["trial"]), (&json!("best"), &rungs[1]["kept"][0]));
    let best = best["trial"].as_u64().unwrap() as usize;

    // What was pruned was worse there than what stayed.
    let loss = |trial: u64, epoch: usize| {
        let records = place.records(&format!("runs/s/trials/{trial:03}"));
        let losses = records.iter().filter(|r| r.get("best").is_some()).take(epoch);
        losses.map(|r| r["validation_loss"].as_f64().unwrap()).fold(f64::INFINITY, f64::min)
    };
    let losses = |rung: &Value, what: &str| {
        let epoch = rung["epoch"].as_u64().unwrap() as usize;
        numbers(&rung[what]).into_iter().map(|trial| loss(trial, epoch)).collect::<Vec<_>>()
    };
    for rung in rungs {
        let (kept, pruned) = (losses(rung, "kept"), losses(rung, "pruned"));
        assert!(
            kept.is_sorted() && pruned.is_sorted() && kept.last() <= pruned.first(),
            "{kept:?} {pruned:?}"
        );
    }
    let epochs: u64 = (1..=6)
        .map(|t| place.json(&format!("runs/s/trials/{t:03}/summary.json"))["epochs"].as_u64().unwrap())
        .sum();
    assert_eq!(epochs, 6 + 2 * 2 + 3);

    // A survivor is the run without a sweep, a pruned trial the beginning of it.
    place.tune_alone(best);
    assert_eq!(place.records(&format!("runs/s/trials/{best:03}")), place.records("runs/alone"));
    let [ours, alone] = [format!("runs/s/trials/{best:03}"), "runs/alone".into()]
        .map(|run| place.json(&format!("{run}/summary.json"))["warnings"].clone());
    assert_eq!(ours, alone, "what is judged by earlier epochs is so in each turn");
    let first = numbers(&decisions[1]["pruned"])[0] as usize;
    place.tune_alone(first);
    let (ours, alone) = (place.records(&format!("runs/s/trials/{first:03}")), place.records("runs/alone"));
    assert!(ours.len() < alone.len() && ours[..] == alone[..ours.len()]);
    assert_eq!((place.status(first).as_str(), place.status(best).as_str()), ("pruned", "completed"));
    for trial in [first, best] {
        let folder = format!("runs/s/trials/{trial:03}");
        let lines = std::fs::read_to_string(place.path(&format!("{folder}/metrics.jsonl"))).unwrap();
        let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        let seconds = &place.json(&format!("{folder}/summary.json"))["seconds"];
        assert!(seconds.as_f64() >= last["elapsed"].as_f64(), "trial {trial}: {seconds} s, {last}");
    }

    // Folders of trials are run folders.
    assert_eq!(
        std::fs::read_link(place.path("runs/s/best")).unwrap(),
        Path::new(&format!("trials/{best:03}"))
    );
    for name in ["report.html", "tokens.json", "checkpoint.safetensors", "validation.json", "curve.png"] {
        for trial in [first, best] {
            assert!(place.path(&format!("runs/s/trials/{trial:03}")).join(name).is_file(), "{trial} {name}");
        }
    }
    place
        .gneiss(["eval", "sweep.toml", "--adapter", "runs/s/best", "--set", "data.task=generation"])
        .success();
    assert!(place.path(&format!("runs/s/trials/{best:03}/evaluation.json")).is_file());
    let pruned = format!("runs/s/trials/{first:03}");
    place.gneiss(["report", &pruned]).success();
    place.gneiss(["inspect", &pruned]).success();
    place.gneiss(["tune", "--resume", &pruned]).success();
    assert_eq!(place.records(&pruned), alone, "a pruned trial goes on like a run");
    let page = std::fs::read_to_string(place.path("runs/s/sweep.html")).unwrap();
    for part in ["6 trials, 5 pruned", "train.learning_rate", "not told apart", "<polyline"] {
        assert!(page.contains(part), "{part}");
    }
    let (path, _) = texts(&place.gneiss(["report", "runs/s"]).success());
    assert_eq!(path, "runs/s/sweep.html\n");
    for part in ["learning_rate", "pruned", "best       runs/s/best", " ± "] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    assert!(stderr.contains("epoch 1: 2 of 6 trials stay") && !stdout.contains("stay"), "{stderr}");
}

/// At the level of guessing the order of the trials says nothing: a rung is put off, up to half of the epochs.
#[test]
fn no_trial_is_pruned_while_the_best_one_is_at_chance() {
    let table = "[sweep]\ngrace_period = 1\n[sweep.parameters]\n\"train.learning_rate\" = { values = [1e-9, 2e-9, 3e-9] }\n";
    let place = Place::with_sweep(6, table);
    let (_, stderr) = texts(&place.gneiss(["sweep", "sweep.toml"]).success());
    let found: Vec<(String, u64)> = place.decisions()[1..]
        .iter()
        .filter_map(|r| Some((r["event"].as_str()?.to_owned(), r["epoch"].as_u64()?)))
        .collect();
    let expected = [("postponed", 1), ("postponed", 2), ("rung", 3)];
    assert_eq!(found, expected.map(|(event, epoch)| (event.to_owned(), epoch)));
    assert!((place.decisions()[1]["chance"].as_f64().unwrap() - 2f64.ln() / 2.0).abs() < 1e-9);
    assert!(
        stderr.contains("epoch 1: no trial is pruned yet")
            && stderr.contains("guessing the labels gives 0.3466"),
        "{stderr}"
    );
}

#[test]
fn trials_compared_by_accuracy_keep_those_with_more_right_rows() {
    let table = "[sweep]\nmetric = \"validation_accuracy\"\nreduction_factor = 2\ngrace_period = 5\n[sweep.parameters]\n\
                 \"train.learning_rate\" = { values = [0.1, 1e-9] }\n";
    let place = Place::with_sweep(10, table);
    place.write("validation.csv", &reviews(12));
    let (stdout, _) = texts(&place.gneiss(["sweep", "sweep.toml"]).success());
    // The second trial does not learn: its loss is the higher one, and it happens to answer more rows right.
    let rung = place.decisions().into_iter().find(|record| record["event"] == "rung").unwrap();
    assert_eq!((&rung["kept"], &rung["pruned"]), (&json!([2]), &json!([1])), "{stdout}");
    let loss = |trial: usize| {
        place.json(&format!("runs/s/trials/{trial:03}/summary.json"))["validation_loss"].as_f64()
    };
    assert!(loss(1) < loss(2), "{stdout}");
    let best = place.decisions().pop().unwrap();
    assert!(best["validation_accuracy"].as_f64().unwrap() > 0.7, "{best}");
    let rows = place.json("runs/s/best/validation.json");
    assert_eq!([&rows["correct"], &rows["nll"]].map(|list| list.as_array().unwrap().len()), [12, 12]);
    let sum: f64 = rows["nll"].as_array().unwrap().iter().map(|nll| nll.as_f64().unwrap()).sum();
    let tokens: u64 = numbers(&rows["target_tokens"]).iter().sum();
    assert!((sum / tokens as f64 - best["validation_loss"].as_f64().unwrap()).abs() < 1e-4, "{best}");
    assert!(stdout.contains(" %"), "{stdout}");
}

#[test]
fn a_failed_trial_does_not_end_the_sweep() {
    for max_prompts in [0, 3] {
        let table = format!(
            "[sweep]\nreduction_factor = 1\nmax_prompts = {max_prompts}\n[sweep.parameters]\n\
             \"train.learning_rate\" = {{ values = [0.05, 1e38, 0.02] }}\n"
        );
        let place = Place::with_sweep(3, &table);
        let (stdout, stderr) = texts(&place.gneiss(["sweep", "sweep.toml"]).success());
        assert_eq!(
            [1, 2, 3].map(|trial| place.status(trial)),
            ["completed", "failed", "completed"],
            "{stderr}"
        );
        assert!(stdout.contains("failed") && stderr.contains("trial 002 failed"), "{stdout}{stderr}");
        assert_ne!(place.decisions().last().unwrap()["trial"], json!(2));
        place.tune_alone(3);
        let (ours, alone) = (place.prompt("runs/s/trials/003"), place.prompt("runs/alone"));
        assert!(ours.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-4));
    }
    let place =
        Place::with_sweep(3, "[sweep.parameters]\n\"train.learning_rate\" = { values = [1e38, 2e38] }\n");
    place.refuses(
        ["sweep", "sweep.toml"],
        &["at least one trial with a finite validation loss", "found none of 2"],
    );
    assert!(place.path("runs/s/sweep.html").is_file());
}

const LONG_SWEEP: &str = "[sweep]\nreduction_factor = 2\ngrace_period = 8\nmax_prompts = MANY\n[sweep.parameters]\n\
                          \"train.learning_rate\" = { values = [0.02, 0.08, 0.005] }\n\
                          \"prompt.num_virtual_tokens\" = { values = [3, 5] }\n";

fn long_sweep(max_prompts: usize) -> Place {
    let place = Place::with_sweep(20, &LONG_SWEEP.replace("MANY", &max_prompts.to_string()));
    let config = std::fs::read_to_string(place.path("sweep.toml")).unwrap();
    place.write("sweep.toml", &config.replace("[train]\n", "[train]\ncheckpoint_steps = 2\n"));
    place
}

/// Records of all trials.
#[cfg(unix)]
fn all_lines(place: &Place) -> usize {
    (1..=6).map(|trial| place.lines(&format!("runs/s/trials/{trial:03}/metrics.jsonl"))).sum()
}

/// Signals the sweep when its trials have written so many records.
#[cfg(unix)]
fn signal_after(place: &Place, child: &std::process::Child, lines: usize, signal: i32) {
    let until = Instant::now() + Duration::from_secs(240);
    while all_lines(place) < lines {
        assert!(Instant::now() < until, "no {lines} records within four minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
    // SAFETY: signals a child of this process that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Killed or interrupted wherever it is, a sweep ends with the same decisions, records and prompts. Trials of one pass that were
/// killed while they wrote their checkpoints go on from different steps: then their passes have other rows, and the sums are
/// the same only if rows do not depend on each other, as in bf16 on the CPU.
#[cfg(unix)]
#[test]
fn a_killed_sweep_goes_on_bit_for_bit() {
    for (max_prompts, dtype) in [(0, "f32"), (4, "bf16")] {
        let whole = long_sweep(max_prompts);
        let command = ["sweep", "sweep.toml", "--dtype", dtype];
        whole.gneiss(command).success();
        let place = long_sweep(max_prompts);
        let mut child = place.spawn(&command);
        for (lines, signal) in
            [(7, libc::SIGKILL), (40, libc::SIGINT), (100, libc::SIGKILL), (200, libc::SIGTERM)]
        {
            signal_after(&place, &child, lines, signal);
            let (status, stderr) = ended(child);
            if signal != libc::SIGKILL {
                assert_eq!(status.code(), Some(130), "{stderr}");
                assert!(stderr.contains("go on with: gneiss sweep --resume runs/s"), "{stderr}");
                assert!(place.path("runs/s/sweep.html").is_file());
            }
            child = place.spawn(&["sweep", "--resume", "runs/s"]);
        }
        let (status, stderr) = ended(child);
        assert!(status.success(), "{stderr}");
        assert_eq!(place.decisions(), whole.decisions());
        for trial in 1..=6 {
            let run = format!("runs/s/trials/{trial:03}");
            let [ours, theirs] = [&place, &whole].map(|place| {
                let mut records = place.records(&run);
                for record in records.iter_mut().filter(|_| max_prompts > 1) {
                    record.as_object_mut().unwrap().remove("rows");
                }
                records
            });
            assert!(ours == theirs, "trial {trial}: {ours:?}\n{theirs:?}");
            assert!(
                place.files(&run)[Path::new(WEIGHTS)] == whole.files(&run)[Path::new(WEIGHTS)],
                "trial {trial}"
            );
            let (ours, theirs) =
                (place.json(&format!("{run}/summary.json")), whole.json(&format!("{run}/summary.json")));
            assert_eq!(ours["status"], theirs["status"], "an interrupted trial does not stay interrupted");
            assert_eq!(theirs["resumed"], json!(0), "a turn is no resumption");
        }
        // Nothing is left to do.
        let before = place.decisions();
        place.gneiss(["sweep", "--resume", "runs/s"]).success();
        assert_eq!(place.decisions(), before);
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_a_sweep_writes_is_refused_to_others() {
    let place = long_sweep(0);
    let mut child = place.spawn(&["sweep", "sweep.toml"]);
    signal_after(&place, &child, 7, libc::SIGSTOP);
    let process = format!("process {}", child.id());
    let parts = ["runs/s", process.as_str(), "hint"];
    place.refuses(["sweep", "--resume", "runs/s"], &parts);
    place.refuses(["sweep", "--collect", "runs/s"], &parts);
    place.refuses(["sweep", "sweep.toml"], &parts);
    place.refuses(["tune", "dogs.toml", "--set", "name=s"], &parts);
    let shard = ["sweep", "sweep.toml", "--set", "sweep.reduction_factor=1", "--shard", "0/2"];
    place.refuses(shard, &parts);
    assert!(!place.path("runs/s~1").exists());
    child.kill().unwrap();
    ended(child);
    place.gneiss(["sweep", "--resume", "runs/s"]).success();
}

#[test]
fn seeds_are_a_sweep_without_pruning() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--seeds", "3"]).success());
    for (trial, seed) in [(1, 42), (2, 43), (3, 44)] {
        let run = format!("runs/dogs/trials/{trial:03}");
        let config = Config::load(&place.path(&run).join("config.toml"), &[]).unwrap();
        assert_eq!(config.train.seed, seed);
        assert_eq!(place.json(&format!("{run}/summary.json"))["status"]["state"], json!("completed"));
    }
    assert!(place.path("runs/dogs/best/adapter").is_dir() && stdout.contains("seed"), "{stdout}");
    assert!(stderr.contains("3 trials of up to 3 epochs"), "{stderr}");
    place.refuses(["tune", "dogs.toml", "--seeds", "1"], &["--seeds", "1"]);
    place.refuses(["tune", "--resume", "runs/dogs", "--seeds", "3"], &["--seeds"]);
}

#[test]
fn json_has_a_line_for_each_event() {
    let place = Place::with_sweep(2, SWEEP);
    let (stdout, _) = texts(&place.gneiss(["sweep", "sweep.toml", "--json"]).success());
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |event: &str| lines.iter().filter(|line| line["event"] == event).count();
    let events = ["started", "epoch", "ended", "best", "finished"];
    assert_eq!(events.map(count), [1, 12, 6, 1, 1]);
    assert_eq!(lines.len(), 21);
    let epoch = lines.iter().find(|line| line["event"] == "epoch").unwrap();
    assert_eq!(
        (&epoch["trial"], &epoch["run"], &epoch["epoch"]),
        (&json!(1), &json!("runs/s/trials/001"), &json!(1))
    );
    let last = lines.last().unwrap();
    assert_eq!(last["best"], json!("runs/s/best"));
    let trials = last["trials"].as_array().unwrap();
    assert_eq!((trials.len(), &trials[0]["is_best"]), (6, &json!(true)));
    assert!(trials[0]["validation_loss"]["standard_error"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_sweep_moves_an_earlier_run_aside_and_tune_says_that_it_does_not_sweep() {
    let place = Place::with_sweep(1, SWEEP);
    let (_, stderr) = texts(&place.gneiss(["tune", "sweep.toml"]).success());
    assert!(stderr.contains("[sweep] is for gneiss sweep"), "{stderr}");
    let text = std::fs::read_to_string(place.path("runs/s/config.toml")).unwrap();
    assert!(!text.contains("[sweep"), "{text}");
    let (_, stderr) = texts(&place.gneiss(["sweep", "sweep.toml"]).success());
    assert!(stderr.contains("is now runs/s~1") && place.path("runs/s~1/metrics.jsonl").is_file(), "{stderr}");
    assert_eq!(
        Config::load(&place.path("runs/s/config.toml"), &[]).unwrap(),
        Config::load(&place.path("sweep.toml"), &[]).unwrap()
    );
    // A folder that was moved goes on where it is now.
    std::fs::rename(place.path("runs/s"), place.path("runs/t")).unwrap();
    place.gneiss(["sweep", "--resume", "runs/t"]).success();
    let mut inside = Command::new(env!("CARGO_BIN_EXE_gneiss"));
    let assert = inside.current_dir(place.path("runs/t")).args(["report", "."]).assert().success();
    assert_eq!(texts(&assert).0, "./sweep.html\n");
    assert!(!place.path("runs/s").exists());
}

#[test]
fn bad_sweeps_are_refused_before_anything_is_written() {
    let place = Place::with_sweep(1, SWEEP);
    place.refuses(["sweep"], &["CONFIG", "--resume"]);
    place.refuses(["sweep", "dogs.toml"], &["[sweep.parameters]: required"]);
    place.refuses(["sweep", "sweep.toml", "--resume", "runs/s"], &["--resume"]);
    place.refuses(["sweep", "--resume", "runs/s"], &["runs/s", "folder of a sweep", "found none"]);
    place.refuses(["sweep", "sweep.toml", "--set", "data.train=no.csv"], &["no.csv", "o such file"]);
    let (_, stderr) = texts(&place.gneiss(["inspect", "sweep.toml"]).success());
    assert!(stderr.contains("sweep      6 trials"), "{stderr}");
    place.write(
        "bad.toml",
        &format!("{CONFIG}[sweep.parameters]\n\"train.beta1\" = {{ values = [0.5, 1.5] }}\n"),
    );
    place.refuses(["inspect", "bad.toml"], &["trial 002 (train.beta1 = 1.5)", "below 1"]);
    place.write(
        "long.toml",
        &format!("{CONFIG}[sweep.parameters]\n\"prompt.num_virtual_tokens\" = {{ values = [5, 300] }}\n"),
    );
    place.refuses(["sweep", "long.toml"], &["positions", "num_virtual_tokens"]);
    assert!(!place.path("runs").exists());
}

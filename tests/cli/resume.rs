//! Runs that are killed or interrupted, and go on.

use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(super) const WEIGHTS: &str = "adapter/adapter_model.safetensors";
/// 3 steps an epoch.
const LONG: [&str; 6] =
    ["tune", "dogs.toml", "--set", "train.num_epochs=60", "--set", "train.checkpoint_steps=2"];

impl Place {
    /// Starts [`LONG`] where no run of that name is.
    fn spawn_long(&self) -> Child {
        let run = self.path("runs/dogs");
        if run.exists() {
            std::fs::remove_dir_all(run).unwrap();
        }
        self.spawn(&LONG)
    }

    pub(super) fn spawn(&self, args: &[&str]) -> Child {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").args(args);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(super) fn lines(&self, name: &str) -> usize {
        std::fs::read_to_string(self.path(name)).map_or(0, |text| text.matches('\n').count())
    }

    /// Records without their wall times, which no two runs share.
    pub(super) fn records(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let plain = |line: &str| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            let object = record.as_object_mut().unwrap();
            assert!(object.remove("seconds").is_some() && object.remove("elapsed").is_some());
            record
        };
        text.lines().map(plain).collect()
    }

    fn elapsed(&self, run: &str) -> Vec<f64> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let of = |line: &str| serde_json::from_str::<Value>(line).unwrap()["elapsed"].as_f64().unwrap();
        text.lines().map(of).collect()
    }
}

/// Waits until the run has written `lines` records, then signals it.
#[cfg(unix)]
pub(super) fn signal_after(place: &Place, child: &Child, lines: usize, signal: i32) {
    let until = Instant::now() + Duration::from_secs(120);
    while place.lines("runs/dogs/metrics.jsonl") < lines {
        assert!(Instant::now() < until, "no {lines} records within two minutes");
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: signals a child of this process that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

pub(super) fn ended(child: Child) -> (ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

/// Whatever the step that a run is killed at, and however often, it ends with the same prompt and the same records.
#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let place = Place::new();
    place.gneiss(LONG.into_iter().chain(["--set", "name=whole"])).success();
    let whole = place.files("runs/whole");
    assert_eq!(place.records("runs/whole").len(), 60 * 4);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..3 {
        let mut child = place.spawn_long();
        let mut at = 6;
        let mut kills = 0;
        loop {
            at += rng.random_range(1..60);
            if at >= 230 {
                break;
            }
            signal_after(&place, &child, at, libc::SIGKILL);
            let (status, _) = ended(child);
            assert!(!status.success() || place.lines("runs/dogs/metrics.jsonl") == 240);
            kills += 1;
            child = place.spawn(&["tune", "--resume", "runs/dogs"]);
        }
        let (status, stderr) = ended(child);
        assert!(status.success(), "{stderr}");
        assert!(kills >= 2, "killed {kills} times");
        let files = place.files("runs/dogs");
        assert!(files[Path::new(WEIGHTS)] == whole[Path::new(WEIGHTS)], "another prompt");
        assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
        let elapsed = place.elapsed("runs/dogs");
        assert!(elapsed.is_sorted(), "wall time goes on: {elapsed:?}");
        assert!(files[Path::new("tokens.json")] == whole[Path::new("tokens.json")], "another start");
        let (ours, theirs) = (place.json("runs/dogs/summary.json"), place.json("runs/whole/summary.json"));
        assert_eq!(ours["status"], json!({"state": "completed"}));
        for key in ["steps", "epochs", "kept_step", "kept_epoch", "train_loss", "validation_loss", "started"]
        {
            assert!(key == "started" || ours[key] == theirs[key], "{key}: {} and {}", ours[key], theirs[key]);
        }
        assert!(ours["resumed"].as_u64().unwrap() >= 2);
    }
}

/// A second program would move the folder of the first away, or write over its checkpoint.
#[cfg(unix)]
#[test]
fn a_folder_that_a_run_writes_is_refused_to_others() {
    let place = Place::new();
    let mut child = place.spawn_long();
    signal_after(&place, &child, 8, libc::SIGSTOP);
    let process = format!("process {}", child.id());
    let parts = ["runs/dogs", &process, "hint", "name="];
    let before = place.files("runs/dogs");
    place.refuses(["tune", "--resume", "runs/dogs"], &parts);
    place.refuses(["tune", "dogs.toml", "--resume", "auto"], &parts);
    place.refuses(["tune", "dogs.toml"], &parts);
    place.refuses(["tune", "dogs.toml", "--seeds", "2"], &parts);
    place.refuses(["tutorial", "dogs.toml"], &parts);
    // What only reads it works.
    place.gneiss(["report", "runs/dogs", "--csv"]).success();
    assert!(place.files("runs/dogs") == before, "a refused command changed the folder");
    assert!(!place.path("runs/dogs~1").exists());
    child.kill().unwrap();
    ended(child);
    place.gneiss(["tune", "--resume", "runs/dogs"]).success();
    assert_eq!(place.records("runs/dogs").len(), 60 * 4);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_step_keeps_everything_and_says_how_to_go_on() {
    let place = Place::new();
    place.gneiss(LONG.into_iter().chain(["--set", "name=whole"])).success();
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let child = place.spawn_long();
        signal_after(&place, &child, 20, signal);
        let (status, stderr) = ended(child);
        assert_eq!(status.code(), Some(130), "{stderr}");
        assert!(stderr.contains("go on with: gneiss tune --resume runs/dogs"), "{stderr}");
        let summary = place.json("runs/dogs/summary.json");
        assert_eq!(summary["status"], json!({"state": "interrupted"}));
        let steps = summary["steps"].as_u64().unwrap();
        assert!((15..180).contains(&steps), "{summary}");
        Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
        for name in ["report.html", "curve.svg", "curve.png", "tokens.json", "checkpoint.safetensors"] {
            assert!(place.path("runs/dogs").join(name).is_file(), "{name}");
        }
        place.gneiss(["tune", "--resume", "runs/dogs"]).success();
        assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
        assert!(
            place.files("runs/dogs")[Path::new(WEIGHTS)] == place.files("runs/whole")[Path::new(WEIGHTS)]
        );
    }
}

#[test]
fn a_finished_run_goes_on_where_it_is_given_more_epochs() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let first = place.records("runs/dogs");
    let (_, stderr) = texts(&place.gneiss(["tune", "--resume", "runs/dogs"]).success());
    assert!(stderr.contains("after step 9 of 9"), "{stderr}");
    assert_eq!(place.records("runs/dogs"), first, "nothing was left to do");
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=5"]).success();
    let records = place.records("runs/dogs");
    assert_eq!((records.len(), &records[..first.len()]), (20, &first[..]));
    assert_eq!(place.json("runs/dogs/summary.json")["epochs"], json!(5));
    let config = Config::load(&place.path("runs/dogs/config.toml"), &[]).unwrap();
    assert_eq!(config.train.num_epochs, 5);
}

#[test]
fn an_evaluation_of_an_earlier_prompt_is_set_aside() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs"]).success();
    let evaluated = |name: &str| place.path("runs/dogs").join(name).is_file();
    // Nothing left to do: the prompt is the same.
    place.gneiss(["tune", "--resume", "runs/dogs"]).success();
    assert!(evaluated("evaluation.json") && evaluated("predictions.csv"));
    let more = ["tune", "--resume", "runs/dogs", "--set", "train.num_epochs=30"];
    place.gneiss(more).success();
    assert!(!evaluated("evaluation.json") && !evaluated("predictions.csv"));
    assert!(evaluated("evaluation~1.json") && evaluated("predictions~1.csv"));
    let report = std::fs::read_to_string(place.path("runs/dogs/report.html")).unwrap();
    assert!(!report.contains("<section id=\"evaluation\">"));
}

#[test]
fn what_can_not_go_on_is_refused() {
    let place = Place::new();
    place.refuses(["tune", "--resume", "runs/dogs"], &["runs/dogs", "run folder"]);
    place.refuses(["tune", "dogs.toml", "--resume", "runs/dogs"], &["--resume"]);
    place.gneiss(["tune", "dogs.toml"]).success();
    let files = || {
        let mut files = place.files("runs/dogs");
        assert!(
            files.remove(Path::new("lock")).is_some(),
            "the number of the process that last wrote the folder"
        );
        files
    };
    let before = files();
    place.refuses(
        ["tune", "--resume", "runs/dogs", "--set", "train.seed=7"],
        &["--resume", "train.num_epochs", "start a new run"],
    );
    place.write("train.csv", &reviews(11));
    place.refuses(
        ["tune", "--resume", "runs/dogs"],
        &["12 training, 4 validation", "11 training", "data.train"],
    );
    place.write("train.csv", &reviews(12));
    assert!(files() == before, "a refusal changes nothing");
    let checkpoint = place.path("runs/dogs/checkpoint.safetensors");
    let whole = std::fs::read(&checkpoint).unwrap();
    std::fs::write(&checkpoint, &whole[..whole.len() / 2]).unwrap();
    place.refuses(["tune", "--resume", "runs/dogs"], &["checkpoint.safetensors", "safetensors file"]);
    std::fs::remove_file(&checkpoint).unwrap();
    place.refuses(["tune", "--resume", "runs/dogs"], &["runs/dogs", "checkpoint.safetensors", "config.toml"]);
}

/// Validation targets that training pulls away from: the loss rises after some epochs.
#[test]
fn early_stopping_ends_a_run_whose_validation_loss_stands() {
    let place = Place::new();
    let turned = reviews(4).replace(",1\n", ",x\n").replace(",0\n", ",1\n").replace(",x\n", ",0\n");
    place.write("validation.csv", &turned);
    let args = ["tune", "dogs.toml", "--set", "train.num_epochs=200", "--set", "train.early_stopping=3"];
    let (stdout, _) = texts(&place.gneiss(args).success());
    assert!(stdout.contains("stopped early"), "{stdout}");
    let summary = place.json("runs/dogs/summary.json");
    let of = |key: &str| summary[key].as_u64().unwrap();
    assert_eq!(of("epochs"), of("kept_epoch") + 3);
    assert!(of("epochs") < 200);
    // It stays ended, and goes on where it is told to wait longer.
    place.gneiss(["tune", "--resume", "runs/dogs"]).success();
    assert_eq!(place.json("runs/dogs/summary.json")["epochs"], summary["epochs"]);
    place.gneiss(["tune", "--resume", "runs/dogs", "--set", "train.early_stopping=5"]).success();
    assert!(place.json("runs/dogs/summary.json")["epochs"].as_u64().unwrap() > of("epochs"));
}

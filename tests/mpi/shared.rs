//! `gneiss eval` and `gneiss sweep` on ranks: each has some of the rows, or of the trials.

use super::place::Place;
use gneiss::evaluate::Evaluation;
use serde_json::Value;

const PRUNED: &str = r#"
[sweep]
grace_period = 1
reduction_factor = 2

[sweep.parameters]
"train.learning_rate" = { values = [0.01, 0.03, 0.1] }
"prompt.num_virtual_tokens" = { values = [3, 5] }
"#;

/// dogs.toml with a sweep that prunes, as sweep.toml.
fn add_sweep(place: &Place) {
    let config = std::fs::read_to_string(place.path("dogs.toml")).unwrap();
    place.write("sweep.toml", &format!("{config}{PRUNED}"));
}

/// The course of a sweep: what it decided, and the records and prompt of each trial.
#[derive(Debug, PartialEq)]
struct Course {
    decisions: String,
    trials: Vec<(Vec<Value>, Vec<u8>)>,
}

fn course(place: &Place, name: &str) -> Course {
    let folder = format!("runs/{name}");
    let decisions = std::fs::read_to_string(place.path(&folder).join("sweep.jsonl")).unwrap();
    let trial = |number: usize| {
        let trial = format!("{folder}/trials/{number:03}");
        assert!(place.path(&trial).join("report.html").is_file(), "{trial}");
        (place.records(&trial), place.adapter_bytes(&trial))
    };
    Course { decisions, trials: (1..=6).map(trial).collect() }
}

/// Each trial is tuned by one rank, so all bits are those of one process.
#[test]
fn ranks_share_the_trials_of_a_sweep_that_prunes() {
    let Some(place) = Place::new() else { return };
    add_sweep(&place);
    place.succeeds(&["sweep", "sweep.toml", "--set", "name=one"]);
    let expected = course(&place, "one");
    let Course { decisions, .. } = &expected;
    assert!(decisions.contains("\"rung\"") && decisions.contains("\"pruned\":["), "{decisions}");
    for ranks in [2, 5] {
        let name = format!("name=on-{ranks}");
        let (stdout, stderr) = place.mpirun(ranks, &["sweep", "sweep.toml", "--set", &name]);
        assert!(stderr.contains(&format!("ranks      {ranks}, which share the trials")), "{stderr}");
        assert_eq!(stdout.matches("validation loss").count(), 1, "rank 0 alone prints: {stdout}");
        assert!(stderr.contains("[rank 1] trial "), "{stderr}");
        assert_eq!(course(&place, &format!("on-{ranks}")), expected, "{ranks} ranks");
        let best = std::fs::read_link(place.path(&format!("runs/on-{ranks}/best"))).unwrap();
        assert_eq!(best, std::fs::read_link(place.path("runs/one/best")).unwrap());
    }
    let (stdout, _) = place.mpirun(2, &["tune", "dogs.toml", "--seeds", "3", "--set", "train.num_epochs=1"]);
    assert!(stdout.contains("seed"), "{stdout}");
}

#[test]
fn a_sweep_of_which_a_rank_was_killed_goes_on_bit_for_bit() {
    let Some(place) = Place::new() else { return };
    add_sweep(&place);
    let long = ["--set", "train.num_epochs=60"];
    place.succeeds(&[&["sweep", "sweep.toml", "--set", "name=one"], &long[..]].concat());
    let expected = course(&place, "one");
    let mut command = [&["sweep", "sweep.toml"], &long[..]].concat();
    for (rank, records) in [(1, 8), (0, 30)] {
        let running = place.start(2, &command);
        running.wait_for(&place, "runs/dogs/trials/001", records);
        running.kill(rank, libc::SIGKILL);
        let (code, stderr) = running.ended();
        assert_ne!(code, Some(0), "{stderr}");
        command = vec!["sweep", "--resume", "runs/dogs"];
    }
    let (code, stderr) = place.start(2, &command).ended();
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(course(&place, "dogs"), expected);
}

/// Seven rows on two and on nine ranks, of a plain evaluation and of an ensemble.
#[test]
fn ranks_share_the_rows_of_an_evaluation() {
    let Some(place) = Place::new() else { return };
    place.succeeds(&["tune", "dogs.toml"]);
    place.succeeds(&["tune", "dogs.toml", "--set", "name=short", "--set", "prompt.num_virtual_tokens=3"]);
    let eval = |ensemble: &[&'static str]| {
        let prompts = ["--adapter", "runs/dogs", "--adapter", "runs/short", "--out", "out", "--json"];
        let options = ["eval", "dogs.toml", "--set", "data.test=test.csv"];
        [&options[..], &prompts, ensemble].concat()
    };
    for ensemble in [&[][..], &["--ensemble"]] {
        let read = |stdout: &str| serde_json::from_str::<Evaluation>(stdout).unwrap();
        let one = read(&place.succeeds(&eval(ensemble)).0);
        for ranks in [2, 9] {
            let found = read(&place.mpirun(ranks, &eval(ensemble)).0);
            assert_eq!(found.ensemble.is_some(), !ensemble.is_empty());
            assert_eq!(found.arms.len(), one.arms.len());
            for (found, one) in found.arms.iter().zip(&one.arms) {
                assert!((found.answers.loss - one.answers.loss).abs() < 1e-5, "{}", found.name);
                for (found, one) in found.answers.predictions.iter().zip(&one.answers.predictions) {
                    assert_eq!(
                        (found.line, &found.generated, &found.likeliest),
                        (one.line, &one.generated, &one.likeliest)
                    );
                    for (found, one) in found.probabilities.iter().zip(&one.probabilities) {
                        assert!((found - one).abs() < 1e-5, "{found} for {one}");
                    }
                }
            }
        }
    }
    // Rank 1 reads another file of the same name.
    let other = place.copy();
    let text = std::fs::read_to_string(place.path("test.csv")).unwrap();
    other.write("test.csv", &text.replace("happy", "gentle"));
    let base = ["eval", "dogs.toml", "--set", "data.test=test.csv", "--adapter"];
    let adapter = place.path("runs/dogs").display().to_string();
    let command = [&base[..], &[adapter.as_str()]].concat();
    let (code, _, stderr) = place.mpirun_two(&command, &other, &command);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("rows and labels: expected the same on ranks 0 and 1"), "{stderr}");
}

//! `gneiss tune` on several processes of MPI: `make test-mpi`. Without mpirun the tests are skipped with a word, unless
//! `GNEISS_REQUIRE_MPI` is set.

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod place;
mod shared;

use place::{Place, difference};
use serde_json::Value;

/// What one process does, and its records.
fn one_process(place: &Place) -> Vec<Value> {
    place.succeeds(&["tune", "dogs.toml", "--set", "name=one"]);
    place.records("runs/one")
}

/// GB that a run may plan with, from its line `memory     12.34 GB free; ...`.
fn free_gigabytes(stderr: &str) -> f64 {
    let line = stderr.lines().find(|line| line.starts_with("memory     ")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Each plans with its part of the machine's memory.
#[test]
fn ranks_of_one_machine_share_its_memory() {
    let Some(place) = Place::new() else { return };
    let run = ["tune", "dogs.toml", "--set", "train.max_steps=1"];
    let one = free_gigabytes(&place.succeeds(&run).1);
    let four = free_gigabytes(&place.mpirun(4, &run).1);
    assert!(four < one / 3.0, "{four} of {one} GB");
}

/// 12 examples in steps of 5, so that the last of each epoch has two; 4 epochs are 12 steps.
#[test]
fn two_ranks_tune_as_one_process_does() {
    let Some(place) = Place::new() else { return };
    let expected = one_process(&place);
    let (stdout, stderr) = place.mpirun(2, &["tune", "dogs.toml", "--set", "name=two"]);
    assert_eq!(stdout.matches("validation loss").count(), 1, "rank 0 alone prints: {stdout}");
    assert_eq!(stderr.matches("model      model").count(), 1, "{stderr}");
    assert!(stderr.contains("ranks      2"), "{stderr}");
    let found = place.records("runs/two");
    assert_eq!(found.len(), expected.len());
    assert_eq!(found.iter().filter(|record| record.get("step").is_some()).count(), 12 + 4);
    for (found, one) in found.iter().zip(&expected) {
        for key in ["loss", "train_loss", "validation_loss"] {
            let [found, one] = [found, one].map(|record| record.get(key).and_then(Value::as_f64));
            assert_eq!(found.is_some(), one.is_some(), "{key}");
            if let (Some(found), Some(one)) = (found, one) {
                assert!((found - one).abs() < 1e-5, "{key}: {found} for {one}");
            }
        }
    }
    let difference = difference(&place.adapter("runs/one"), &place.adapter("runs/two"));
    assert!(difference < 1e-3, "the prompts differ by {difference}");
    // The same again: the same bits.
    place.mpirun(2, &["tune", "dogs.toml", "--set", "name=again"]);
    assert_eq!(place.records("runs/again"), found);
    assert_eq!(place.adapter_bytes("runs/again"), place.adapter_bytes("runs/two"));
}

/// Two bytes a gradient in bf16 passes, three decimals of a loss: the sums are f32 and f64, the rest is the CPU's bf16. At the
/// learning rate of the other tests the losses of both go apart by themselves, on some CPUs by 2.5 % after 12 steps.
#[test]
fn two_ranks_tune_in_bf16() {
    let Some(place) = Place::new() else { return };
    let rate = "train.learning_rate=0.005";
    let tune = |name: &'static str| ["tune", "dogs.toml", "--dtype", "bf16", "--set", rate, "--set", name];
    place.succeeds(&tune("name=one"));
    place.mpirun(2, &tune("name=two"));
    place.mpirun(2, &tune("name=again"));
    let (one, two) = (place.records("runs/one"), place.records("runs/two"));
    assert_eq!(place.records("runs/again"), two, "twice the same bits");
    assert_eq!(place.adapter_bytes("runs/again"), place.adapter_bytes("runs/two"));
    assert_eq!(two.len(), one.len());
    for (found, one) in two.iter().zip(&one).filter(|(_, one)| one.get("loss").is_some()) {
        let [found, one] = [found, one].map(|record| record["loss"].as_f64().unwrap());
        assert!((found - one).abs() < 0.01 * one, "{found} for {one}");
    }
}

/// A step of 5 examples on 6 ranks: one has none.
#[test]
fn more_ranks_than_examples() {
    let Some(place) = Place::new() else { return };
    let expected = one_process(&place);
    place.mpirun(6, &["tune", "dogs.toml", "--set", "name=six"]);
    let found = place.records("runs/six");
    assert_eq!(found.len(), expected.len());
    for (found, one) in found.iter().zip(&expected).filter(|(_, one)| one.get("loss").is_some()) {
        let [found, one] = [found, one].map(|record| record["loss"].as_f64().unwrap());
        assert!((found - one).abs() < 1e-5, "{found} for {one}");
    }
}

#[test]
fn a_mismatch_of_ranks_names_them() {
    let Some(place) = Place::new() else { return };
    // Rank 1 reads another file of the same name.
    let other = place.copy();
    let text = std::fs::read_to_string(other.path("train.csv")).unwrap();
    std::fs::write(other.path("train.csv"), text.replace("happy", "gentle")).unwrap();
    let (code, _, stderr) = place.mpirun_two(&["tune", "dogs.toml"], &other, &["tune", "dogs.toml"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("error: examples: expected the same on ranks 0 and 1"), "{stderr}");
    assert!(!place.path("runs/dogs").exists(), "nothing is written before");
    // Another option on rank 1.
    let options = ["tune", "dogs.toml", "--set", "train.seed=5"];
    let (code, _, stderr) = place.mpirun_two(&["tune", "dogs.toml"], &place, &options);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("configuration: ") && stderr.contains("train.seed"), "{stderr}");
    // A file that rank 1 alone does not have.
    std::fs::remove_file(other.path("train.csv")).unwrap();
    let (code, _, stderr) = place.mpirun_two(&["tune", "dogs.toml"], &other, &["tune", "dogs.toml"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("error: rank 1: ") && stderr.contains("train.csv"), "{stderr}");
    // One that no rank has is no matter of ranks, and is said once.
    let (code, _, stderr) = place.mpirun_two(&["tune", "none.toml"], &place, &["tune", "none.toml"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.matches("none.toml").count() == 1 && !stderr.contains("error: rank"), "{stderr}");
}

#[test]
fn other_commands_are_refused() {
    let Some(place) = Place::new() else { return };
    let (code, _, stderr) = place.mpirun_two(&["inspect", "dogs.toml"], &place, &["inspect", "dogs.toml"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(
        stderr.contains("gneiss inspect: expected one process, found 2 (OMPI_COMM_WORLD_SIZE=2)"),
        "{stderr}"
    );
    let (code, _, stderr) =
        place.mpirun_two(&["tune", "dogs.toml", "--find-lr"], &place, &["tune", "dogs.toml", "--find-lr"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("--find-lr: expected one process, found 2 ranks"), "{stderr}");
}

//! Event files, as the `tensorboard` package reads them. Where no Python has it the tests say so and pass, unless
//! GNEISS_REQUIRE_TENSORBOARD=1.

#[path = "../common/mod.rs"]
mod common;

use gneiss::run::tensorboard::EventFile;
use gneiss::tune::{EpochRecord, StepRecord};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn read(folder: &Path) -> Option<Value> {
    let python = common::python::python_with(&["tensorboard"], "GNEISS_REQUIRE_TENSORBOARD")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/run/read_events.py");
    let output = Command::new(python).arg(script).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn step(step: usize, loss: f64) -> StepRecord {
    StepRecord {
        step,
        epoch: 1,
        loss,
        learning_rate: 0.5,
        grad_norm: 3.0,
        examples: 8,
        target_tokens: 16,
        rows: 300,
        seconds: 2.0,
        elapsed: 2.0,
    }
}

fn epoch(step: usize, validation_loss: Option<f64>) -> EpochRecord {
    let train_loss = Some(0.25);
    EpochRecord { epoch: 1, step, train_loss, validation_loss, best: true, seconds: 9.0, elapsed: 9.0 }
}

/// Steps beyond one and two bytes of a varint, and a value beyond f32's digits.
#[test]
fn scalars_are_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut events = EventFile::create(folder.path(), 0).unwrap();
    for (at, loss) in [(1, 6.5), (127, 2.0), (128, 1.5), (20_000, 0.125), (3_000_000, 0.1)] {
        events.step(&step(at, loss)).unwrap();
    }
    events.epoch(&epoch(200, Some(0.75))).unwrap();
    events.epoch(&epoch(400, None)).unwrap();
    let Some(found) = read(folder.path()) else { return };
    assert_eq!(
        found["train/loss"],
        json!([[1, 6.5], [127, 2.0], [128, 1.5], [20_000, 0.125], [3_000_000, f64::from(0.1f32)]])
    );
    assert_eq!(found["train/learning_rate"][4], json!([3_000_000, 0.5]));
    assert_eq!(found["train/grad_norm"][0], json!([1, 3.0]));
    assert_eq!(found["train/examples_per_second"][0], json!([1, 4.0]));
    assert_eq!(found["epoch/train_loss"], json!([[200, 0.25], [400, 0.25]]));
    assert_eq!(found["epoch/validation_loss"], json!([[200, 0.75]]));
}

/// Steps that were done again are there once, as they were done last.
#[test]
fn a_resumed_run_replaces_what_it_does_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = EventFile::create(folder.path(), 0).unwrap();
    (1..=5).for_each(|at| first.step(&step(at, 1.0)).unwrap());
    let mut second = EventFile::create(folder.path(), 3).unwrap();
    (4..=6).for_each(|at| second.step(&step(at, 2.0)).unwrap());
    let Some(found) = read(folder.path()) else { return };
    let expected = json!([[1, 1.0], [2, 1.0], [3, 1.0], [4, 2.0], [5, 2.0], [6, 2.0]]);
    assert_eq!(found["train/loss"], expected);
}

//! Memory of the device: plans, too little of it, and what a driver does not tell.

use crate::place::{Place, assert_follow, refused, stderr, succeeded};

const TUNE: [&str; 5] = ["tune", "dogs.toml", "--device", "cuda", "--json"];

/// What the driver says there is, bytes; the plan takes its reserve of 1 GB from it.
const SAID: u64 = 4 << 30;

/// Settings for a device on which others use all but `left` bytes, of which the driver says nothing.
fn left(left: u64) -> String {
    format!("memory={SAID},hidden={}", SAID - left)
}

/// Whatever memory there is, a run ends with the losses of the CPU, or with an error that says what is missing.
#[test]
fn too_little_memory_is_met_by_less_at_a_time_and_then_by_an_error() {
    let place = Place::new();
    let more = ["--set", "train.batch_size=12"];
    let expected = place.losses_of_the_cpu(&more);
    let (mut at_once, mut by_less, mut failed) = (0, 0, 0);
    // cuBLAS has 33.6 MB of it, the weights 0.9.
    for tenth in 335..358 {
        let output = place.cuda(&left(tenth * 100_000), TUNE.into_iter().chain(more));
        if output.status.success() {
            let retried = stderr(&output).contains("out of memory: trying again");
            *if retried { &mut by_less } else { &mut at_once } += 1;
            assert_follow(&place.losses("runs/dogs"), &expected, 2e-5);
            std::fs::remove_dir_all(place.path("runs/dogs")).unwrap();
        } else {
            failed += 1;
            refused(&output, 1, &["memory"]);
        }
    }
    assert!(
        at_once > 0 && by_less > 0 && failed > 0,
        "{at_once} at once, {by_less} by less, {failed} failed"
    );
}

/// Memory that others take during a run ends it, and the prompt of the last step is kept.
#[test]
fn a_run_that_runs_out_of_memory_keeps_its_prompt() {
    let place = Place::new();
    let steps = ["--set", "train.num_epochs=40", "--set", "train.checkpoint_steps=1"];
    let settings = format!("{},hidden_after=2000", left(33_900_000));
    let output = place.cuda(&settings, TUNE.into_iter().chain(steps));
    refused(&output, 1, &["memory"]);
    let done = place.losses("runs/dogs").len();
    assert!(done > 3, "{done} steps");
    gneiss::prompt::peft::Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    // With its memory back it goes on.
    succeeded(&place.cuda("", ["tune", "--resume", "runs/dogs"]));
    assert_eq!(place.losses("runs/dogs").len(), 40 * 4);
}

/// An 8b's weights in bf16 are 16.5 GB: a device of 24 GB runs its steps in passes of fewer rows.
#[test]
fn a_plan_of_an_8b_fits_a_device_of_24_gb() {
    let place = Place::new();
    let shape = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/models/granite-4.1-8b.json");
    let bench = ["bench", "--model-config", shape, "--device", "cuda", "--batch", "8", "--accumulate", "32"];
    let steps = ["--virtual-tokens", "100", "--steps", "1", "--json"];
    let rows = |memory: &str| {
        let settings = format!("dry=1,memory={memory}");
        let output = place.cuda(&settings, bench.into_iter().chain(steps));
        let text = succeeded(&output);
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        found["cases"][0]["max_rows"].as_u64().unwrap_or_else(|| panic!("{text}"))
    };
    let (small, large) = (rows("24e9"), rows("80e9"));
    assert!(small < large, "{small} and {large} rows at a time");
    let output = place.cuda("dry=1,memory=16e9", bench.into_iter().chain(steps));
    refused(&output, 1, &["memory"]);
}

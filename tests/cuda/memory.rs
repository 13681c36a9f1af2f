//! Memory of the device: plans, too little of it, and what a driver does not tell.

use crate::place::{Place, assert_follow, refused, stderr, succeeded};

const TUNE: [&str; 5] = ["tune", "dogs.toml", "--device", "cuda", "--json"];

/// 36 MB: cuBLAS's workspace, the weights and little more.
const ENOUGH: u64 = 40 << 20;

/// Whatever memory there is, a run ends with the losses of the CPU or with an error that says what is missing, and never with
/// another answer. `hidden` bytes are in use by others, and the driver does not say so.
#[test]
fn too_little_memory_is_met_by_less_at_a_time_and_then_by_an_error() {
    let place = Place::new();
    let expected = place.losses_of_the_cpu(&[]);
    let (mut finished, mut less, mut failed) = (0, 0, 0);
    for hidden in [0, 2 << 20, 4 << 20, 5 << 20, 6 << 20, 7 << 20, 8 << 20, 16 << 20] {
        let settings = format!("memory={ENOUGH},hidden={hidden}");
        let output = place.cuda(&settings, TUNE);
        if output.status.success() {
            finished += 1;
            less += usize::from(stderr(&output).contains("out of memory"));
            assert_follow(&place.losses("runs/dogs"), &expected, 2e-5);
            std::fs::remove_dir_all(place.path("runs/dogs")).unwrap();
        } else {
            failed += 1;
            refused(&output, 1, &["memory"]);
        }
    }
    assert!(finished > 0 && less > 0 && failed > 0, "{finished} runs ended, {less} with less at a time; {failed} failed");
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
        found["steps"][0]["max_rows"].as_u64().unwrap_or_else(|| panic!("{text}"))
    };
    let (small, large) = (rows("24e9"), rows("80e9"));
    assert!(small < large, "{small} and {large} rows at a time");
    let output = place.cuda("dry=1,memory=16e9", bench.into_iter().chain(steps));
    refused(&output, 1, &["memory"]);
}

//! Calls of the driver that a step makes.

use crate::place::{Place, assert_follow, stderr, succeeded};
use std::collections::HashMap;

/// Calls of one step: those of a run of four steps less those of a run of two, halved.
fn calls_of_a_step(place: &Place) -> HashMap<String, f64> {
    let of = |steps: &str| {
        let steps = format!("train.max_steps={steps}");
        let args = [
            "tune", "dogs.toml", "--device", "cuda", "--set", &steps, "--set", "data.validation=", "--set",
            "train.keep=last",
        ];
        succeeded(&place.cuda("", args));
        std::fs::remove_dir_all(place.path("runs/dogs")).unwrap();
        let mut by_kind = HashMap::<String, f64>::new();
        for ((kind, _), calls) in place.calls() {
            *by_kind.entry(kind).or_default() += calls as f64;
        }
        by_kind
    };
    let (two, four) = (of("2"), of("4"));
    four.into_iter()
        .map(|(kind, calls)| (kind.clone(), (calls - two.get(&kind).unwrap_or(&0.0)) / 2.0))
        .collect()
}

#[test]
fn a_step_makes_no_more_calls_than_it_needs() {
    let place = Place::new();
    let calls = calls_of_a_step(&place);
    let of = |kind: &str| calls.get(kind).copied().unwrap_or(0.0);
    // Three layers of 21 launches, and the ends (LOG.md).
    let launches = of("kernel") + of("candle's kernel") + of("product");
    assert!(launches > 0.0 && launches <= 90.0, "{calls:?}");
    // One upload and one download, and the event that tells when the upload's memory is free again. Events of every tensor
    // are for several streams, of which there is one.
    assert!(of("copy") <= 6.0 && of("wait") <= 3.0 && of("event") <= 2.0, "{calls:?}");
}

/// How the device is set up: sums of 16-bit products are f32, and the pool keeps what is freed.
#[test]
fn products_add_up_in_f32_and_the_pool_keeps_its_memory() {
    let place = Place::new();
    succeeded(&place.cuda("", ["tune", "dogs.toml", "--device", "cuda", "--set", "model.dtype=bf16"]));
    let calls = place.calls();
    let of = |kind: &str, name: &str| calls.get(&(kind.into(), name.into())).copied().unwrap_or(0);
    assert!(of("product in 16 bits", "sums are f32") > 100, "{calls:?}");
    assert_eq!(of("product in 16 bits", "sums may be 16 bits"), 0);
    assert_eq!(of("pool", "release threshold set"), 1);
}

/// Where cuBLASLt has no algorithm, cublasGemmEx makes the product, and that is said.
#[test]
fn products_without_an_algorithm_are_made_by_cublas() {
    let place = Place::new();
    let expected = place.losses_of_the_cpu(&[]);
    let args = ["tune", "dogs.toml", "--device", "cuda"];
    let output = place.cuda("algorithms=0", args);
    succeeded(&output);
    assert!(stderr(&output).contains("cublasGemmEx"), "{}", stderr(&output));
    assert_follow(&place.losses("runs/dogs"), &expected, 2e-5);
}

//! The program of a CUDA build, run on a stand-in for CUDA's libraries (tests/stand_in/cuda): `make test-cuda`.
//!
//! What the device computes is held against the same program on the CPU.

#[path = "../common/mod.rs"]
mod common;
mod counts;
mod devices;
mod graphs;
mod memory;
mod place;
mod serve;
mod tune;

use place::Place;

/// All ops in all dtypes against the CPU's, and short runs.
#[test]
fn check_compares_every_op_with_the_cpu() {
    let place = Place::new();
    let output = place.cuda("", ["check", "--device", "cuda", "--steps", "4"]);
    let stdout = place::succeeded(&output);
    assert!(stdout.contains(" 0 wrong") && stdout.contains("f32, bf16, f16"), "{stdout}");
}

//! `gneiss check` as a user runs it, on the CPU.

mod gpu_check;

use assert_cmd::Command;
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn gneiss(arguments: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("gneiss").unwrap().args(["check", "--device", "cpu"]).args(arguments).assert()
}

#[test]
fn a_device_is_compared_with_the_cpu() {
    let out = gneiss(&["--op", "swiglu", "--steps", "3"]).success().get_output().stdout.clone();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("8 comparisons and 4 runs in f32: 0 wrong"), "{out}");
}

#[test]
fn every_op_can_be_compared_on_the_cpu() {
    // All of them but attention, whose many cases take long.
    let ops =
        "embed,linear,rms_norm,rope,rows,swiglu,experts,conv,ssd,gated_norm,cross_entropy,distillation,adamw";
    let out = gneiss(&["--op", ops, "--steps", "0", "--json"]).success().get_output().stdout.clone();
    let found: Value = serde_json::from_slice(&out).unwrap();
    let comparisons = found[0]["comparisons"].as_array().unwrap();
    let compared: BTreeSet<_> = comparisons.iter().map(|c| c["op"].as_str().unwrap()).collect();
    assert_eq!(compared, ops.split(',').collect());
}

#[test]
fn json_holds_every_comparison() {
    let out = gneiss(&["--op", "adamw", "--steps", "0", "--json"]).success().get_output().stdout.clone();
    let found: Value = serde_json::from_slice(&out).unwrap();
    let comparisons = found[0]["comparisons"].as_array().unwrap();
    assert!(comparisons.iter().all(|c| c["op"] == "adamw" && c["error"].as_f64() <= c["allowed"].as_f64()));
    assert_eq!((comparisons.len(), &found[0]["runs"]), (72, &json!([])));
}

#[test]
fn large_compares_at_the_sizes_of_models_and_counts_in_its_last_line() {
    let out =
        gneiss(&["--large", "--scale", "64", "--op", "swiglu,step"]).success().get_output().stdout.clone();
    let out = String::from_utf8(out).unwrap();
    // Three models: forward and backward, and loss and gradient of two steps in several passes.
    let last = "check --large in f32: 18 passed, 0 failed, 0 not run";
    assert_eq!(out.lines().last(), Some(last), "{out}");
    let out = gneiss(&["--large", "--scale", "64", "--op", "adamw", "--json"])
        .success()
        .get_output()
        .stdout
        .clone();
    let found: Value = serde_json::from_slice(&out).unwrap();
    let cases = found[0]["comparisons"].as_array().unwrap();
    assert!(cases.iter().all(|c| c["op"] == "adamw" && c["error"].as_f64() <= c["allowed"].as_f64()));
    assert_eq!((cases.len(), &found[0]["not_run"]), (9, &json!([])));
    assert!(cases[8]["case"].as_str().unwrap().starts_with("granite-4.1-8b: "), "{}", cases[8]);
}

#[test]
fn what_a_device_has_not_is_refused() {
    for (arguments, expected) in [
        (["--dtype", "bf16"], "--dtype: expected of f32 on this device, found bf16"),
        (["--op", "swish"], "found swish"),
        (["--scale", "2"], "--large"),
        (["--large", "--scale=0"], "expected 1 to 64"),
        (["--large", "--steps=3"], "--steps"),
        (["--large", "--op=swish"], "found swish"),
    ] {
        let error = gneiss(&arguments).code(2).get_output().stderr.clone();
        let error = String::from_utf8(error).unwrap();
        assert!(error.contains(expected), "{error}");
    }
}

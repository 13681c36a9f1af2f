//! `benches/gpu_check.sh` with programs in the place of gneiss that pass, fail or hang.
#![cfg(unix)]

use assert_cmd::Command;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A shell script in the place of gneiss.
fn program(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("gneiss");
    std::fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Exit code and verdicts of the script; `PATH` has nothing but the system's own programs.
fn gpu_check(folder: &Path, gneiss: &Path, device: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu_check.sh"));
    command
        .arg(gneiss)
        .arg(device)
        .env("OUT", folder)
        .env("PYTHON", "no-python")
        .env("PATH", "/usr/bin:/bin");
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let verdicts = text.split_once("== gpu-check, ").map_or("", |(_, verdicts)| verdicts);
    let text = format!("{verdicts}{}", String::from_utf8_lossy(&output.stderr));
    // Columns a space apart.
    let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    (output.status.code().unwrap(), text.lines().map(line).collect::<Vec<_>>().join("\n"))
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
}

const PASSING: &str = r#"
case "$1 $*" in
    check*--large*) echo "check --large in bf16: 9 passed, 0 failed, 1 not run" ;;
    check*) echo "8 comparisons and 4 runs in f32: 0 wrong" ;;
    bench*)
        echo "matmul peak: 700 TFLOP/s over 2 s; SHARE % of the data sheet's 990 TFLOP/s"
        echo "8 x 32, 100  162 (160-165)"
        echo "launches: 300000 a second alone; 2.5 % of 8 x 32, 100, which is BOUNDbound by launches" ;;
    generate*) echo "there was a dog" ;;
    tutorial*) echo "accuracy 95.7 %" ;;
esac"#;

fn passing(share: &str, bound: &str) -> String {
    PASSING.replace("SHARE", share).replace("BOUND", bound)
}

#[test]
fn what_passes_and_what_is_not_here_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    std::fs::write(&model, "").unwrap();
    let gneiss = program(folder.path(), &passing("70.7", "not "));
    let (code, text) = gpu_check(folder.path(), &gneiss, "cuda:1", &[("MODEL", model.to_str().unwrap())]);
    assert_eq!(code, 0, "{text}");
    for expected in [
        "cuda:1 against the CPU passed: 8 comparisons and 4 runs in f32: 0 wrong",
        "real sizes passed: check --large in bf16: 9 passed, 0 failed, 1 not run",
        "step, granite-4.1-8b passed: 8 x 32, 100 162 (160-165)",
        "tutorial passed: accuracy 95.7 %",
        "beside PEFT not run: no-python has no torch, transformers and peft",
    ] {
        assert!(text.lines().any(|line| line == expected), "expected {expected:?} in: {text}");
    }
    has(&text, &["sustained matmul, granite-3.3-2b passed", "launches, granite-4.0-350m passed"]);
    has(&text, &["decoding by graphs passed: the same tokens; ", " us a token without graphs, "]);
    assert_eq!(text.matches(" not run: ").count(), 3, "sanitizer, nsys, PEFT: {text}");
    assert!(!text.contains("what to do"), "{text}");
}

#[test]
fn what_fails_says_what_to_do_and_the_rest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let gneiss = program(
        folder.path(),
        &format!(
            "case \"$*\" in *--large*) echo 'error: off by one' >&2; exit 1 ;; esac{}",
            passing("41.2", "")
        ),
    );
    let steps = [("STEPS", "large bench check"), ("MODELS", "granite-4.1-8b")];
    let (code, text) = gpu_check(folder.path(), &gneiss, "cuda", &steps);
    assert_eq!(code, 1, "{text}");
    has(&text, &["FAILED: error: off by one", "FAILED: matmul peak: 700", "is bound by launches"]);
    assert_eq!(text.matches("what to do: ").count(), 3, "{text}");
    assert_eq!(text.matches(" passed: ").count(), 2, "the step and the check: {text}");
}

#[test]
fn graphs_that_change_tokens_or_are_not_used_fail() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    std::fs::write(&model, "").unwrap();
    let variables = [("STEPS", "graphs"), ("MODEL", model.to_str().unwrap())];
    let verdict = |text: &str| gpu_check(folder.path(), &program(folder.path(), text), "cuda", &variables);
    let (code, text) = verdict("echo $GNEISS_CUDA_GRAPHS");
    assert_eq!(code, 1, "{text}");
    has(
        &text,
        &["decoding by graphs FAILED: other tokens than without graphs; ", "unset GNEISS_CUDA_GRAPHS"],
    );
    let (code, text) =
        verdict("[ $GNEISS_CUDA_GRAPHS = 0 ] || echo 'warning: without graphs from now on' >&2");
    assert_eq!(code, 1, "{text}");
    has(&text, &["decoding by graphs FAILED: warning: without graphs from now on"]);
    let (code, text) = verdict("[ $GNEISS_CUDA_GRAPHS = 0 ] || { echo 'Error: illegal' >&2; exit 1; }");
    assert_eq!(code, 1, "{text}");
    has(&text, &["decoding by graphs FAILED: GNEISS_CUDA_GRAPHS=1: Error: illegal"]);
}

#[test]
fn what_hangs_ends_with_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let gneiss = program(folder.path(), "exec sleep 60");
    let variables = [("STEPS", "check large"), ("BUDGET", "6")];
    let begun = std::time::Instant::now();
    let (code, text) = gpu_check(folder.path(), &gneiss, "cuda", &variables);
    assert!(begun.elapsed().as_secs() < 30);
    assert_eq!(code, 1, "{text}");
    has(&text, &["FAILED: not done within 6 s", "real sizes", "not run: the 6 s of BUDGET are over"]);
}

#[test]
fn nonsense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let gneiss = program(folder.path(), "exit 0");
    let (code, text) = gpu_check(folder.path(), &gneiss, "cuda", &[("STEPS", "chekc")]);
    assert_eq!(code, 2);
    has(&text, &["expected in STEPS check", "found chekc"]);
    let (code, text) = gpu_check(folder.path(), &folder.path().join("none"), "cuda", &[]);
    assert_eq!(code, 2);
    has(&text, &["expected the program gneiss at", "hint: make cuda"]);
}

/// The script on the CPU with the program itself: what it reads of gneiss's output is there.
#[test]
fn the_program_s_own_output_is_understood() {
    let folder = tempfile::tempdir().unwrap();
    let gneiss = Path::new(env!("CARGO_BIN_EXE_gneiss"));
    let variables = [("STEPS", "bench"), ("SMALL", "1"), ("PATIENCE", "20"), ("BUDGET", "1800")];
    let (code, text) = gpu_check(folder.path(), gneiss, "cpu", &variables);
    assert_eq!(code, 0, "{text}");
    has(&text, &["passed: 2 x 2, 5", "passed: matmul peak: ", "not run: cpu launches nothing"]);
}

//! The scripts of the documentation that drive `gneiss tune` by another search, with stand-ins for its package.

use super::*;
use std::process::Command as Process;

/// The script after a heading of the page.
fn script(heading: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/other-searches.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let (_, code) = section.split_once("```python\n").unwrap();
    code.split_once("```").unwrap().0.to_owned()
}

/// Runs a script where `gneiss` is on the path; what it prints. `None` without Python.
fn run(place: &Place, script: &str) -> Option<String> {
    place.write("search.py", script);
    // Enough epochs that a run is under way when it is pruned.
    place.write("mine.toml", &CONFIG.replace("num_epochs = 3", "num_epochs = 40"));
    let stand_ins = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/stand_ins");
    let program = Path::new(env!("CARGO_BIN_EXE_gneiss")).parent().unwrap();
    let path = std::env::join_paths(
        std::iter::once(program.to_path_buf())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let mut python = Process::new("python3");
    python.current_dir(place.path("")).arg("search.py").env("PYTHONPATH", stand_ins);
    let output = python.env("PATH", path.unwrap()).env("PYTHONDONTWRITEBYTECODE", "1").output();
    let Ok(output) = output else {
        eprintln!("skipped: python3 is not there");
        return None;
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn optuna_reads_the_epochs_prunes_and_takes_the_result() {
    let place = Place::new();
    let Some(stdout) = run(&place, &script("Optuna")) else { return };
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].starts_with("0 complete "), "{stdout}");
    assert!(lines[1].starts_with("1 pruned "), "{stdout}");
    assert!(lines[2].starts_with("2 failed: optuna-2: exit code 1"), "{stdout}");
    assert!(lines[3].starts_with("0 {'learning_rate': 0.02, 'num_virtual_tokens': 25}"), "{stdout}");
    let status = |name: &str| place.json(&format!("runs/{name}/summary.json"))["status"]["state"].clone();
    assert_eq!(["optuna-0", "optuna-1", "optuna-2"].map(status), ["completed", "interrupted", "failed"]);
}

#[test]
fn ray_tune_reads_the_epochs_and_stops_a_run() {
    let place = Place::new();
    let Some(stdout) = run(&place, &script("Ray Tune")) else { return };
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[..2], ["0 complete 40", "1 stopped 2"], "{stdout}");
    assert!(lines[2].contains("'train.learning_rate': 0.02"), "{stdout}");
    let summary = place.json("runs/ray-0.050000-25/summary.json");
    assert_eq!(summary["status"]["state"], json!("interrupted"));
}

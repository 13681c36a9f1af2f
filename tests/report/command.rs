//! `gneiss report`, run as a user runs it.

use crate::runs;
use assert_cmd::Command;
use std::fs;
use std::path::Path;

fn report(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::cargo_bin("gneiss").unwrap();
    let output = command.current_dir(folder).arg("report").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn one_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = runs::tutorial().write(&folder.path().join("runs"), "a");
    let (code, stdout, stderr) = report(folder.path(), &["runs/a"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(stdout, "runs/a/report.html\nruns/a/curve.svg\nruns/a/curve.png\n");
    assert!(["report.html", "curve.svg", "curve.png"].iter().all(|name| run.join(name).is_file()));
    fs::remove_file(run.join("curve.svg")).unwrap();
    let (code, stdout, _) = report(folder.path(), &["runs/a", "--out", "page.html"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "page.html\n"));
    let pages = ["page.html", "runs/a/report.html"].map(|name| fs::read(folder.path().join(name)).unwrap());
    assert_eq!(pages[0], pages[1]);
    assert!(!run.join("curve.svg").exists(), "the page and nothing else");
}

#[test]
fn several_runs() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        runs::tutorial().write(&folder.path().join("runs"), name);
    }
    let (code, stdout, _) = report(folder.path(), &["runs/a", "runs/b/"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "runs/compare.html\n"));
    let page = fs::read_to_string(folder.path().join("runs/compare.html")).unwrap();
    assert!(page.contains("2 runs compared"));
    let (_, stdout, _) = report(&folder.path().join("runs"), &["a", "b", "--out", "both.html"]);
    assert_eq!(stdout, "both.html\n");
    let (_, stdout, _) = report(&folder.path().join("runs"), &["a", "b"]);
    assert_eq!(stdout, "compare.html\n");
}

#[test]
fn what_is_no_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = runs::tutorial().write(&folder.path().join("runs"), "a");
    fs::create_dir(folder.path().join("empty")).unwrap();
    for (path, parts) in [
        ("empty", &["empty", "expected a run folder", "config.toml"][..]),
        ("missing", &["missing"]),
        ("runs", &["runs", "holds runs", "hint: runs/a"]),
    ] {
        let (code, stdout, stderr) = report(folder.path(), &[path]);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    }
    fs::write(run.join("summary.json"), "{").unwrap();
    let (code, _, stderr) = report(folder.path(), &["runs/a"]);
    assert!(code == Some(2) && stderr.contains("summary.json"), "{stderr}");
    fs::remove_file(run.join("summary.json")).unwrap();
    let (_, _, stderr) = report(folder.path(), &["runs/a"]);
    assert!(stderr.contains("summary.json") && stderr.contains("expected the run's summary"), "{stderr}");
    assert_eq!(report(folder.path(), &[]).0, Some(2));
}

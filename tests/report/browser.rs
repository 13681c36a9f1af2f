//! The pages in Debian's Chromium.
//!
//! Where Python has no Playwright, or there is no Chromium, the tests say so and pass, unless
//! GNEISS_REQUIRE_CHROMIUM=1.

use crate::common::python::python_with;
use crate::odd;
use gneiss::report;
use gneiss::run::Run;
use gneiss::sweep::SweepResult;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const CHROMIUM: &str = "/usr/bin/chromium";

/// The variable that makes its absence a failure.
const REQUIRED: &str = "GNEISS_REQUIRE_CHROMIUM";

/// The Python that has Playwright, where there is Chromium.
fn python() -> Option<PathBuf> {
    if Path::new(CHROMIUM).is_file() {
        return python_with(&["playwright.sync_api"], REQUIRED);
    }
    let message = format!("{CHROMIUM} is not there: Debian's package chromium has it");
    assert!(std::env::var(REQUIRED).as_deref() != Ok("1"), "{message}");
    eprintln!("skipped: {message}");
    None
}

/// Runs `open.py` on pages; what it found, and its exit code.
fn open(python: &Path, out: &Path, pages: &[PathBuf]) -> (String, bool) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report/open.py");
    let output = Command::new(python).arg(script).arg(out).args(pages).output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (said, output.status.success())
}

/// Screenshots are kept in `target/tmp/report/`, to be looked at.
#[test]
fn every_page_opens_without_a_word() {
    let Some(python) = python() else { return };
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(&out).unwrap();
    let mut pages = Vec::new();
    let mut add = |name: &str, page: String| {
        let path = out.join(format!("{name}.html"));
        fs::write(&path, page).unwrap();
        pages.push(path);
    };
    let mut all: Vec<Run> = Vec::new();
    for (i, (name, content)) in odd::all().into_iter().enumerate() {
        let run = content.run(folder.path(), name);
        // A hostile name is no name of a file.
        let file = if name.contains(' ') { format!("odd-{i}") } else { name.to_owned() };
        add(&file, report::page(&run).unwrap());
        all.push(run);
    }
    add("compare-two", report::compare(&[all[0].clone(), all[5].clone()]).unwrap());
    add("compare-all", report::compare(&all).unwrap());
    for (name, begun) in [("sweep", 16), ("sweep-begun", 3)] {
        let result = SweepResult::read(&crate::sweep::folder(&folder.path().join(name), begun)).unwrap();
        add(name, report::sweep_page(&result).unwrap());
    }
    let (said, success) = open(&python, &out, &pages);
    assert!(success, "{said}");
}

/// The script itself: a page with everything that it should find.
#[test]
fn the_script_finds_what_is_wrong() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("bad.html");
    let picture = "<svg width='90' height='30'><text x='5' y='20' font-size='8'>over</text><text x='9' y='21' \
                   font-size='8'>lap</text></svg>";
    let script = "<script>console.error('on the console'); alert(1); throw new Error('thrown');</script>";
    let wide = "<p style='width:900px'>wide</p><div class='scroll' style='overflow:hidden;width:200px'><p \
                style='width:500px'>cut</p></div>";
    let folded = "<details><summary>s</summary><p>folded</p></details><img src='no.png'>";
    fs::write(&page, format!("<!doctype html>{picture}{script}{wide}{folded}")).unwrap();
    let (said, success) = open(&python, folder.path(), &[page]);
    assert!(!success);
    for part in [
        "on the console", "a dialog", "thrown", "no.png", "pixels across", "a name on every picture",
        "over / lap", "letters of 9 pixels", "nothing cut off", "<p>folded</p>",
    ] {
        assert!(said.contains(part), "expected {part:?} in:\n{said}");
    }
}

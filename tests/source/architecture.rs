//! The shape of `src`: which folder may use which.

use super::{SourceFile, source};
use std::collections::{BTreeMap, BTreeSet};

/// Each folder or file of `src`, and the ones that it uses. A line names only folders of the lines above it, so that no
/// folder is part of a circle. `error`, `layout`, `files`, `number`, `text` and `calendar` are small and stand at the
/// bottom; `main.rs` and `cli` may use everything.
const FOLDERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("layout", &[]),
    ("files", &["layout"]),
    ("number", &[]),
    ("text", &[]),
    ("calendar", &[]),
    ("ops", &[]),
    ("ranks", &[]),
    ("device", &["ops"]),
    ("batch", &["ops"]),
    ("checkpoint", &["ops", "calendar", "layout"]),
    ("data", &["batch", "checkpoint", "text"]),
    ("config", &["device", "layout", "text"]),
    ("model", &["ops", "device", "batch", "checkpoint"]),
    ("prompt", &["model", "batch", "checkpoint", "config", "data", "ops", "files", "layout", "number"]),
    ("generate", &["prompt", "model", "checkpoint", "batch", "ops", "device"]),
    ("tune", &["prompt", "model", "config", "data", "batch", "ops", "ranks", "device", "files", "number"]),
    ("session", &["model", "checkpoint", "config", "data", "device", "ops"]),
    (
        "run",
        &[
            "batch", "tune", "ranks", "prompt", "session", "model", "config", "data", "device", "files",
            "layout", "number",
        ],
    ),
    (
        "evaluate",
        &[
            "session", "tune", "ranks", "generate", "prompt", "model", "checkpoint", "config", "data",
            "batch", "device", "files", "layout", "number",
        ],
    ),
    (
        "sweep",
        &[
            "evaluate", "run", "session", "tune", "ranks", "prompt", "data", "config", "device", "files",
            "layout", "number",
        ],
    ),
    (
        "report",
        &["sweep", "evaluate", "run", "tune", "prompt", "config", "calendar", "files", "layout", "text"],
    ),
    ("export", &["prompt", "model", "checkpoint", "data", "batch", "ops", "files", "layout"]),
    ("bench", &["tune", "prompt", "model", "checkpoint", "config", "batch", "ops", "device", "number"]),
    ("check", &["bench", "tune", "prompt", "model", "checkpoint", "config", "batch", "ops", "device"]),
    (
        "serve",
        &["generate", "prompt", "model", "checkpoint", "data", "device", "calendar", "files", "layout"],
    ),
    (
        "watsonx",
        &[
            "serve", "report", "run", "session", "tune", "prompt", "config", "data", "device", "calendar",
            "files", "layout", "checkpoint",
        ],
    ),
];

/// Whether a file is compiled into tests alone.
fn is_for_tests(file: &SourceFile) -> bool {
    file.is_of_tests() || ["/testing.rs", "/faults.rs"].iter().any(|name| file.name.ends_with(name))
}

/// A file without comments, and without its module of unit tests.
fn code(file: &SourceFile) -> String {
    let lines = file.product_text().lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules after each `crate::`: one, or the first of each entry of a `{...}`.
fn used(text: &str) -> BTreeSet<String> {
    let mut modules = BTreeSet::new();
    for after in text.split("crate::").skip(1) {
        let list = match after.strip_prefix('{') {
            Some(list) => list.split("};").next().unwrap(),
            None => after.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap(),
        };
        let mut depth = 0;
        let mut entry = String::new();
        for c in list.chars().chain([',']) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    let module = entry.trim().split("::").next().unwrap().to_owned();
                    if module.starts_with(|c: char| c.is_ascii_lowercase()) {
                        modules.insert(module);
                    }
                    entry.clear();
                }
                _ if depth == 0 => entry.push(c),
                _ => {}
            }
        }
    }
    modules
}

#[test]
fn folders_use_those_below_them_only() {
    let mut arrows: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for file in source().iter().filter(|file| !is_for_tests(file)) {
        let folder = file.name.split('/').nth(1).unwrap().trim_end_matches(".rs");
        if ["cli", "main", "lib"].contains(&folder) {
            continue;
        }
        let of_folder = arrows.entry(folder.to_owned()).or_default();
        for module in used(&code(file)).into_iter().filter(|module| module != folder) {
            of_folder.entry(module).or_insert_with(|| file.name.clone());
        }
    }
    assert_eq!(
        arrows.keys().cloned().collect::<BTreeSet<_>>(),
        FOLDERS.iter().map(|(folder, _)| (*folder).to_owned()).collect(),
        "the folders of src"
    );
    let mut problems = Vec::new();
    for (i, (folder, allowed)) in FOLDERS.iter().enumerate() {
        for below in *allowed {
            if !FOLDERS[..i].iter().any(|(name, _)| name == below) {
                problems.push(format!("{folder} may use {below}, which is not above it in the list"));
            }
            if !arrows[*folder].contains_key(*below) {
                problems.push(format!("{folder} may use {below} and does not: take it out of the list"));
            }
        }
        for (module, file) in &arrows[*folder] {
            if !allowed.contains(&module.as_str()) {
                problems.push(format!("{folder} uses {module} ({})", file));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn used_names_the_first_module_of_every_path() {
    let text =
        "use crate::{Error, Result, ops::{Indices, rope::Rope}, text};\nfn f() { crate::device::open(x) }";
    assert_eq!(used(text), ["device", "ops", "text"].map(str::to_owned).into());
    assert!(used("use super::x; use std::fmt;").is_empty());
}

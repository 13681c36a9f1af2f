//! One op, one name: each op of `src/ops` has its benchmark in `benches/ops.rs`, and there is no other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Files and folders of `src/ops` that are no op.
const SHARED: [&str; 5] = ["mod", "backend", "indices", "profile", "testing"];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root(path)).unwrap().replace("\r\n", "\n")
}

fn ops() -> BTreeSet<String> {
    let entries = std::fs::read_dir(root("src/ops")).unwrap().map(|entry| entry.unwrap().path());
    let ops: BTreeSet<String> = entries
        .filter(|path| path.is_dir() || path.extension().is_some_and(|e| e == "rs"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|name| !SHARED.contains(&name.as_str()))
        .collect();
    assert!(ops.len() >= 8, "{ops:?}");
    ops
}

/// The text after each `start` up to the next `end`.
fn between<'a>(text: &'a str, start: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(start).skip(1).map(move |after| after.split_once(end).unwrap().0.trim())
}

#[test]
fn every_op_has_a_benchmark() {
    let (ops, bench) = (ops(), read("benches/ops.rs"));
    let set = |names: Vec<&str>| -> BTreeSet<String> {
        let unique: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(unique.len(), names.len(), "a name occurs twice: {names:?}");
        unique
    };
    let functions =
        bench.lines().filter_map(|line| line.strip_prefix("fn ")?.strip_suffix("(c: &mut Criterion) {"));
    assert_eq!(set(functions.collect()), ops, "benchmark functions");
    assert_eq!(set(between(&bench, "Op::new(c, \"", "\"").collect()), ops, "groups of criterion");
    let listed = between(&bench, "criterion_group!(", ")").next().unwrap();
    let (_, listed) = listed.split_once(',').unwrap();
    let listed = listed.split(',').map(str::trim).filter(|name| !name.is_empty());
    assert_eq!(set(listed.collect()), ops, "functions that criterion runs");
}

#[test]
fn every_op_but_the_matrix_product_has_its_kernel_and_its_check() {
    let files = std::fs::read_dir(root("kernels")).unwrap().map(|entry| entry.unwrap().path());
    let names = files.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    let names = names.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned());
    let mut kernels: BTreeSet<String> = names.map(|name| name.trim_end_matches("_mma").to_owned()).collect();
    // The product is cuBLAS's, or candle's on Metal.
    assert!(kernels.insert("linear".into()));
    assert_eq!(kernels, ops());
    assert_eq!(BTreeSet::from(gneiss::check::OPS.map(str::to_owned)), ops());
}

#[test]
fn every_op_is_a_folder_with_the_same_files() {
    let module = read("src/ops/mod.rs");
    for op in ops() {
        assert!(module.contains(&format!("pub mod {op};")), "{op}");
        assert!(module.contains(&format!("[`{op}`]")), "{op} is not in the table of src/ops/mod.rs");
        let file = |name: &str| {
            let file = format!("src/ops/{op}/{name}.rs");
            let folder = format!("src/ops/{op}/{name}/mod.rs");
            if root(&folder).exists() { read(&folder) } else { read(&file) }
        };
        assert!(file("reference").contains("pub fn reference("), "{op}: expected `pub fn reference(`");
        assert!(file("tests").contains("#[test]"), "{op}: expected tests");
        let mut directions = vec!["forward"];
        // The optimizer is the end of the chain.
        directions.extend((op != "adamw").then_some("backward"));
        for direction in directions {
            let public = format!("pub fn {direction}(");
            assert!(file("mod").contains(&public), "{op}: expected `{public}`");
            for backend in ["cpu", "gpu"] {
                let function = format!("pub(super) fn {direction}(");
                let rotation = "pub(super) fn rotate(";
                let text = file(backend);
                assert!(text.contains(&function) || text.contains(rotation), "{op}/{backend}: {function}");
            }
        }
    }
}

//! The documentation against the program: tables that the source makes, links, commands, flags, keys.
//!
//! `GNEISS_WRITE_DOCS=1 cargo test --test docs` writes the parts that are made from the source again.

mod cluster;
mod commands;
mod markdown;
mod messages;
mod reference;
mod source;

use gneiss::Error;
use gneiss::config::{Config, SweepOptions};
use markdown::{At, Page, root};
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use toml::{Table, Value};

/// What ends a part that is made from the source.
const END: &str = "<!-- end -->";

/// Folders of the repository whose files the documentation names.
const FOLDERS: [&str; 7] = ["src/", "tests/", "configs/", "data/", "kernels/", "benches/", "docs/"];

/// Pages that people read: those of the book, and the repository's front page.
fn pages() -> Vec<Page> {
    let mut pages = Page::of_docs();
    pages.push(Page::read("README.md"));
    pages
}

fn assert_none(problems: Vec<String>) {
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
}

/// The page with all its parts `<!-- from WHAT --> ... <!-- end -->` made again.
fn regenerated(page: &Page) -> String {
    let (mut out, mut rest) = (String::new(), page.text.as_str());
    while let Some(at) = rest.find("<!-- from ") {
        let after = &rest[at..];
        let what = after["<!-- from ".len()..].split(" -->").next().unwrap_or_default();
        let end = after.find(END).unwrap_or_else(|| panic!("{}: from {what}: no {END}", page.path.display()));
        out += &format!("{}<!-- from {what} -->\n\n{}\n{END}", &rest[..at], reference::render(what));
        rest = &after[end + END.len()..];
    }
    out + rest
}

#[test]
fn what_is_made_from_the_source_is_current() {
    let mut problems = Vec::new();
    let mut parts = 0;
    for page in pages() {
        parts += page.text.matches(END).count();
        let text = regenerated(&page);
        if text == page.text {
            continue;
        }
        if std::env::var_os("GNEISS_WRITE_DOCS").is_some() {
            std::fs::write(root().join(&page.path), text).unwrap();
            continue;
        }
        let line = text.lines().zip(page.text.lines()).take_while(|(a, b)| a == b).count() + 1;
        problems.push(page.problem(line, "not as in the source; GNEISS_WRITE_DOCS=1 cargo test --test docs"));
    }
    assert_none(problems);
    assert!(parts >= 15, "found {parts} parts that are made from the source");
}

fn defaults() -> Table {
    let mut defaults = Table::try_from(Config::default()).unwrap();
    // A configuration without a sweep is written without its table.
    defaults.insert("sweep".into(), Value::try_from(SweepOptions::default()).unwrap());
    defaults
}

/// Dotted keys of all values below a table.
fn leaves(table: &Table, prefix: &str) -> BTreeSet<String> {
    let of = |(name, value): (&String, &Value)| match value {
        Value::Table(inner) if !inner.is_empty() => leaves(inner, &format!("{prefix}{name}.")),
        _ => [format!("{prefix}{name}")].into(),
    };
    table.iter().flat_map(of).collect()
}

#[test]
fn documented_defaults_are_the_defaults() {
    let (defaults, keys) = (defaults(), reference::keys());
    assert_none(keys.iter().filter_map(|key| key.check_default(&defaults).err()).collect());
    let documented: BTreeSet<_> = keys.into_iter().map(|key| key.name).collect();
    assert_eq!(documented, leaves(&defaults, ""));
}

#[test]
fn every_key_of_the_recipes_is_in_the_reference() {
    let reference = Page::read("docs/src/configuration.md");
    let spans: BTreeSet<_> = reference.spans().into_iter().map(|span| span.what).collect();
    for entry in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let table: Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
            let missing: Vec<_> = leaves(&table, "").difference(&spans).cloned().collect();
            assert!(missing.is_empty() && !table.is_empty(), "{}: {missing:?}", path.display());
        }
    }
}

/// Rows `| there | range | there | `key` | `default` | `ours` |` of the tutorial that say another value.
fn wrong_rows(page: &Page, defaults: &Table, ours: &Table) -> (usize, Vec<String>) {
    let (mut rows, mut problems) = (0, Vec::new());
    for (i, line) in page.text.lines().enumerate().filter(|(_, line)| line.starts_with('|')) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let first_span = |cell: &str| Some(cell.strip_prefix('`')?.split('`').next()?.to_owned());
        let Some(key) = cells.get(3).and_then(|cell| first_span(cell)) else { continue };
        rows += 1;
        for (cell, table) in [(cells[4], defaults), (cells[5], ours)] {
            let Some(told) = first_span(cell) else { continue };
            let told: Option<Table> = format!("v = {told}").parse().ok();
            if told.as_ref().map(|told| &told["v"]) != reference::lookup(table, &key) {
                problems.push(page.problem(i + 1, &format!("{key}: {cell} is not so")));
            }
        }
    }
    (rows, problems)
}

#[test]
fn values_beside_watsonx_are_the_values() {
    let ours: Table = std::fs::read_to_string(root().join("configs/tutorial.toml")).unwrap().parse().unwrap();
    let (rows, problems) = wrong_rows(&Page::read("docs/src/tutorial.md"), &defaults(), &ours);
    assert_none(problems);
    assert!(rows >= 12, "found {rows} keys");
    let text = "| a | b | c | `train.seed` | `41` | `43` |\n| a | b | c | `train.sead` | `1` | the same |\n";
    assert_eq!(wrong_rows(&Page::new("x.md", text), &defaults(), &ours).1.len(), 3);
}

/// `path` below the repository without `.` and `..`; none where it leaves it.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            Component::ParentDir if out.pop() => {}
            _ => return None,
        }
    }
    Some(out)
}

fn broken_links(page: &Page) -> Vec<String> {
    let in_book = page.path.starts_with("docs/src");
    let folder = page.path.parent().unwrap();
    let problem = |At { line, what }: At<String>| {
        if ["https://", "http://", "mailto:"].iter().any(|scheme| what.starts_with(scheme)) {
            return None;
        }
        let (path, anchor) = what.split_once('#').map_or((what.as_str(), None), |(path, a)| (path, Some(a)));
        if path.is_empty() {
            let known = page.anchors();
            let missing = anchor.filter(|anchor| !known.contains(*anchor));
            return missing.map(|_| page.problem(line, &format!("{what}: expected one of {known:?}")));
        }
        let target = normal(&folder.join(path)).filter(|target| root().join(target).exists());
        let Some(target) = target else {
            return Some(page.problem(line, &format!("{what}: there is no such file")));
        };
        // What lies elsewhere is not in the book that mdBook makes.
        if in_book && !target.starts_with("docs/src") {
            return Some(page.problem(line, &format!("{what}: expected a file of docs/src")));
        }
        let (anchor, known) = (anchor?, Page::read(target).anchors());
        (!known.contains(anchor)).then(|| page.problem(line, &format!("{what}: expected one of {known:?}")))
    };
    page.links().into_iter().filter_map(problem).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut pages = pages();
    pages.push(Page::read("CONTRIBUTING.md"));
    assert_none(pages.iter().flat_map(broken_links).collect());
}

#[test]
fn a_broken_link_is_found() {
    let good = "[a](configuration.md#top-level) [b](https://example.com) [c](#here)\n\n# Here\n";
    let page = |text| Page::new("docs/src/x.md", text);
    assert_eq!(broken_links(&page(good)), Vec::<String>::new());
    for bad in [
        "[a](nowhere.md)", "[a](configuration.md#nowhere)", "![a](x.svg)", "[a](#nowhere)",
        "[a](../../LOG.md)",
    ] {
        assert_eq!(broken_links(&page(bad)).len(), 1, "{bad}");
    }
}

#[test]
fn every_chapter_is_in_the_summary_once() {
    let summary = Page::read("docs/src/SUMMARY.md");
    let mut listed: Vec<_> = summary.links().into_iter().map(|link| link.what).collect();
    let is_chapter = |page: &Page| page.path.starts_with("docs/src") && !page.path.ends_with("SUMMARY.md");
    let name = |page: Page| page.path.strip_prefix("docs/src").unwrap().to_string_lossy().into_owned();
    let mut chapters: Vec<_> = Page::of_docs().into_iter().filter(is_chapter).map(name).collect();
    listed.sort();
    chapters.sort();
    assert_eq!(listed, chapters);
}

#[test]
fn files_of_the_repository_that_are_named_exist() {
    let mut problems = Vec::new();
    for page in pages() {
        for At { line, what } in page.spans() {
            let is_path =
                FOLDERS.iter().any(|folder| what.starts_with(folder)) && !what.contains([' ', '*', '<']);
            if is_path && !root().join(&what).exists() {
                problems.push(page.problem(line, &format!("there is no {what}")));
            }
        }
    }
    assert_none(problems);
}

/// Keys such as `train.seed` in code spans that are no keys.
fn unknown_keys(page: &Page, known: &BTreeSet<String>, tables: &BTreeSet<String>) -> Vec<String> {
    let mut problems = Vec::new();
    for At { line, what } in page.spans() {
        let is_part = |c: char| c.is_alphanumeric() || "._/~-".contains(c);
        for word in what.split(|c| !is_part(c)) {
            let Some((table, key)) = word.split_once('.') else { continue };
            let is_file = ["csv", "html", "json", "jsonl", "toml", "safetensors", "rs"].contains(&key);
            let is_call = what.contains(&format!("{word}("));
            if tables.contains(table) && !is_file && !is_call && !known.contains(word) {
                problems.push(page.problem(line, &format!("`{word}` is no key")));
            }
        }
    }
    problems
}

/// All keys, and the tables.
fn known_keys() -> (BTreeSet<String>, BTreeSet<String>) {
    let defaults = defaults();
    let tables =
        defaults.iter().filter(|(_, value)| value.is_table()).map(|(name, _)| name.clone()).collect();
    (leaves(&defaults, ""), tables)
}

#[test]
fn keys_that_are_named_exist() {
    let (known, tables) = known_keys();
    assert_none(pages().iter().flat_map(|page| unknown_keys(page, &known, &tables)).collect());
    let bad = Page::new("x.md", "`train.csv`, `train.seed = 1`, `model.generate(x)`, `--set train.sead=1`");
    assert_eq!(unknown_keys(&bad, &known, &tables), ["x.md:1: `train.sead` is no key"]);
}

/// What the configuration says of a snippet's own lines; that keys are missing is no fault of a snippet.
fn faults_of_snippet(text: &str) -> Vec<String> {
    match Config::parse(text, "snippet", &[]) {
        Ok(_) => Vec::new(),
        Err(Error::Config { problems, .. }) => {
            problems.into_iter().filter(|p| p.starts_with("line ")).collect()
        }
        Err(other) => vec![other.to_string()],
    }
}

#[test]
fn snippets_of_configurations_are_valid() {
    let (mut problems, mut snippets) = (Vec::new(), 0);
    for page in pages() {
        for At { line, what: code } in page.code() {
            if code.language == "toml" {
                snippets += 1;
                let faults = faults_of_snippet(&code.text);
                problems.extend(faults.iter().map(|fault| page.problem(line, fault)));
            }
        }
    }
    assert_none(problems);
    assert!(snippets >= 3, "found {snippets} snippets");
    assert_eq!(faults_of_snippet("[train]\nsead = 1\nbatch_size = 0\n").len(), 2);
}

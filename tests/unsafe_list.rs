//! The files with unsafe code are those that CONTRIBUTING.md lists.

use std::path::{Path, PathBuf};

/// What CONTRIBUTING.md's list begins after.
const LIST: &str = "`unsafe` is allowed in these files and folders:";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The files and folders of the list; folders end with a slash.
fn listed() -> Vec<String> {
    let text = std::fs::read_to_string(root("CONTRIBUTING.md")).unwrap();
    let (_, list) = text.split_once(LIST).expect("the list of CONTRIBUTING.md");
    let (list, _) = list.split_once("Each use").expect("the sentence after the list");
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The Rust files under `folder`.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Whether a file has unsafe code outside of comments.
fn is_unsafe(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let forms = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"];
    code.into_iter().any(|line| forms.iter().any(|form| line.contains(form)))
}

#[test]
fn files_with_unsafe_code_are_those_of_the_list() {
    let listed = listed();
    assert!(listed.len() >= 5, "{listed:?}");
    let mut files = Vec::new();
    sources(&root("src"), &mut files);
    let files: Vec<String> = files
        .iter()
        .filter(|path| is_unsafe(path))
        .map(|path| path.strip_prefix(root("")).unwrap().to_str().unwrap().replace('\\', "/"))
        .collect();
    let covers = |entry: &str, file: &str| {
        if entry.ends_with('/') { file.starts_with(entry) } else { file == entry }
    };
    for file in &files {
        assert!(
            listed.iter().any(|entry| covers(entry, file)),
            "{file} has unsafe code and is not in the list"
        );
    }
    for entry in &listed {
        assert!(
            files.iter().any(|file| covers(entry, file)),
            "{entry} is in the list and has no unsafe code"
        );
    }
}

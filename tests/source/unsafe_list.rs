//! The files with unsafe code are those that CONTRIBUTING.md lists.

use super::{SourceFile, root, source};

/// What CONTRIBUTING.md's list begins after.
const LIST: &str = "`unsafe` is allowed in these files and folders:";

/// The files and folders of the list; folders end with a slash.
fn listed() -> Vec<String> {
    let text = std::fs::read_to_string(root("CONTRIBUTING.md")).unwrap();
    let (_, list) = text.split_once(LIST).expect("the list of CONTRIBUTING.md");
    let (list, _) = list.split_once("Each use").expect("the sentence after the list");
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether a file has unsafe code outside of comments.
fn is_unsafe(file: &SourceFile) -> bool {
    let code = file.text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let forms = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"];
    code.into_iter().any(|line| forms.iter().any(|form| line.contains(form)))
}

#[test]
fn files_with_unsafe_code_are_those_of_the_list() {
    let listed = listed();
    assert!(listed.len() >= 5, "{listed:?}");
    let files: Vec<String> = source().into_iter().filter(is_unsafe).map(|file| file.name).collect();
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

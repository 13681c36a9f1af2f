//! The source itself: which folder uses which, sizes, unsafe code; the Dockerfiles.

mod architecture;
mod images;
mod sizes;
mod unsafe_list;

use std::path::{Path, PathBuf};

/// A file of the repository.
struct SourceFile {
    /// Its path from the root, such as `src/ops/mod.rs`.
    name: String,
    text: String,
}

impl SourceFile {
    /// Without its module of unit tests.
    fn product_text(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod tests {").next().unwrap()
    }

    /// Whether the file holds unit tests and no more.
    fn is_of_tests(&self) -> bool {
        self.name.ends_with("tests.rs") || self.name.contains("/tests/")
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// All Rust files of `src`, by name.
fn source() -> Vec<SourceFile> {
    let mut paths = Vec::new();
    rust_files(&root("src"), &mut paths);
    paths.sort();
    assert!(paths.len() > 200, "{}", paths.len());
    let read = |path: PathBuf| SourceFile {
        name: path.strip_prefix(root("")).unwrap().to_str().unwrap().replace('\\', "/"),
        text: std::fs::read_to_string(&path).unwrap().replace("\r\n", "\n"),
    };
    paths.into_iter().map(read).collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

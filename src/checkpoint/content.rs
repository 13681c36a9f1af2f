//! Detects files with another content than their name says: pointers, web pages, files of another format.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// The first bytes of a file that Git LFS has put in the place of another one.
pub(crate) const LFS_POINTER: &str = "version https://git-lfs";

/// The first bytes of GGUF files.
pub(super) const GGUF: &[u8] = b"GGUF";

/// The kind of a file that begins with `bytes`, and a hint.
pub(super) fn recognise(bytes: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]).trim_start().to_ascii_lowercase();
    Some(match bytes {
        [] => "an empty file: the download did not begin; download it again",
        _ if text.starts_with(LFS_POINTER) => {
            "a Git LFS pointer: the file itself was not fetched; run `git lfs pull` in the folder, or download it again"
        }
        _ if text.starts_with("<!doctype html") || text.starts_with("<html") => {
            "a web page: the download got a page instead of the file; download it again"
        }
        [b'P', b'K', 3, 4, ..] => {
            "a zip archive, such as torch.save writes; save the model as safetensors, with save_pretrained of transformers"
        }
        [0x80, 2..=5, ..] => {
            "a pickle of Python; save the model as safetensors, with save_pretrained of transformers"
        }
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file; give it a name that ends in .gguf, and its own path",
        [0x1f, 0x8b, ..] => "a gzip archive; unpack it",
        _ => return None,
    })
}

/// Refuses a file that is recognised as another kind than `expected`; a file that begins with `magic` is of the
/// expected kind.
///
/// # Errors
/// Returns an error with the kind of the file and a hint.
pub(super) fn expect(path: &Path, bytes: &[u8], expected: &str, magic: &[u8]) -> Result<()> {
    if !magic.is_empty() && bytes.starts_with(magic) {
        return Ok(());
    }
    match recognise(bytes) {
        None => Ok(()),
        Some(found) => {
            let problem = format!("expected {expected}, found {found}");
            Err(Error::Checkpoint { path: path.to_path_buf(), problem })
        }
    }
}

/// As [`expect`], for the first bytes of a file.
///
/// # Errors
/// Returns an error with the kind of the file and a hint, or if the file can't be read.
pub(super) fn expect_file(path: &Path, expected: &str) -> Result<()> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(256).read_to_end(&mut bytes).map_err(Error::io(path))?;
    expect(path, &bytes, expected, b"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognised_by_how_they_begin() {
        for (bytes, expected) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"PK\x03\x04\x00", "zip"),
            (b"\x80\x02}q\x00", "pickle"),
            (b"GGUF\x03", "GGUF"),
        ] {
            assert!(recognise(bytes).unwrap().contains(expected), "{bytes:?}");
        }
        assert_eq!(recognise(b"\x80\x00\x00\x00\x00\x00\x00\x00{"), None);
        assert_eq!(recognise(b"{\"version\": 1}"), None);
    }
}

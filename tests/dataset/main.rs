//! From files to token ids: datasets, verbalizers, encoding.

mod csv;
mod encode;
mod json;
mod lengths;
mod template;

use gneiss::data::{Dataset, Record};
use gneiss::{Error, Result};

/// Reads `bytes` as a file of that name, with the fields `input` and `output`.
fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Dataset> {
    read_fields(name, bytes, "input", "output")
}

fn read_fields(name: &str, bytes: impl AsRef<[u8]>, input: &str, output: &str) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Dataset::read(&path, input, output)
}

fn records(name: &str, bytes: impl AsRef<[u8]>) -> Vec<Record> {
    read(name, bytes).unwrap().records
}

fn record(input: &str, output: &str, line: usize) -> Record {
    Record { input: input.into(), output: output.into(), line }
}

/// The message of a dataset that can't be read, with the file's name for its path.
fn fault(name: &str, bytes: impl AsRef<[u8]>) -> String {
    let error = read(name, bytes).expect_err("the dataset is faulty");
    assert!(error.is_bad_input());
    let Error::Data { path, .. } = &error else { panic!("expected Error::Data, found {error:?}") };
    error.to_string().replace(path.to_str().unwrap(), name)
}

#[test]
fn names_the_three_extensions() {
    let expected = |found| format!("expected a .csv, .json or .jsonl file, found {found}");
    assert_eq!(fault("d.tsv", "x"), format!("d.tsv: {}", expected("`.tsv`")));
    assert_eq!(fault("d", "x"), format!("d: {}", expected("no extension")));
    assert_eq!(records("D.CSV", "input,output\na,b\n"), [record("a", "b", 2)]);
}

#[test]
fn names_a_file_that_is_not_there() {
    let error = Dataset::read("no/such/file.csv".as_ref(), "input", "output").unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.is_bad_input());
    assert!(error.to_string().starts_with("no/such/file.csv: "), "{error}");
}

#[test]
fn the_two_fields_differ() {
    let error = read_fields("d.csv", "a\nb\n", "a", "a").unwrap_err();
    assert_eq!(error.to_string(), "the input and the output field must differ, found `a` for both");
}

#[test]
fn empty_files() {
    for name in ["d.csv", "d.json", "d.jsonl"] {
        for bytes in ["", "\u{feff}", "\n \r\n\t", "\u{feff}\n"] {
            assert_eq!(fault(name, bytes), format!("{name}: the file is empty"));
        }
    }
}

#[test]
fn utf16_is_named() {
    let utf16: Vec<u8> = "\u{feff}input,output\na,b\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(
        fault("d.csv", utf16),
        "d.csv: line 1, byte offset 0: expected UTF-8, found the byte order mark of UTF-16; hint: save the \
         file as UTF-8"
    );
}

#[test]
fn twenty_bad_rows_are_listed_and_the_rest_counted() {
    let mut text = String::from("input,output\n");
    for i in 0..30 {
        text += &format!("good {i},1\n,1\n");
    }
    let Err(Error::Data { problems, more, .. }) = read("d.csv", &text) else { panic!("bad rows") };
    let expected: Vec<String> = (0..20)
        .map(|i| format!("line {}: field `input`: expected text, found an empty string", 3 + 2 * i))
        .collect();
    assert_eq!((problems, more), (expected, 10));
    let message = fault("d.csv", &text);
    assert!(message.starts_with("d.csv: 30 problems\n  line 3: field `input`"), "{message}");
    assert!(message.ends_with("\n  and 10 more"), "{message}");
}

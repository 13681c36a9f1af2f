//! From files to token ids: datasets, verbalizers, encoding.

mod chat;
mod corpus;
mod csv;
mod encode;
mod json;
mod labels;
mod lengths;
mod messages;
mod reviews;
mod shapes;
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
fn names_the_extensions() {
    let expected = |found| {
        format!(
            "expected a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file, or one of them with .gz after it, found \
             {found}"
        )
    };
    assert_eq!(fault("d.txt", "x"), format!("d.txt: {}", expected("`.txt`")));
    assert_eq!(fault("d", "x"), format!("d: {}", expected("no extension")));
    assert_eq!(fault("d.tar.gz", "x"), format!("d.tar.gz: {}", expected("`.tar`")));
    assert_eq!(
        fault("d.xlsx", "x"),
        format!("d.xlsx: {}; hint: save the sheet as CSV, UTF-8", expected("`.xlsx`"))
    );
    assert_eq!(records("D.CSV", "input,output\na,b\n"), [record("a", "b", 2)]);
    assert_eq!(records("D.TSV", "input\toutput\na,b\tc\n"), [record("a,b", "c", 2)]);
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
fn utf16_without_a_mark_and_utf32_are_named() {
    let text = "input,output\na,b\n";
    let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let wide: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
    for (bytes, found) in [
        (little, "UTF-16 (little-endian, without a byte order mark)"),
        (big, "UTF-16 (big-endian, without a byte order mark)"),
        ([&b"\xFF\xFE\0\0"[..], &wide].concat(), "the byte order mark of UTF-32"),
    ] {
        for name in ["d.csv", "d.jsonl"] {
            let expected = "line 1, byte offset 0: expected UTF-8, found";
            assert_eq!(
                fault(name, &bytes),
                format!("{name}: {expected} {found}; hint: save the file as UTF-8")
            );
        }
    }
}

#[test]
fn files_of_other_kinds_are_named() {
    let zip = |name: &[u8]| [b"PK\x03\x04\x14\0\x06\0\x08\0".as_slice(), name].concat();
    for (bytes, part) in [
        (zip(b"[Content_Types].xml"), "Excel workbook (xlsx)"),
        (zip(b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet"), "spreadsheet (ods)"),
        (zip(b"train.csv"), "zip archive"),
        (b"\xD0\xCF\x11\xE0\xA1\xB1\x1A\xE1".to_vec(), "Excel workbook (xls)"),
        (b"\x28\xB5\x2F\xFD\x24".to_vec(), "zstd"),
        (b"\xFD7zXZ\0".to_vec(), "xz"),
        (b"BZh91AY&SY".to_vec(), "bzip2"),
        (b"ARROW1\0\0".to_vec(), "Arrow"),
        (b"SQLite format 3\0".to_vec(), "SQLite"),
        (b"%PDF-1.7\n".to_vec(), "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>".to_vec(), "web page"),
    ] {
        for name in ["d.csv", "d.json"] {
            let message = fault(name, &bytes);
            assert!(message.contains(part) && !message.contains("problems"), "{message}");
        }
    }
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

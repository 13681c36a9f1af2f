//! Files as other programs write them: `tests/fixtures/make_datasets.py` has the rows that pandas, pyarrow and Python's
//! json read of them.

use super::*;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/datasets")
}

fn expected(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

/// Input and output of each record.
fn pairs(dataset: &Dataset) -> Vec<[&str; 2]> {
    dataset.records.iter().map(|record| [record.input.as_str(), record.output.as_str()]).collect()
}

fn rows(rows: &Value) -> Vec<[&str; 2]> {
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| [row[0].as_str().unwrap(), row[1].as_str().unwrap()]).collect()
}

#[test]
fn texts_are_read_as_pandas_and_json_read_them() {
    let texts = expected("texts.json");
    let texts = texts.as_array().unwrap();
    assert!(texts.len() > 25);
    for file in texts {
        let name = file["name"].as_str().unwrap();
        let dataset = read(name, file["text"].as_str().unwrap());
        let dataset = dataset.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(pairs(&dataset), rows(&file["rows"]), "{name}");
        // The same with a mark before it.
        let marked = read(name, format!("\u{feff}{}", file["text"].as_str().unwrap())).unwrap();
        assert_eq!(marked.records, dataset.records, "{name} with a mark");
    }
}

#[cfg(feature = "parquet")]
#[test]
fn packed_and_parquet_files_are_read_as_pyarrow_reads_them() {
    let files = expected("files.json");
    let (mut read, mut refused) = (0, 0);
    for (name, expected) in files.as_object().unwrap() {
        let found = Dataset::read(&fixtures().join(name), "input", "output");
        match (found, expected.as_str()) {
            (Ok(dataset), None) => {
                assert_eq!(pairs(&dataset), rows(expected), "{name}");
                read += 1;
            }
            (Err(error), Some(part)) => {
                assert!(error.is_bad_input() && error.to_string().contains(part), "{name}: {error}");
                refused += 1;
            }
            (found, _) => panic!("{name}: expected {expected}, found {found:?}"),
        }
    }
    assert_eq!((read, refused), (19, 5));
}

#[cfg(feature = "parquet")]
#[test]
fn a_parquet_record_has_its_row_for_a_line() {
    let dataset = Dataset::read(&fixtures().join("groups.parquet"), "input", "output").unwrap();
    assert_eq!(dataset.records.iter().map(|record| record.line).collect::<Vec<_>>(), [1, 2, 3]);
    let error = Dataset::read(&fixtures().join("snappy.parquet"), "text", "output").unwrap_err().to_string();
    assert!(error.ends_with("no column `text`; found the columns `id`, `input`, `output`"), "{error}");
}

/// A damaged file is read or refused; what panics in the crate is an error too.
#[cfg(feature = "parquet")]
#[test]
fn a_parquet_file_with_a_wrong_byte_is_read_or_refused() {
    for name in ["snappy.parquet", "dictionary.parquet", "chats.parquet", "groups.parquet"] {
        let bytes = std::fs::read(fixtures().join(name)).unwrap();
        for at in (0..bytes.len()).step_by(11) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            if let Err(error) = read(name, damaged) {
                assert!(matches!(error, Error::Data { .. }), "{name}, byte {at}: {error}");
            }
        }
        for end in (0..bytes.len()).step_by(61) {
            assert!(read(name, &bytes[..end]).is_err(), "{name} of {end} bytes");
        }
    }
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_is_known_by_its_first_bytes() {
    let bytes = std::fs::read(fixtures().join("int8.parquet")).unwrap();
    assert_eq!(pairs(&read("d.csv", &bytes).unwrap()), [["a", "0"], ["b", "1"], ["c", "-1"]]);
    assert!(fault("d.parquet", "input,output\na,b\n").contains("expected a Parquet file"));
}

#[test]
fn gzip_is_told_by_the_name() {
    let packed = std::fs::read(fixtures().join("comma.csv.gz")).unwrap();
    assert_eq!(
        fault("d.csv", &packed),
        "d.csv: the file is compressed by gzip, which its name does not say; hint: rename it d.csv.gz, or unpack it"
    );
    assert!(fault("d.csv.gz", &packed[..packed.len() - 20]).contains("gzip: "));
    // A file on a tape, or of some writers, has zeros after its end.
    assert_eq!(pairs(&read("d.csv.gz", [&packed[..], &[0; 9]].concat()).unwrap()).len(), 3);
    // Some programs unpack what they fetch and leave the name.
    assert_eq!(records("d.csv.gz", "input,output\na,b\n"), [record("a", "b", 2)]);
}

#[test]
fn notes_say_once_what_became_text() {
    let lines: String = (0..50).map(|i| format!("{{\"input\": \"x\", \"output\": {}}}\n", i % 6)).collect();
    let notes = read("d.jsonl", lines).unwrap().notes;
    assert_eq!(notes, ["50 numbers are read as text: 0, 1, 2, 3, ..."]);
    let notes = read("d.json", r#"[{"input": "x", "output": true}]"#).unwrap().notes;
    assert_eq!(notes, ["1 boolean is read as text: true"]);
    assert_eq!(read("d.csv", "input;output\na;b\n").unwrap().notes, ["fields are separated by semicolons"]);
    assert_eq!(
        read("d.csv", "input,output\na,b\n,\n,\n").unwrap().notes,
        ["2 rows without any text are passed over (lines 3, 4)"]
    );
    let notes = read("d.json", r#"{"n": 1, "items": [{"input": "x", "output": "y"}]}"#).unwrap().notes;
    assert_eq!(notes, ["the rows are the list under the key `items`"]);
}

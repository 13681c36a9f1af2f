use super::*;
use proptest::prelude::*;

#[test]
fn reads_a_list_with_its_lines() {
    let text = "\u{feff}\r\n[\r\n  {\"input\": \"x\\ny\", \"output\": \"1\"},\r\n\r\n  {\r\n    \"id\": [1, \
                {}],\r\n    \"output\": \" 0\", \"input\": \"é\\u00e9\"\r\n  }\r\n]\r\n";
    assert_eq!(records("d.json", text), [record("x\ny", "1", 3), record("éé", " 0", 5)]);
    let one_line = r#"[{"input":"a","output":"b"},{"input":"c","output":"d"}]"#;
    assert_eq!(records("d.json", one_line), [record("a", "b", 1), record("c", "d", 1)]);
}

#[test]
fn reads_lines_and_skips_blank_ones() {
    let text = "\n{\"input\":\"x\",\"output\":\"1\"}\n \t\n  {\"input\":\"y\",\"output\":\"2\"}  \n\n";
    let expected = [record("x", "1", 2), record("y", "2", 4)];
    assert_eq!(records("d.jsonl", text), expected);
    assert_eq!(records("d.jsonl", format!("\u{feff}{}", text.replace('\n', "\r\n"))), expected);
}

#[test]
fn other_names() {
    let dataset = read_fields("d.jsonl", r#"{"text":"x","label":"1"}"#, "text", "label").unwrap();
    assert_eq!(dataset.records, [record("x", "1", 1)]);
}

#[test]
fn numbers_and_booleans_are_text_as_they_are_written() {
    let text = r#"{"input":7,"output":1}
{"input":"x","output":true}
{"input":"y","output":1.50}
{"input":"z","output":-0.0e+2}
"#;
    let expected = [("7", "1"), ("x", "true"), ("y", "1.50"), ("z", "-0.0e+2")];
    let expected: Vec<Record> = expected.iter().enumerate().map(|(i, (a, b))| record(a, b, i + 1)).collect();
    assert_eq!(records("d.jsonl", text), expected);
}

#[test]
fn values_that_are_no_text() {
    let text = r#"{"input":null,"output":1.50}
{"input":["x"],"output":{"a":1}}
{"input":"x","output":null}
"#;
    assert_eq!(
        fault("d.jsonl", text),
        "d.jsonl: 3 problems\
         \n  line 1: field `input`: expected a string, found null\
         \n  line 2: field `input`: expected a string, found a list; field `output`: expected a string, \
         found an object\
         \n  line 3: field `output`: expected a string, found null"
    );
    assert_eq!(
        fault("d.json", "[\n{\"input\":\"x\",\"output\":\"1\"},\n{\"input\":\"x\",\"output\":null}]"),
        "d.json: line 3, element 2: field `output`: expected a string, found null"
    );
}

#[test]
fn missing_and_repeated_keys() {
    assert_eq!(
        fault("d.json", r#"[{"input":"x","outptu":"1"},{},{"input":"x","output":"1","input":"y"}]"#),
        "d.json: 3 problems\
         \n  line 1, element 1: no key `output`; found the keys `input`, `outptu`; did you mean `outptu`?\
         \n  line 1, element 2: no key `input`; found no keys at all; no key `output`; found no keys at all\
         \n  line 1, element 3: field `input`: expected the key once, found it 2 times"
    );
}

#[test]
fn empty_texts() {
    assert_eq!(
        fault("d.jsonl", r#"{"input":"","output":" \n"}"#),
        "d.jsonl: line 1: field `input`: expected text, found an empty string; field `output`: expected \
         text, found white space only"
    );
}

#[test]
fn elements_that_are_no_objects() {
    assert_eq!(
        fault("d.json", "[\"x\",\n 5, {\"input\":\"x\",\"output\":\"1\"}]"),
        "d.json: 2 problems\
         \n  line 1, element 1: invalid type: string \"x\", expected an object with the keys `input` and \
         `output`\
         \n  line 2, element 2: invalid type: integer `5`, expected an object with the keys `input` and \
         `output`"
    );
    assert_eq!(
        fault("d.jsonl", "{\"input\":\"x\",\"output\":\"1\"}\n[\"x\", \"1\"]\n"),
        "d.jsonl: line 2: invalid type: sequence, expected an object with the keys `input` and `output`"
    );
    // A list is read under either name.
    assert_eq!(records("d.jsonl", "[{\"input\":\"x\",\"output\":\"1\"}]\n"), [record("x", "1", 1)]);
}

#[test]
fn an_object_for_a_list() {
    let lines = "\n{\"input\":\"x\",\"output\":\"1\"}\n{\"input\":\"y\",\"output\":\"1\"}\n";
    assert_eq!(records("d.json", lines), [record("x", "1", 2), record("y", "1", 3)]);
    assert_eq!(records("d.json", &lines[..lines.len() / 2]), [record("x", "1", 2)]);
    let hint = "hint: rows are a list of objects, one object a line, a list under the key `data`, or columns \
                ({\"input\": [...], \"output\": [...]})";
    assert_eq!(
        fault("d.json", "{\"meta\": {\"rows\": 2}}"),
        format!("d.json: line 1: expected rows, found an object with the key `meta`; {hint}")
    );
    assert_eq!(
        fault(
            "d.json",
            r#"{"train": [{"input": "x", "output": "1"}], "test": [{"input": "y", "output": "0"}]}"#
        ),
        "d.json: line 1: expected one list of rows, found the lists `train`, `test`; hint: put each into a file of its \
         own, and name the files in data.train, data.validation and data.test"
    );
    assert_eq!(fault("d.json", "{\"data\": []}"), "d.json: line 1: expected rows, found an empty list");
    assert_eq!(
        fault("d.json", "{\"text\": \"x\", \"output\": \"1\"}"),
        "d.json: line 1: no key `input`; found the keys `text`, `output`"
    );
    assert_eq!(fault("d.json", "5"), "d.json: line 1: expected a list of objects, which starts with `[`");
    assert_eq!(fault("d.json", "[ ]"), "d.json: line 1: expected objects, found an empty list");
}

#[test]
fn truncated_json() {
    let text = "[\n{\"input\":\"x\",\"output\":\"1\"},\n{\"input\":\"y\",\n\"output\":\"1\"}\n]";
    let whole = read("d.json", text).unwrap();
    assert_eq!(whole.records.len(), 2);
    for end in 1..text.len() {
        let message = fault("d.json", &text[..end]);
        assert!(message.ends_with("found the file's end; hint: is the file cut off?"), "{end}: {message}");
    }
    assert_eq!(
        fault("d.json", &text[..40]),
        "d.json: line 3, element 2: expected the element's end, found the file's end; hint: is the file cut \
         off?"
    );
    assert_eq!(
        fault("d.json", "[{\"input\":\"x\",\"output\":\"1\"}\n"),
        "d.json: line 2, after element 1: expected `]`, found the file's end; hint: is the file cut off?"
    );
    assert_eq!(
        fault("d.jsonl", "{\"input\":\"x\",\"output\":\"1\"}\n{\"input\":\"y\",\"out"),
        "d.jsonl: line 2: expected a whole object, found the line's end inside it; hint: put each object on \
         one line"
    );
}

#[test]
fn faults_of_syntax() {
    assert_eq!(
        fault("d.json", "[\n  {\"input\":\"\",\"output\":\"1\"},\n  {\"input\":\"x\"\n\"output\":\"1\"}]"),
        "d.json: 2 problems\
         \n  line 2, element 1: field `input`: expected text, found an empty string\
         \n  line 4, column 1, element 2: expected `,` or `}`"
    );
    assert_eq!(
        fault("d.jsonl", "{\"input\":\"x\",\"output\":\"1\"}\n  {\"input\" \"x\"}\n{'input':1}\n"),
        "d.jsonl: 2 problems\n  line 2, column 12: expected `:`\n  line 3, column 2: expected JSON, found \
         `'`; hint: this is Python's notation; json.dumps writes JSON, str and repr do not"
    );
    let one = "{\"input\":\"x\",\"output\":\"1\"}";
    assert_eq!(
        fault("d.json", format!("[{one},\n]")),
        "d.json: line 1, after element 1: expected another element after the comma, found `]`"
    );
    assert_eq!(
        fault("d.json", format!("[{one}\n{one}]")),
        "d.json: line 2, after element 1: expected `,` or `]`, found other text"
    );
    assert_eq!(
        fault("d.json", format!("[{one}]\n\n]")),
        "d.json: line 3: expected the file's end after the list, found more text"
    );
    assert_eq!(fault("d.jsonl", format!("{one} {one}\n")), "d.jsonl: line 1, column 28: trailing characters");
}

#[test]
fn invalid_utf8() {
    let hint = "hint: save the file as UTF-8";
    assert_eq!(
        fault("d.json", b"[{\"input\":\"x\",\n\"output\":\"\xE9\"},{\"input\":\"x\",\"output\":\"\"}]"),
        format!(
            "d.json: 2 problems\n  line 2, element 1: expected UTF-8, found byte 0xE9 at byte offset 25 of \
             the file; {hint}\n  line 2, element 2: field `output`: expected text, found an empty string"
        )
    );
    assert_eq!(
        fault("d.jsonl", b"\xEF\xBB\xBF\n{\"input\":\"\xC3\",\"output\":\"1\"}\n"),
        format!("d.jsonl: line 2: expected UTF-8, found byte 0xC3 at byte offset 14 of the file; {hint}")
    );
}

#[test]
fn objects_over_several_lines() {
    let text = "{\n \"input\": \"a\",\n \"output\": \"b\"\n}\n{\n \"input\": \"c\",\n \"output\": \"d\"\n}\n";
    for name in ["d.json", "d.jsonl"] {
        assert_eq!(records(name, text), [record("a", "b", 1), record("c", "d", 5)]);
        assert_eq!(
            fault(name, text.replace("\"d\"", "d")),
            format!("{name}: line 7, column 12, element 2: expected value")
        );
    }
    assert_eq!(
        fault("d.jsonl", "[\"a\", \"b\"]\n[\"c\", \"d\"]\n"),
        "d.jsonl: 2 problems\
         \n  line 1: invalid type: sequence, expected an object with the keys `input` and `output`\
         \n  line 2: invalid type: sequence, expected an object with the keys `input` and `output`"
    );
    let rows =
        r#"{"features": [{"name": "input"}], "rows": [{"row_idx": 0, "row": {"input": "a", "output": 1}}]}"#;
    assert_eq!(records("d.json", rows), [record("a", "1", 1)]);
    assert_eq!(
        fault("d.json", "input,output\na,b\n"),
        "d.json: line 1: expected a list of objects, which starts with `[`; hint: if the file is CSV, name it .csv"
    );
}

#[test]
fn words_of_other_languages() {
    let nan = "hint: JSON has no NaN; give the field a value, or take the row out";
    assert_eq!(
        fault("d.jsonl", "{\"input\":\"NaN\",\"output\":\"1\"}\n{\"input\":\"x\",\"output\":NaN}\n"),
        format!("d.jsonl: line 2, column 23: expected JSON, found `NaN`; {nan}")
    );
    assert_eq!(
        fault("d.json", "[{\"input\":\"x\",\n \"output\":NaN}]"),
        format!("d.json: line 2, column 11, element 1: expected JSON, found `NaN`; {nan}")
    );
    for (word, hint) in
        [("Infinity", "infinite"), ("-Infinity", "infinite"), ("None", "Python"), ("True", "Python")]
    {
        let message = fault("d.json", format!("{{\"input\":\"x\",\"output\":{word}}}\n"));
        assert!(message.contains(word.trim_start_matches('-')) && message.contains(hint), "{message}");
    }
}

#[test]
fn halves_of_characters() {
    let hint = "half of a character; hint: the text was cut within a character such as an emoji";
    assert_eq!(
        fault("d.jsonl", r#"{"input":"sad \ud83d","output":"0"}"#),
        format!(r"d.jsonl: line 1: field `input`: expected text, found the lone surrogate \ud83d, {hint}")
    );
    assert_eq!(
        records("d.jsonl", r#"{"input":"\ud83d\ude00","output":"0","x":"\ud83d"}"#),
        [record("😀", "0", 1)]
    );
    assert_eq!(
        fault("d.csv", b"input,output\nsad \xED\xA0\xBD,0\n"),
        "d.csv: line 2, field `input`: expected UTF-8, found the lone surrogate U+D83D, half of a character, at byte \
         offset 17 of the file; hint: take it out, or save the file as UTF-8"
    );
    assert_eq!(
        fault("d.json", r#"[{"input":"a\u0000b","output":"0"}]"#),
        "d.json: line 1, element 1: field `input`: expected text, found a NUL character (U+0000) in it"
    );
}

#[test]
fn columns_that_do_not_fit() {
    assert_eq!(
        fault("d.json", r#"{"input": ["a", "b"], "output": ["1"]}"#),
        "d.json: line 1: expected columns of one length, found 2 values of `input` and 1 of `output`"
    );
    assert_eq!(
        fault("d.json", r#"{"input": {"0": "a", "1": "b"}, "output": {"0": "1", "2": "1"}}"#),
        "d.json: 2 problems\n  line 1: row `1` is in `input`, not in `output`\
         \n  line 1: row `2` is in `output`, not in `input`"
    );
    assert_eq!(
        fault("d.json", "{\"input\": [\"a\",\n \"\"],\n \"output\": [\"1\", null]}"),
        "d.json: line 2, row 2: field `input`: expected text, found an empty string; field `output`: expected a \
         string, found null"
    );
    assert_eq!(
        fault("d.json", r#"{"input": ["a"], "output": {"0": "1"}}"#),
        "d.json: line 1: expected the columns `input` and `output` to be both lists or both objects, found one of each"
    );
    assert_eq!(
        fault("d.json", r#"{"columns": ["text", "output"], "data": [["a", "1"]]}"#),
        "d.json: line 1: expected the columns `input` and `output`, found `text`, `output`"
    );
    assert_eq!(
        fault("d.json", r#"{"columns": ["input", "output"], "data": [["a", "1"], ["b"]]}"#),
        "d.json: line 1, row 2: expected a list of 2 values"
    );
}

const PIECES: [&str; 12] = ["[", "]", "{", "}", ",", ":", "\"input\"", "\"output\"", "\"x\"", "1", "\n", " "];

proptest! {
    /// What serde_json writes is read back, as a list and line by line.
    #[test]
    fn reads_what_a_writer_wrote(
        rows in prop::collection::vec(("\\PC{0,8}[a-z\"\\\\\n]\\PC{0,3}x", "[0-9\n]{1,3}0"), 1..6),
    ) {
        let objects: Vec<_> =
            rows.iter().map(|(i, o)| serde_json::json!({"input": i, "output": o})).collect();
        let lines: Vec<String> = objects.iter().map(|object| object.to_string()).collect();
        let expected: Vec<Record> =
            rows.iter().enumerate().map(|(n, (i, o))| record(i, o, n + 1)).collect();
        prop_assert_eq!(&records("d.jsonl", lines.join("\n")), &expected);
        prop_assert_eq!(&records("d.json", format!("[{}]", lines.join(",\n"))), &expected);
        let pretty = serde_json::to_string_pretty(&objects).unwrap();
        let lines: Vec<Record> =
            rows.iter().enumerate().map(|(n, (i, o))| record(i, o, 2 + 4 * n)).collect();
        prop_assert_eq!(&records("d.json", pretty), &lines);
    }

    /// Any text is read or refused with an error of the dataset; none makes the reader panic.
    #[test]
    fn any_text_is_read_or_refused(
        pieces in prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..30),
        open: bool,
    ) {
        let text = if open { format!("[{}", pieces.concat()) } else { pieces.concat() };
        for name in ["d.json", "d.jsonl"] {
            match read(name, &text) {
                Ok(dataset) => prop_assert!(!dataset.records.is_empty()),
                Err(e) => prop_assert!(matches!(e, Error::Data { .. }), "{}", e),
            }
        }
    }
}

#[test]
fn missing_keys_of_many_rows_are_told_once() {
    let rows = (0..60).map(|i| format!(r#"{{"text": "t{i}", "label": "{}"}}"#, i % 2)).collect::<Vec<_>>();
    let whole = "no keys `input` and `output`; found `text`, `label`; hint: name the two that hold them, data.input and \
                 data.output in a configuration, --input and --output of `gneiss inspect`";
    assert_eq!(
        fault("d.json", format!("[{}]", rows.join(","))),
        format!("d.json: line 1 (60 rows): {whole}")
    );
    assert_eq!(
        fault("d.json", format!("[{}]", rows.join(",\n"))),
        format!("d.json: lines 1, 2, 3 and 57 more: {whole}")
    );
    let rows = (0..30).map(|i| format!(r#"{{"input": "t{i}", "label": "x"}}"#)).collect::<Vec<_>>();
    assert_eq!(
        fault("d.json", format!("[{}]", rows.join(",\n"))),
        "d.json: lines 1, 2, 3 and 27 more: no key `output`; found the keys `input`, `label`"
    );
}

use super::*;
use proptest::prelude::*;

#[test]
fn reads_rows_with_their_lines() {
    let text = "id,output,input\n1,a,\"x\"\n\n2,b,\" y, \"\"z\"\" \"\n";
    assert_eq!(records("d.csv", text), [record("x", "a", 2), record(" y, \"z\" ", "b", 4)]);
}

#[test]
fn reads_without_a_last_line_end() {
    assert_eq!(records("d.csv", "input,output\nx,1"), [record("x", "1", 2)]);
}

#[test]
fn keeps_quotes_inside_unquoted_fields() {
    assert_eq!(records("d.csv", "input,output\n5\" pipe,1\n"), [record("5\" pipe", "1", 2)]);
}

#[test]
fn accepts_a_byte_order_mark() {
    assert_eq!(records("d.csv", "\u{feff}input,output\nx,1\n"), [record("x", "1", 2)]);
    assert_eq!(records("d.csv", "\u{feff}\"input\",output\nx,1\n"), [record("x", "1", 2)]);
}

#[test]
fn accepts_crlf_and_cr() {
    let expected = [record("x", "1", 2), record("y", "2", 4)];
    let text = "input,output\nx,1\n\ny,2\n";
    assert_eq!(records("d.csv", text), expected);
    assert_eq!(records("d.csv", text.replace('\n', "\r\n")), expected);
    assert_eq!(records("d.csv", text.replace('\n', "\r")), expected);
}

#[test]
fn keeps_fields_of_several_lines_as_written() {
    let text = "input,output\r\n\"one\r\n\r\n  two\n\",\"1\n\"\r\nlast,2\r\n";
    assert_eq!(records("d.csv", text), [record("one\r\n\r\n  two\n", "1\n", 2), record("last", "2", 7)]);
}

#[test]
fn header_only() {
    for text in ["input,output", "input,output\r\n\r\n"] {
        assert_eq!(fault("d.csv", text), "d.csv: line 1: expected rows after the header, found none");
    }
}

#[test]
fn missing_columns() {
    assert_eq!(
        fault("d.csv", "Inputs,label\nx,1\n"),
        "d.csv: 2 problems\
         \n  line 1: no column `input`; found the columns `Inputs`, `label`; did you mean `Inputs`?\
         \n  line 1: no column `output`; found the columns `Inputs`, `label`"
    );
    assert_eq!(
        fault("d.csv", "\n\ninput,otput\nx,1\n"),
        "d.csv: line 3: no column `output`; found the columns `input`, `otput`; did you mean `otput`?"
    );
}

#[test]
fn other_separators() {
    for (separator, name) in [(";", "semicolons"), ("\t", "tabs"), ("|", "`|`s")] {
        let dataset =
            read("d.csv", format!("input{separator}output\n\"x, {separator}y\"{separator}1\n")).unwrap();
        assert_eq!(dataset.records, [record(&format!("x, {separator}y"), "1", 2)]);
        assert_eq!(dataset.notes, [format!("fields are separated by {name}")]);
        let message = fault("d.csv", format!("text{separator}output\nx{separator}1\n"));
        assert_eq!(
            message,
            format!(
                "d.csv: line 1: no column `input`; found the columns `text`, `output`; fields are separated by {name}"
            )
        );
    }
    // Both columns are there with commas, so it is commas that separate.
    assert_eq!(records("d.csv", "input,output,a;b\nx;y,1,\n"), [record("x;y", "1", 2)]);
    assert_eq!(
        fault("d.csv", "input;output\nx;1;2\ny;3\n"),
        "d.csv: line 2: expected 2 fields, found 3; hint: put a field that holds a semicolon or a line break in double \
         quotes"
    );
}

#[test]
fn a_line_that_names_the_separator() {
    let expected = [record("x, y", "1", 3)];
    for text in ["sep=;\ninput;output\nx, y;1\n", "\"sep=;\"\r\ninput;output\r\nx, y;1\r\n"] {
        assert_eq!(records("d.csv", text), expected, "{text}");
    }
    assert_eq!(records("d.csv", "SEP=,\ninput,output\n\"x, y\",1\n"), expected);
    assert_eq!(records("d.csv", "sep=\t\ninput\toutput\nx, y\t1\n"), expected);
    // A line that names the wrong one does no harm.
    assert_eq!(records("d.csv", "sep=;\ninput,output\n\"x, y\",1\n"), expected);
    assert_eq!(fault("d.csv", "sep=,\n\n"), "d.csv: line 2: expected a header, found the file's end");
}

#[test]
fn spaces_after_commas() {
    let text = "input, output\n\"a, \"\"b\"\"\", 1\n  c d , 2\n";
    let dataset = read("d.csv", text).unwrap();
    assert_eq!(dataset.records, [record("a, \"b\"", "1", 2), record("c d ", "2", 3)]);
    assert_eq!(dataset.notes, ["spaces after a comma are not part of a field"]);
    // A quote after a space opens a field in all rows or in none.
    assert_eq!(records("d.csv", "input,output\na, \"1\"\nb,2\n"), [record("a", "1", 2), record("b", "2", 3)]);
    let spoken = "output,input\n1, \"Never\" said she\n";
    assert_eq!(records("d.csv", spoken), [record(" \"Never\" said she", "1", 2)]);
    // Text keeps its spaces where nothing says that they are the separator's.
    assert_eq!(records("d.csv", "input,output\n a, 1\n"), [record(" a", " 1", 2)]);
}

#[test]
fn names_with_what_cannot_be_seen() {
    for name in ["input ", "\u{feff}input", "\u{a0}input", "in\u{200b}put"] {
        assert_eq!(records("d.csv", format!("{name},output\na,b\n")), [record("a", "b", 2)], "{name:?}");
    }
    let dataset = read_fields("d.csv", " input,output\na,b\n", " input", "output").unwrap();
    assert_eq!(dataset.records, [record("a", "b", 2)]);
}

#[test]
fn empty_fields_at_the_end() {
    let expected = [record("x", "1", 2), record("y", "2", 3)];
    for text in
        ["input,output\nx,1,,\ny,2\n", "input,output,,\nx,1\ny,2,,,,\n", "input,output,,\nx,1,,\ny,2,,text\n"]
    {
        assert_eq!(records("d.csv", text), expected, "{text}");
    }
    let message = fault("d.csv", "input,output\nx,1,,z\ny,2\n");
    assert!(message.contains("line 2: expected 2 fields, found 4"), "{message}");
    let message = fault("d.csv", "input,output,note\nx,1\ny,2,z\n");
    assert!(message.contains("line 2: expected 3 fields, found 2"), "{message}");
}

#[test]
fn rows_without_text() {
    assert_eq!(
        records("d.csv", "input,output\n,\nx,1\n,,,\n  \n\"\",\"\"\ny,2\n"),
        [record("x", "1", 3), record("y", "2", 7)]
    );
    assert_eq!(
        fault("d.csv", "input,output\n,\n,\n"),
        "d.csv: line 1: expected rows after the header, found none"
    );
}

#[test]
fn the_end_of_a_file_to_dos() {
    assert_eq!(records("d.csv", "input,output\r\nx,1\r\n\x1A"), [record("x", "1", 2)]);
}

#[test]
fn one_fault_of_all_rows_is_told_once() {
    let rows = "nice, clean,1\n".repeat(9_999);
    assert_eq!(
        fault("d.csv", format!("input,output\n{rows}")),
        "d.csv: line 2 and all 9998 rows after it: expected 2 fields, as the header has, found 3; hint: give every \
         column a name in the header, or put a field that holds a comma in double quotes"
    );
}

#[test]
fn text_that_is_none() {
    assert_eq!(
        fault("d.csv", "input,output\nx\0y,1\nz\0,2\n"),
        "d.csv: line 2: expected text, found a NUL character (U+0000) at byte offset 14 of the file and 1 more; hint: \
         take it out, or was the file written in another encoding or cut off in a crash?"
    );
    assert_eq!(
        fault("d.csv", "[{\"input\": \"x\", \"output\": \"1\"}]\n"),
        "d.csv: 2 problems\
         \n  line 1: no column `input`; found the columns `[{\"input\": \"x\"`, ` \"output\": \"1\"}]`; hint: if the \
         file is JSON, name it .json or .jsonl\
         \n  line 1: no column `output`; found the columns `[{\"input\": \"x\"`, ` \"output\": \"1\"}]`; hint: if the \
         file is JSON, name it .json or .jsonl"
    );
}

#[test]
fn duplicate_header() {
    assert_eq!(
        fault("d.csv", "input,output,input\nx,1,y\n"),
        "d.csv: line 1: expected each column once, found `input` in columns 1 and 3"
    );
    // What a spreadsheet leaves at the right of a table.
    assert_eq!(records("d.csv", "input,output,,\nx,1,,\n"), [record("x", "1", 2)]);
}

#[test]
fn invalid_utf8() {
    assert_eq!(
        fault("d.csv", b"input,output\nx,1\n\"a\ncaf\xE9\",1\ny,\xC3\n"),
        "d.csv: 2 problems\
         \n  line 4, field `input`: expected UTF-8, found byte 0xE9 at byte offset 23 of the file; hint: \
         save the file as UTF-8\
         \n  line 5, field `output`: expected UTF-8, found byte 0xC3 at byte offset 30 of the file; hint: \
         save the file as UTF-8"
    );
    assert_eq!(
        fault("d.csv", b"\xEF\xBB\xBFinput,\xFF\nx,1\n"),
        "d.csv: line 1, field 2: expected UTF-8, found byte 0xFF at byte offset 9 of the file; hint: save \
         the file as UTF-8"
    );
}

#[test]
fn wrong_number_of_fields() {
    let hint = "hint: put a field that holds a comma or a line break in double quotes";
    assert_eq!(
        fault("d.csv", "input,output\nnice, clean,1\ngood,1\nbad\n"),
        format!(
            "d.csv: 2 problems\n  line 2: expected 2 fields, found 3; {hint}\n  line 4: expected 2 fields, \
             found 1; {hint}"
        )
    );
}

#[test]
fn empty_fields() {
    assert_eq!(
        fault("d.csv", "input,output\n,1\nx,\"\"\n \t,\n"),
        "d.csv: 3 problems\
         \n  line 2: field `input`: expected text, found an empty string\
         \n  line 3: field `output`: expected text, found an empty string\
         \n  line 4: field `input`: expected text, found white space only; field `output`: expected text, \
         found an empty string"
    );
}

#[test]
fn unclosed_quote() {
    assert_eq!(
        fault("d.csv", "input,output\nx,1\n\"a\nb\",\"never\nclosed,1\nz,2\n"),
        "d.csv: line 4, field `output`: the double quote that opens the field is never closed, so the rest \
         of the file is read as one field; hint: close it after the field"
    );
    assert_eq!(
        fault("d.csv", "input,\"output\nx,1\n"),
        "d.csv: line 1, field 2: the double quote that opens the field is never closed, so the rest of the \
         file is read as one field; hint: close it after the field"
    );
}

#[test]
fn text_after_a_closing_quote() {
    assert_eq!(
        fault("d.csv", "input,output\n\"He said \"hi\" to me\",1\nx,2\n"),
        "d.csv: line 2, field `input`: expected a comma or the line's end after the closing double quote, \
         found more text; hint: double a quote that belongs to the text (\"\")"
    );
}

proptest! {
    /// What the `csv` crate's writer writes is read back, with the line that each row starts on.
    #[test]
    fn reads_what_a_writer_wrote(
        rows in prop::collection::vec(("[a-c \",\r\né]{0,8}[a-cé]", "[0-9][\",\r\n]{0,3}"), 1..8),
        crlf: bool,
        mark: bool,
    ) {
        let terminator = if crlf { ::csv::Terminator::CRLF } else { ::csv::Terminator::Any(b'\n') };
        let mut writer = ::csv::WriterBuilder::new().terminator(terminator).from_writer(Vec::new());
        writer.write_record(["input", "output"]).unwrap();
        let mut expected = Vec::new();
        let mut text = Vec::new();
        for (input, output) in &rows {
            writer.flush().unwrap();
            let before = String::from_utf8(writer.get_ref().clone()).unwrap().replace("\r\n", "\n");
            expected.push(record(input, output, before.matches(['\n', '\r']).count() + 1));
            writer.write_record([input, output]).unwrap();
        }
        if mark {
            text.extend("\u{feff}".bytes());
        }
        text.extend(writer.into_inner().unwrap());
        prop_assert_eq!(records("d.csv", text), expected);
    }

    /// Any bytes are read or refused with an error of the dataset; none make the reader panic.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(
        prop_oneof![Just(b'"'), Just(b','), Just(b'\n'), Just(b'\r'), Just(b'x'), Just(0xE9u8)], 0..40,
    )) {
        let mut text = b"input,output\n".to_vec();
        text.extend(bytes);
        match read("d.csv", text) {
            Ok(dataset) => prop_assert!(!dataset.records.is_empty()),
            Err(e) => prop_assert!(matches!(e, Error::Data { .. }), "{}", e),
        }
    }
}

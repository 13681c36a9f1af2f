//! Parquet: two columns of text, numbers or booleans, or a column of chats.

use super::problems::FileNotes;
use super::{FieldNames, Problems, Record};

/// Reads rows; a record's line is its row, counted from 1.
#[cfg(feature = "parquet")]
pub(super) fn read(
    bytes: Vec<u8>,
    names: FieldNames<'_>,
    problems: &mut Problems,
    notes: &mut FileNotes,
) -> Vec<Record> {
    match panics::caught(|| rows::read(bytes, names, problems, notes)) {
        Some(Ok(records)) => {
            if records.is_empty() && problems.is_empty() {
                problems.push("expected rows, found none".into());
            }
            records
        }
        Some(Err(problem)) => {
            problems.push(problem);
            Vec::new()
        }
        None => {
            problems.push("Parquet: the file is damaged; hint: write or fetch it again".into());
            Vec::new()
        }
    }
}

/// The crate panics on some damaged files.
#[cfg(feature = "parquet")]
mod panics {
    use std::cell::Cell;
    use std::panic::{self, AssertUnwindSafe};
    use std::sync::Once;

    thread_local! {
        static IS_QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();

    /// The result of `read`; `None` if it panics, without a printed message. After a panic, values that it borrows are
    /// only dropped or reported.
    pub(super) fn caught<T>(read: impl FnOnce() -> T) -> Option<T> {
        HOOK.call_once(|| {
            let hook = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if !IS_QUIET.get() {
                    hook(info);
                }
            }));
        });
        IS_QUIET.set(true);
        let result = panic::catch_unwind(AssertUnwindSafe(read));
        IS_QUIET.set(false);
        result.ok()
    }
}

/// Refuses the file: this build has no reader for it.
#[cfg(not(feature = "parquet"))]
pub(super) fn read(_: Vec<u8>, _: FieldNames<'_>, problems: &mut Problems, _: &mut FileNotes) -> Vec<Record> {
    problems.push(
        "the file is Parquet, which this build does not read; hint: build with --features parquet, or write the \
         rows as JSON Lines"
            .into(),
    );
    Vec::new()
}

#[cfg(feature = "parquet")]
mod rows {
    use std::sync::Arc;

    use ::parquet::basic::{ConvertedType, LogicalType, Type as Physical};
    use ::parquet::data_type::ByteArray;
    use ::parquet::errors::ParquetError;
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use ::parquet::record::{Field, Row};
    use ::parquet::schema::types::{Type, TypePtr};

    use super::super::chat::{self, Message, MessageContent};
    use super::super::problems::{FileNotes, ValueKind};
    use super::super::{FieldNames, Problems, Record, blank, found_names};

    /// The columns that are read of each row.
    enum RowColumns<'a> {
        Two,
        Chat(&'a str),
    }

    /// The records; a problem of the file as a whole is an error.
    pub(super) fn read(
        bytes: Vec<u8>,
        names: FieldNames<'_>,
        problems: &mut Problems,
        notes: &mut FileNotes,
    ) -> Result<Vec<Record>, String> {
        let length = bytes.len();
        let reader = SerializedFileReader::new(bytes::Bytes::from(bytes)).map_err(|e| damaged(&e))?;
        check_places(&reader, length)?;
        let schema = reader.metadata().file_metadata().schema().clone();
        let fields = schema.get_fields();
        let all: Vec<&str> = fields.iter().map(|field| field.name()).collect();
        let (columns, wanted) = match chat::key(names, &all) {
            Some(key) => (RowColumns::Chat(key), vec![key]),
            None => (RowColumns::Two, vec![names.input, names.output]),
        };
        let mut projected = Vec::new();
        for name in wanted {
            projected.push(column(name, fields, &columns, &all)?);
        }
        let projection = Type::group_type_builder(schema.name()).with_fields(projected).build();
        let projection = projection.map_err(|e| damaged(&e))?;
        let mut records = Vec::new();
        let mut line = 0;
        for group in 0..reader.num_row_groups() {
            let group = reader.get_row_group(group).map_err(|e| damaged(&e))?;
            for row in group.get_row_iter(Some(projection.clone())).map_err(|e| damaged(&e))? {
                line += 1;
                let row = row.map_err(|e| format!("row {line}: {}", damaged(&e)))?;
                match (record(row, line, names, &columns, notes), &columns) {
                    (Ok(record), _) => records.push(record),
                    (Err(fault), RowColumns::Two) => problems.push(format!("row {line}: {fault}")),
                    (Err(fault), RowColumns::Chat(_)) => problems.push_common("row", line, fault),
                }
            }
        }
        Ok(records)
    }

    /// Checks that the columns lie inside the file, on which the crate relies.
    fn check_places(reader: &dyn FileReader, length: usize) -> Result<(), String> {
        let groups = reader.metadata().row_groups();
        for column in groups.iter().flat_map(|group| group.columns()) {
            let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
            let end = start.checked_add(column.compressed_size()).and_then(|end| usize::try_from(end).ok());
            let fits = start >= 0 && column.compressed_size() >= 0 && end.is_some_and(|end| end <= length);
            if !fits || column.num_values() < 0 {
                let name = column.column_descr().name();
                return Err(format!(
                    "Parquet: column `{name}`: expected bytes of the file, found {} from {start} on; hint: is the file cut \
                     off or damaged?",
                    column.compressed_size()
                ));
            }
        }
        Ok(())
    }

    fn damaged(e: &ParquetError) -> String {
        let text = e.to_string();
        let hint = match text.contains("compile") {
            true => "write it with the compression snappy, gzip, lz4 or zstd",
            false => "is the file cut off or damaged?",
        };
        format!("Parquet: {text}; hint: {hint}")
    }

    /// The column of a name, if its type can be read.
    fn column(
        name: &str,
        fields: &[TypePtr],
        columns: &RowColumns<'_>,
        all: &[&str],
    ) -> Result<TypePtr, String> {
        let Some(field) = fields.iter().find(|field| field.name() == name) else {
            return Err(format!("no column `{name}`{}", found_names(name, "column", all)));
        };
        match columns {
            RowColumns::Two => match other_type(field) {
                Some(found) => Err(format!(
                    "column `{name}`: expected text, whole or floating-point numbers, or booleans, found {found}"
                )),
                None => Ok(Arc::clone(field)),
            },
            RowColumns::Chat(_) => match leaves(field).into_iter().find_map(|leaf| other_type(&leaf)) {
                Some(found) => {
                    Err(format!("column `{name}`: expected messages of text, found {found} in them"))
                }
                None => Ok(Arc::clone(field)),
            },
        }
    }

    /// All columns inside a column.
    fn leaves(field: &TypePtr) -> Vec<TypePtr> {
        match field.is_primitive() {
            true => vec![Arc::clone(field)],
            false => field.get_fields().iter().flat_map(leaves).collect(),
        }
    }

    /// The type of a column that can't be read as text.
    fn other_type(field: &Type) -> Option<String> {
        if !field.is_primitive() {
            return Some("lists or groups".into());
        }
        let info = field.get_basic_info();
        let (logical, converted) = (info.logical_type_ref(), info.converted_type());
        let physical = field.get_physical_type();
        let readable = match logical {
            // Written by older programs.
            None => {
                let is_whole = matches!(physical, Physical::INT32 | Physical::INT64);
                let whole = [
                    ConvertedType::INT_8,
                    ConvertedType::INT_16,
                    ConvertedType::INT_32,
                    ConvertedType::INT_64,
                    ConvertedType::UINT_8,
                    ConvertedType::UINT_16,
                    ConvertedType::UINT_32,
                    ConvertedType::UINT_64,
                ];
                let text = [ConvertedType::UTF8, ConvertedType::ENUM, ConvertedType::JSON];
                let plain = ![Physical::INT96, Physical::FIXED_LEN_BYTE_ARRAY].contains(&physical);
                converted == ConvertedType::NONE && plain
                    || is_whole && whole.contains(&converted)
                    || physical == Physical::BYTE_ARRAY && text.contains(&converted)
            }
            Some(logical) => matches!(
                logical,
                LogicalType::String
                    | LogicalType::Enum
                    | LogicalType::Json
                    | LogicalType::Integer { .. }
                    | LogicalType::Unknown
            ),
        };
        let name = || match logical {
            Some(logical) => format!("{logical:?}"),
            None if converted != ConvertedType::NONE => format!("{converted}"),
            None => format!("{physical}"),
        };
        (!readable).then(name)
    }

    fn record(
        row: Row,
        line: usize,
        names: FieldNames<'_>,
        columns: &RowColumns<'_>,
        notes: &mut FileNotes,
    ) -> Result<Record, String> {
        let mut fields = row.into_columns();
        let mut take = |name: &str| {
            let found = fields.iter().position(|(column, _)| column == name);
            found.map_or(Field::Null, |i| fields.swap_remove(i).1)
        };
        if let RowColumns::Chat(key) = columns {
            let messages = messages(key, take(key))?;
            let (input, output) = chat::pair(key, messages, &[])?;
            notes.chat(key);
            return Ok(Record { input, output, line });
        }
        let [input, output] = [names.input, names.output].map(|name| (name, take(name)));
        match [input, output].map(|(name, field)| text(name, field, notes)) {
            [Ok(input), Ok(output)] => Ok(Record { input, output, line }),
            texts => {
                let faults: Vec<String> = texts.into_iter().filter_map(Result::err).collect();
                Err(faults.join("; "))
            }
        }
    }

    /// The text of a cell.
    fn text(name: &str, field: Field, notes: &mut FileNotes) -> Result<String, String> {
        let wrong = |found: &str| Err(format!("field `{name}`: expected text, found {found}"));
        let (kind, text) = match field {
            Field::Str(text) => (None, text),
            Field::Bytes(bytes) => match utf8(&bytes) {
                Some(text) => (None, text),
                None => return wrong("bytes that are no UTF-8"),
            },
            Field::Bool(value) => (Some(ValueKind::Boolean), value.to_string()),
            Field::Byte(_) | Field::Short(_) | Field::Int(_) | Field::Long(_) => {
                (Some(ValueKind::Number), field.to_string())
            }
            Field::UByte(_) | Field::UShort(_) | Field::UInt(_) | Field::ULong(_) => {
                (Some(ValueKind::Number), field.to_string())
            }
            // With its decimal point, as JSON and Python write it.
            Field::Float(n) if n.is_finite() => (Some(ValueKind::Number), format!("{n:?}")),
            Field::Double(n) if n.is_finite() => (Some(ValueKind::Number), format!("{n:?}")),
            Field::Float(_) | Field::Double(_) => return wrong("NaN or an infinite number"),
            Field::Null => return wrong("null"),
            _ => return wrong("another type"),
        };
        if let Some(kind) = kind {
            notes.value(kind, &text);
        }
        match blank(&text) {
            Some(why) => Err(format!("field `{name}`: {why}")),
            None => Ok(text),
        }
    }

    fn utf8(bytes: &ByteArray) -> Option<String> {
        bytes.as_utf8().ok().map(str::to_owned)
    }

    /// The messages of a chat.
    fn messages(key: &str, field: Field) -> Result<Vec<Message>, String> {
        let Field::ListInternal(list) = field else {
            return Err(format!("`{key}`: expected a list of messages, found another value"));
        };
        let mut messages = Vec::new();
        for element in list.elements() {
            let Field::Group(message) = element else {
                return Err(format!("`{key}`: expected messages with `role` and `content`"));
            };
            let find = |names: [&str; 2]| {
                let mut columns = message.get_column_iter();
                columns.find(|(name, _)| names.contains(&name.as_str())).map(|(_, field)| field)
            };
            let string = |field: &Field| match field {
                Field::Str(text) => Some(text.clone()),
                Field::Bytes(bytes) => utf8(bytes),
                _ => None,
            };
            let Some(role) = find(["role", "from"]).and_then(string) else {
                return Err(format!(
                    "`{key}`: expected messages with `role` and `content`, or `from` and `value`"
                ));
            };
            let content = find(["content", "value"]).and_then(string);
            let content = content.map_or(MessageContent::Other("null"), MessageContent::Text);
            messages.push(Message { role: role.to_lowercase(), content, ignored: false });
        }
        Ok(messages)
    }
}

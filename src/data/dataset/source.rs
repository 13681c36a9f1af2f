//! A dataset file's bytes, and where in the file an offset is.

use std::ops::Range;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// The bytes of a file; all offsets count from its first byte, the byte order mark included.
pub(super) struct Source<'a> {
    pub(super) bytes: &'a [u8],
    /// Where the text begins, after a byte order mark.
    pub(super) start: usize,
    /// Offsets of the lines' first bytes.
    lines: Vec<usize>,
}

impl<'a> Source<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let start = if bytes.starts_with(BOM) { BOM.len() } else { 0 };
        let mut lines = vec![start];
        for (i, byte) in bytes.iter().enumerate().skip(start) {
            // A CR alone ends a line too, as the CSV reader has it.
            if *byte == b'\n' || (*byte == b'\r' && bytes.get(i + 1) != Some(&b'\n')) {
                lines.push(i + 1);
            }
        }
        Self { bytes, start, lines }
    }

    /// What is wrong with the file as a whole, if anything is.
    pub(super) fn not_text(&self) -> Option<String> {
        if self.bytes.starts_with(b"\xFF\xFE") || self.bytes.starts_with(b"\xFE\xFF") {
            return Some(
                "line 1, byte offset 0: expected UTF-8, found the byte order mark of UTF-16; hint: save the \
                 file as UTF-8"
                    .into(),
            );
        }
        self.bytes[self.start..].trim_ascii().is_empty().then(|| "the file is empty".into())
    }

    /// Line of a byte, counted from 1.
    pub(super) fn line_of(&self, offset: usize) -> usize {
        self.lines.partition_point(|start| *start <= offset).max(1)
    }

    /// Column of a byte in its line, in bytes, counted from 1.
    pub(super) fn column_of(&self, offset: usize) -> usize {
        offset - self.lines[self.line_of(offset) - 1] + 1
    }

    /// Each line's bytes, its end included.
    pub(super) fn lines(&self) -> impl Iterator<Item = Range<usize>> {
        let ends = self.lines.iter().skip(1).copied().chain([self.bytes.len()]);
        self.lines.iter().copied().zip(ends).map(|(start, end)| start..end)
    }

    /// Offset of the first byte from `at` on that is no white space of JSON.
    pub(super) fn skip_blank(&self, at: usize) -> usize {
        let rest = &self.bytes[at..];
        at + rest.iter().position(|b| !b" \t\r\n".contains(b)).unwrap_or(rest.len())
    }

    /// The text of a range, or where and how it isn't UTF-8.
    pub(super) fn text(&self, range: Range<usize>) -> Result<&'a str, NotUtf8> {
        std::str::from_utf8(&self.bytes[range.clone()]).map_err(|e| {
            let offset = range.start + e.valid_up_to();
            NotUtf8 { line: self.line_of(offset), offset, byte: self.bytes[offset] }
        })
    }
}

/// A byte that is no UTF-8.
#[derive(Debug)]
pub(super) struct NotUtf8 {
    pub(super) line: usize,
    offset: usize,
    byte: u8,
}

impl std::fmt::Display for NotUtf8 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { offset, byte, .. } = self;
        write!(
            f,
            "expected UTF-8, found byte 0x{byte:02X} at byte offset {offset} of the file; hint: save the \
             file as UTF-8"
        )
    }
}

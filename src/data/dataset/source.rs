//! A dataset file's bytes, and the line and column of an offset.

use std::ops::Range;

use crate::text::other_unicode;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// The bytes of a file; all offsets count from its first byte, the byte order mark included.
pub(super) struct SourceFile<'a> {
    pub(super) bytes: &'a [u8],
    /// The start of the text, after a byte order mark.
    pub(super) start: usize,
    /// Offsets of the lines' first bytes.
    lines: Vec<usize>,
}

impl<'a> SourceFile<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let start = if bytes.starts_with(BOM) { BOM.len() } else { 0 };
        let mut lines = vec![start];
        for (i, byte) in bytes.iter().enumerate().skip(start) {
            // A CR alone ends a line too, as in the CSV reader.
            if *byte == b'\n' || (*byte == b'\r' && bytes.get(i + 1) != Some(&b'\n')) {
                lines.push(i + 1);
            }
        }
        Self { bytes, start, lines }
    }

    /// The problem of the file as a whole, if there is one.
    pub(super) fn not_text(&self) -> Option<String> {
        if let Some(found) = other_unicode(self.bytes) {
            return Some(format!(
                "line 1, byte offset 0: expected UTF-8, found {found}; hint: save the file as UTF-8"
            ));
        }
        if let Some(offset) = self.bytes.iter().position(|byte| *byte == 0) {
            let all = self.bytes[offset..].iter().filter(|byte| **byte == 0).count();
            let more = if all > 1 { format!(" and {} more", all - 1) } else { String::new() };
            return Some(format!(
                "line {}: expected text, found a NUL character (U+0000) at byte offset {offset} of the file{more}; \
                 hint: take it out, or was the file written in another encoding or cut off in a crash?",
                self.line_of(offset)
            ));
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

    /// Offset of the first byte of a line, counted from 1.
    pub(super) fn line_start(&self, line: usize) -> usize {
        self.lines.get(line.saturating_sub(1)).copied().unwrap_or(self.bytes.len())
    }

    /// Offset after the end of the line that contains a byte.
    pub(super) fn line_end(&self, offset: usize) -> usize {
        self.line_start(self.line_of(offset) + 1)
    }

    /// Offset in the file of a part of its text.
    pub(super) fn offset_of(&self, part: &str) -> usize {
        (part.as_ptr() as usize).saturating_sub(self.bytes.as_ptr() as usize)
    }

    /// The byte range of each line, its end included.
    pub(super) fn lines(&self) -> impl Iterator<Item = Range<usize>> {
        let ends = self.lines.iter().skip(1).copied().chain([self.bytes.len()]);
        self.lines.iter().copied().zip(ends).map(|(start, end)| start..end)
    }

    /// Offset of the first byte from `at` on that is not JSON white space.
    pub(super) fn skip_blank(&self, at: usize) -> usize {
        let rest = &self.bytes[at..];
        at + rest.iter().position(|b| !b" \t\r\n".contains(b)).unwrap_or(rest.len())
    }

    /// The text of a range, or the place of the first byte that isn't UTF-8.
    pub(super) fn text(&self, range: Range<usize>) -> Result<&'a str, NotUtf8> {
        std::str::from_utf8(&self.bytes[range.clone()]).map_err(|e| {
            let offset = range.start + e.valid_up_to();
            let byte = |i: usize| self.bytes.get(offset + i).copied().unwrap_or_default();
            NotUtf8 { line: self.line_of(offset), offset, byte: byte(0), next: [byte(1), byte(2)] }
        })
    }
}

/// A byte that is not UTF-8.
#[derive(Debug)]
pub(super) struct NotUtf8 {
    pub(super) line: usize,
    offset: usize,
    byte: u8,
    /// The two bytes after it.
    next: [u8; 2],
}

impl std::fmt::Display for NotUtf8 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { offset, byte, next, .. } = self;
        if let (0xED, [0xA0..=0xBF, 0x80..=0xBF]) = (byte, next) {
            let half = 0xD000 | u32::from(next[0] & 0x3F) << 6 | u32::from(next[1] & 0x3F);
            return write!(
                f,
                "expected UTF-8, found the lone surrogate U+{half:04X}, half of a character, at byte offset {offset} \
                 of the file; hint: take it out, or save the file as UTF-8"
            );
        }
        write!(
            f,
            "expected UTF-8, found byte 0x{byte:02X} at byte offset {offset} of the file; hint: save the \
             file as UTF-8"
        )
    }
}

//! The values of a list, each with its place in the file.

use std::ops::Range;

use serde::de::IgnoredAny;
use serde_json::Deserializer;

use super::super::source::SourceFile;
use super::syntax_fault;

/// The values of a list, or values one after the other; ends after them or at the first syntax error.
pub(super) struct Elements<'a> {
    source: &'a SourceFile<'a>,
    /// The start of the list or of the first value.
    start: usize,
    /// The position after the list's `[`, or after the last value.
    at: usize,
    /// Number of values so far.
    count: usize,
    /// Whether there are commas between the values and a `]` after them.
    is_list: bool,
    done: bool,
}

impl<'a> Elements<'a> {
    /// The values of the list whose `[` is at `start`.
    pub(super) fn list(source: &'a SourceFile<'a>, start: usize) -> Self {
        Self { source, start, at: start + 1, count: 0, is_list: true, done: false }
    }

    /// Values with white space between them, from `start` to the file's end.
    pub(super) fn stream(source: &'a SourceFile<'a>, start: usize) -> Self {
        Self { source, start, at: start, count: 0, is_list: false, done: false }
    }

    /// The start of the list or of the first value.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Number of values so far.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn next(&mut self) -> Option<Result<Range<usize>, String>> {
        if self.done {
            return None;
        }
        let element = self.step();
        self.done = !matches!(element, Ok(Some(_)));
        element.transpose()
    }

    fn step(&mut self) -> Result<Option<Range<usize>>, String> {
        let source = self.source;
        let mut start = source.skip_blank(self.at);
        let line = source.line_of(start);
        if !self.is_list {
            return if start == source.bytes.len() { Ok(None) } else { self.value(start).map(Some) };
        }
        match (source.bytes.get(start), self.count) {
            (Some(b']'), _) => {
                let rest = source.skip_blank(start + 1);
                if rest < source.bytes.len() {
                    let line = source.line_of(rest);
                    return Err(format!(
                        "line {line}: expected the file's end after the list, found more text"
                    ));
                }
                return Ok(None);
            }
            (Some(b','), 1..) => {
                start = source.skip_blank(start + 1);
                if source.bytes.get(start) == Some(&b']') {
                    let count = self.count;
                    return Err(format!(
                        "line {line}, after element {count}: expected another element after the comma, found \
                         `]`"
                    ));
                }
            }
            (Some(_), 1..) => {
                let count = self.count;
                return Err(format!(
                    "line {line}, after element {count}: expected `,` or `]`, found other text"
                ));
            }
            _ => {}
        }
        if start == source.bytes.len() {
            let line = source.line_of(start);
            return Err(format!(
                "line {line}, after element {}: expected `]`, found the file's end; hint: is the file cut \
                 off?",
                self.count
            ));
        }
        self.value(start).map(Some)
    }

    /// The value that begins at `start`.
    fn value(&mut self, start: usize) -> Result<Range<usize>, String> {
        self.count += 1;
        let mut stream = Deserializer::from_slice(&self.source.bytes[start..]).into_iter::<IgnoredAny>();
        if let Some(Err(e)) = stream.next() {
            return Err(self.fault(start, &e));
        }
        self.at = start + stream.byte_offset();
        Ok(start..self.at)
    }

    fn fault(&self, start: usize, e: &serde_json::Error) -> String {
        if e.is_eof() {
            return format!(
                "line {}, element {}: expected the element's end, found the file's end; hint: is the file \
                 cut off?",
                self.source.line_of(start),
                self.count
            );
        }
        // The reader stopped in the line of the fault.
        let line = self.source.line_of(start) + e.line() - 1;
        let end = self.source.line_end(self.source.line_start(line));
        syntax_fault(self.source, start..end, &format!(", element {}", self.count), e)
    }
}

//! The rules of quoting (RFC 4180), which the CSV reader does not enforce.

/// A fault of quoting in a row.
pub(super) struct FaultAt {
    pub(super) kind: QuoteFault,
    /// Offset in the row.
    pub(super) at: usize,
    /// Index of the field.
    pub(super) field: usize,
}

pub(super) enum QuoteFault {
    /// A quoted field goes on to the end of the file.
    Unclosed,
    /// Text follows a closing quote.
    Stray,
}

/// The position of a reader in a row.
#[derive(Clone, Copy)]
enum ReaderState {
    Start,
    Plain,
    Quoted,
    AfterQuote,
}

impl ReaderState {
    /// The position after `byte`; `None` after a row's end.
    fn step(self, byte: u8, separator: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Start, b'"') | (Self::AfterQuote, b'"') => Self::Quoted,
            (Self::Quoted, b'"') => Self::AfterQuote,
            (Self::Quoted, _) => Self::Quoted,
            (_, byte) if byte == separator => Self::Start,
            (_, b'\r' | b'\n') => return None,
            (Self::AfterQuote, _) => Self::AfterQuote,
            (Self::Start | Self::Plain, _) => Self::Plain,
        })
    }
}

/// The first fault in a row that the CSV reader would accept and that would change the text.
pub(super) fn quote_fault(row: &[u8], separator: u8) -> Option<FaultAt> {
    let (mut place, mut field, mut opened) = (ReaderState::Start, 0, 0);
    for (at, byte) in row.iter().enumerate() {
        let ends = *byte == separator || matches!(byte, b'"' | b'\r' | b'\n');
        if matches!(place, ReaderState::AfterQuote) && !ends {
            return Some(FaultAt { kind: QuoteFault::Stray, at, field });
        }
        let next = place.step(*byte, separator)?;
        match (place, next) {
            (ReaderState::Start, ReaderState::Quoted) => opened = at,
            (ReaderState::Start | ReaderState::Plain | ReaderState::AfterQuote, ReaderState::Start) => {
                field += 1
            }
            _ => {}
        }
        place = next;
    }
    matches!(place, ReaderState::Quoted).then_some(FaultAt { kind: QuoteFault::Unclosed, at: opened, field })
}

/// Whether a field of a file begins with spaces and then a quote.
pub(super) fn has_spaces_before_quotes(bytes: &[u8], separator: u8) -> bool {
    let (mut place, mut spaces) = (ReaderState::Start, 0);
    for byte in bytes {
        match (place, byte) {
            (ReaderState::Start, b' ') => {
                spaces += 1;
                continue;
            }
            (ReaderState::Start, b'"') if spaces > 0 => return true,
            _ => {}
        }
        spaces = 0;
        place = place.step(*byte, separator).unwrap_or(ReaderState::Start);
    }
    false
}

/// A file without the spaces at the beginning of its unquoted fields; `None` if its quotes are then at fault.
pub(super) fn without_spaces(bytes: &[u8], start: usize, separator: u8) -> Option<Vec<u8>> {
    let mut compact = bytes[..start].to_vec();
    let mut place = ReaderState::Start;
    for byte in &bytes[start..] {
        if matches!((place, byte), (ReaderState::Start, b' ')) {
            continue;
        }
        let ends = *byte == separator || matches!(byte, b'"' | b'\r' | b'\n');
        if matches!(place, ReaderState::AfterQuote) && !ends {
            // Spaces between a closing quote and the separator are not text either.
            if *byte == b' ' {
                continue;
            }
            return None;
        }
        place = place.step(*byte, separator).unwrap_or(ReaderState::Start);
        compact.push(*byte);
    }
    (!matches!(place, ReaderState::Quoted)).then_some(compact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_spaces_leaves_quoted_text_alone() {
        let kept =
            |text: &str| without_spaces(text.as_bytes(), 0, b',').map(|b| String::from_utf8(b).unwrap());
        assert_eq!(kept("a, \" b, c\" ,d e\n  f,g").unwrap(), "a,\" b, c\",d e\nf,g");
        assert_eq!(kept("a, \"b\" c\n"), None);
        assert_eq!(kept("a, \"b\n"), None);
    }

    #[test]
    fn has_spaces_before_quotes_looks_outside_quotes_alone() {
        let has = |text: &str| has_spaces_before_quotes(text.as_bytes(), b',');
        assert!(has("a,b\n1, \"x\"\n") && has(" \"a\",b\n"));
        assert!(!has("a,b\n\"1, \"\"x\"\"\",2\n5 \" 6,7\n"));
    }
}

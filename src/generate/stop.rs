//! Stop sequences: a text ends before the first of them. A sequence may consist of text and of special tokens.

use std::borrow::Cow;
use std::ops::Range;

/// Withholds text that may be the beginning of a stop sequence.
///
/// Special tokens are not part of an answer, but a stop sequence may contain them:
///
/// ```text
/// held     Yes.<|im_end|>No
/// hidden       └────────┘
/// visible  Yes.          No
/// ```
///
/// Every sequence is searched for in the visible text. A sequence that contains a special token is also searched for in
/// the held text.
#[derive(Default)]
pub struct StopFilter {
    sequences: Vec<StopSequence>,
    held: String,
    /// Byte ranges of `held` that are special tokens, in ascending order.
    hidden: Vec<Range<usize>>,
}

struct StopSequence {
    text: String,
    /// Whether a special token that it contains has been generated.
    special: bool,
}

/// The result of adding a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub struct FilteredText {
    /// Text that is certainly not part of a stop sequence.
    pub text: String,
    /// The sequence that ended the text.
    pub stop: Option<String>,
}

impl StopFilter {
    /// A filter for these stop sequences.
    pub fn new(sequences: Vec<String>) -> Self {
        let sequences = sequences.into_iter().map(|text| StopSequence { text, special: false }).collect();
        Self { sequences, ..Self::default() }
    }

    /// Whether there are no stop sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Adds a piece of text. The text ends at the first stop sequence that is complete. If several end at the same place,
    /// the longest counts. So the result does not depend on how the text is divided into pieces.
    pub fn push(&mut self, piece: &str) -> FilteredText {
        self.held.push_str(piece);
        self.release()
    }

    /// Adds the text of a special token, which is not part of the answer.
    pub fn push_special(&mut self, token: &str) -> FilteredText {
        let start = self.held.len();
        self.held.push_str(token);
        self.hidden.push(start..self.held.len());
        for sequence in &mut self.sequences {
            sequence.special |= sequence.text.contains(token);
        }
        self.release()
    }

    /// Removes from the held text what can be returned.
    fn release(&mut self) -> FilteredText {
        if let Some((start, stop)) = self.first_complete() {
            let text = self.visible(start).into_owned();
            (self.held, self.hidden) = Default::default();
            return FilteredText { text, stop: Some(stop) };
        }
        let from = self.first_overlap();
        let text = self.visible(from).into_owned();
        self.held.drain(..from);
        let hidden = self.hidden.drain(..).filter(|range| range.end > from);
        self.hidden = hidden.map(|range| range.start.max(from) - from..range.end - from).collect();
        FilteredText { text, stop: None }
    }

    /// The sequence that is complete first, with its start in the held text.
    fn first_complete(&self) -> Option<(usize, String)> {
        let visible = self.visible(self.held.len());
        let in_visible = |text: &str| {
            let start = visible.find(text)?;
            Some((self.in_held(start + text.len() - 1) + 1, self.in_held(start)))
        };
        let in_held = |text: &str| self.held.find(text).map(|start| (start + text.len(), start));
        let ends = self.sequences.iter().flat_map(|StopSequence { text, special }| {
            let special = special.then(|| in_held(text)).flatten();
            in_visible(text).into_iter().chain(special).map(move |(end, start)| (end, start, text))
        });
        let (_, start, text) = ends.min_by_key(|(end, start, _)| (*end, *start))?;
        Some((start, text.clone()))
    }

    /// The first byte of the held text that may belong to a sequence which is not complete yet.
    fn first_overlap(&self) -> usize {
        let visible = self.visible(self.held.len());
        let begins = self.sequences.iter().flat_map(|StopSequence { text, special }| {
            let in_visible = Some(overlap(&visible, text)).filter(|n| *n > 0);
            let in_visible = in_visible.map(|n| self.in_held(visible.len() - n));
            let in_held = special.then(|| self.held.len() - overlap(&self.held, text));
            in_visible.into_iter().chain(in_held)
        });
        begins.min().unwrap_or(self.held.len())
    }

    /// The held text up to `end`, without special tokens.
    fn visible(&self, end: usize) -> Cow<'_, str> {
        if self.hidden.is_empty() {
            return Cow::Borrowed(&self.held[..end]);
        }
        let mut text = String::new();
        let mut from = 0;
        for range in self.hidden.iter().take_while(|range| range.start < end) {
            text.push_str(&self.held[from..range.start]);
            from = range.end;
        }
        text.push_str(self.held.get(from..end).unwrap_or_default());
        Cow::Owned(text)
    }

    /// The position in the held text of a byte of the visible text.
    fn in_held(&self, visible: usize) -> usize {
        let skip = |position: usize, range: &Range<usize>| {
            if range.start <= position { position + range.len() } else { position }
        };
        self.hidden.iter().fold(visible, skip)
    }

    /// Returns the withheld text when the text has ended without a stop sequence.
    pub fn finish(&mut self) -> String {
        let text = self.visible(self.held.len()).into_owned();
        (self.held, self.hidden) = Default::default();
        text
    }
}

/// Number of bytes at the end of `text` that `sequence` begins with.
fn overlap(text: &str, sequence: &str) -> usize {
    let lengths = (1..sequence.len()).rev().filter(|n| sequence.is_char_boundary(*n));
    lengths.into_iter().find(|n| text.ends_with(&sequence[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filtered(sequences: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut filter = StopFilter::new(sequences.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let passed = filter.push(piece);
            text += &passed.text;
            if passed.stop.is_some() {
                return (text, passed.stop);
            }
        }
        (text + &filter.finish(), None)
    }

    #[test]
    fn stop_filter_withholds_the_beginning_of_a_sequence() {
        let mut filter = StopFilter::new(vec!["\n\nQ:".into(), "Q!".into()]);
        let mut push = |piece: &str| filter.push(piece).text;
        assert_eq!(
            [push("a\n"), push("\nb"), push("\n"), push("\nQ"), push("x")],
            ["a", "\n\nb", "", "", "\n\nQx"]
        );
        let same = ("a".to_owned(), Some("bc".to_owned()));
        assert_eq!(filtered(&["bc", "bcd"], &["abcd"]), same, "the first that is complete");
        assert_eq!(filtered(&["bc", "bcd"], &["ab", "cd"]), same);
        assert_eq!(
            filtered(&["abc", "c"], &["xabc"]),
            ("x".to_owned(), Some("abc".to_owned())),
            "of two, the longest"
        );
        assert_eq!(filtered(&["aab"], &["aaa", "b"]), ("a".to_owned(), Some("aab".to_owned())));
        assert_eq!(filtered(&["\u{e9}\u{20ac}"], &["x\u{e9}", "y"]), ("x\u{e9}y".to_owned(), None));
        assert_eq!(filtered(&[], &["x", "y"]), ("xy".to_owned(), None));
    }

    /// As [`filtered`]; a piece that begins with `<` is a special token.
    fn filtered_special(sequences: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut filter = StopFilter::new(sequences.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let passed = if piece.starts_with('<') { filter.push_special(piece) } else { filter.push(piece) };
            text += &passed.text;
            if passed.stop.is_some() {
                return (text, passed.stop);
            }
        }
        (text + &filter.finish(), None)
    }

    #[test]
    fn special_tokens_stop_a_text_that_does_not_show_them() {
        let ended = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
        let open = |text: &str| (text.to_owned(), None);
        assert_eq!(filtered_special(&["<|e|>"], &["yes", "<|e|>", "no"]), ended("yes", "<|e|>"));
        assert_eq!(filtered_special(&["<|e|>"], &["yes", "<|f|>", "no"]), open("yesno"));
        // With text before, after and between.
        assert_eq!(filtered_special(&["s<|e|>\n"], &["yes", "<|e|>", "\n", "no"]), ended("ye", "s<|e|>\n"));
        assert_eq!(filtered_special(&["s<|e|>\n"], &["yes", "<|e|>", " ", "no"]), open("yes no"));
        assert_eq!(filtered_special(&["<|e|><|f|>"], &["a", "<|e|>", "<|f|>"]), ended("a", "<|e|><|f|>"));
        assert_eq!(
            filtered_special(&["<|e|>b<|f|>"], &["a", "<|e|>", "b", "<|e|>", "b", "<|f|>", "c"]),
            ended("ab", "<|e|>b<|f|>")
        );
        // A token in the middle of a sequence of text does not keep the sequence from ending the text.
        assert_eq!(filtered_special(&["end"], &["the e", "<|e|>", "nd", "x"]), ended("the ", "end"));
        // A part of a special token's text is none of the answer's text.
        assert_eq!(filtered_special(&["|>", "|"], &["a", "<|e|>", "b"]), open("ab"));
        // Spelled out by other tokens, it ends the text too.
        assert_eq!(filtered_special(&["<|e|>"], &["yes ", "|", "x"]), open("yes |x"));
        assert_eq!(filtered(&["<|e|>"], &["yes<", "|e", "|>no"]), ended("yes", "<|e|>"));
        // Of two that end together, the longest; of two, the first that is complete.
        assert_eq!(filtered_special(&["<|e|>", "s<|e|>"], &["yes", "<|e|>"]), ended("ye", "s<|e|>"));
        assert_eq!(filtered_special(&["no", "<|e|>"], &["yes", "<|e|>", "no"]), ended("yes", "<|e|>"));
    }

    proptest! {
        /// However a text is cut, the same of it passes, and it is what stands before the first complete sequence.
        #[test]
        fn stop_filter_does_not_depend_on_the_pieces(
            text in "[abc]{0,30}",
            sequences in prop::collection::vec("[abc]{1,4}", 0..4),
            cuts in prop::collection::vec(1usize..5, 30),
        ) {
            let sequences: Vec<&str> = sequences.iter().map(String::as_str).collect();
            let (mut rest, mut pieces) = (text.as_str(), Vec::new());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let letters: Vec<&str> = text.split("").collect();
            let found = filtered(&sequences, &pieces);
            prop_assert_eq!(&found, &filtered(&sequences, &letters));
            let first = (0..=text.len()).find(|end| sequences.iter().any(|s| text[..*end].ends_with(s)));
            let expected = first.map(|end| {
                let longest = sequences.iter().filter(|s| text[..end].ends_with(**s)).max_by_key(|s| s.len()).unwrap();
                (text[..end - longest.len()].to_owned(), Some((*longest).to_owned()))
            });
            prop_assert_eq!(found, expected.unwrap_or((text.clone(), None)));
        }

        /// Special tokens that no sequence holds change nothing.
        #[test]
        fn other_special_tokens_make_no_difference(
            pieces in prop::collection::vec("[abc]{0,3}|<x>", 0..12),
            sequences in prop::collection::vec("[abc]{1,4}", 0..4),
        ) {
            let sequences: Vec<&str> = sequences.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let text: Vec<&str> = pieces.iter().copied().filter(|piece| !piece.starts_with('<')).collect();
            prop_assert_eq!(filtered_special(&sequences, &pieces), filtered(&sequences, &text));
        }
    }
}

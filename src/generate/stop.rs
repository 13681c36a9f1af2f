//! Where a text ends: before the first stop sequence, of text or of special tokens.

use std::borrow::Cow;
use std::ops::Range;

/// Holds text back that may be the beginning of a stop sequence.
///
/// Special tokens are no part of an answer, but a sequence may hold them:
///
/// ```text
/// held     Yes.<|im_end|>No
/// hidden       └────────┘
/// visible  Yes.          No
/// ```
///
/// Every sequence is looked for in the visible text, and one that holds a whole special token in the held text too.
#[derive(Default)]
pub(crate) struct StopFilter {
    sequences: Vec<Sequence>,
    held: String,
    /// Bytes of `held` that are special tokens, in their order.
    hidden: Vec<Range<usize>>,
}

struct Sequence {
    text: String,
    /// Whether a special token came that it holds.
    special: bool,
}

/// What a piece of text came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Text that is no part of a stop sequence, those before the sequence included.
    pub text: String,
    /// The sequence that ended the text.
    pub stop: Option<String>,
}

impl StopFilter {
    pub fn new(sequences: Vec<String>) -> Self {
        let sequences = sequences.into_iter().map(|text| Sequence { text, special: false }).collect();
        Self { sequences, ..Self::default() }
    }

    /// Whether nothing can end the text.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Takes a piece of text. The text ends with the first stop sequence that is complete; of several that end at the
    /// same place the longest counts. So it is the same however the text is cut into pieces.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        self.pass()
    }

    /// Takes the text of a special token, which the answer does not show.
    pub fn push_special(&mut self, token: &str) -> Passed {
        let start = self.held.len();
        self.held.push_str(token);
        self.hidden.push(start..self.held.len());
        for sequence in &mut self.sequences {
            sequence.special |= sequence.text.contains(token);
        }
        self.pass()
    }

    fn pass(&mut self) -> Passed {
        if let Some((start, stop)) = self.first_complete() {
            let text = self.visible(start).into_owned();
            (self.held, self.hidden) = Default::default();
            return Passed { text, stop: Some(stop) };
        }
        let from = self.first_begun();
        let text = self.visible(from).into_owned();
        self.held.drain(..from);
        let hidden = self.hidden.drain(..).filter(|range| range.end > from);
        self.hidden = hidden.map(|range| range.start.max(from) - from..range.end - from).collect();
        Passed { text, stop: None }
    }

    /// The sequence that is complete first, and where it starts in the held text.
    fn first_complete(&self) -> Option<(usize, String)> {
        let visible = self.visible(self.held.len());
        let in_visible = |text: &str| {
            let start = visible.find(text)?;
            Some((self.in_held(start + text.len() - 1) + 1, self.in_held(start)))
        };
        let in_held = |text: &str| self.held.find(text).map(|start| (start + text.len(), start));
        let ends = self.sequences.iter().flat_map(|Sequence { text, special }| {
            let special = special.then(|| in_held(text)).flatten();
            in_visible(text).into_iter().chain(special).map(move |(end, start)| (end, start, text))
        });
        let (_, start, text) = ends.min_by_key(|(end, start, _)| (*end, *start))?;
        Some((start, text.clone()))
    }

    /// Where the held text begins that a sequence may come of.
    fn first_begun(&self) -> usize {
        let visible = self.visible(self.held.len());
        let begins = self.sequences.iter().flat_map(|Sequence { text, special }| {
            let in_visible = Some(begun(&visible, text)).filter(|n| *n > 0);
            let in_visible = in_visible.map(|n| self.in_held(visible.len() - n));
            let in_held = special.then(|| self.held.len() - begun(&self.held, text));
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

    /// The place in the held text of a byte of the visible one.
    fn in_held(&self, visible: usize) -> usize {
        self.hidden.iter().fold(visible, |at, range| if range.start <= at { at + range.len() } else { at })
    }

    /// What is held back, which no stop sequence came of.
    pub fn rest(&mut self) -> String {
        let text = self.visible(self.held.len()).into_owned();
        (self.held, self.hidden) = Default::default();
        text
    }
}

/// Bytes at the end of `text` that begin `sequence`.
fn begun(text: &str, sequence: &str) -> usize {
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
        (text + &filter.rest(), None)
    }

    #[test]
    fn what_may_begin_a_stop_sequence_is_held_back() {
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
        (text + &filter.rest(), None)
    }

    #[test]
    fn special_tokens_stop_a_text_that_does_not_show_them() {
        let ended = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
        let open = |text: &str| (text.to_owned(), None);
        assert_eq!(filtered_special(&["<|e|>"], &["yes", "<|e|>", "no"]), ended("yes", "<|e|>"));
        assert_eq!(filtered_special(&["<|e|>"], &["yes", "<|f|>", "no"]), open("yesno"));
        // With text before, behind and between.
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
        fn the_cut_makes_no_difference(
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

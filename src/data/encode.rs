//! From records to token ids: template, tokenizer, length limits.

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;
use tokenizers::{Encoding, Tokenizer};

use super::dataset::{Dataset, Problems, Record};
use super::template::Template;
use crate::batch::Example;
use crate::checkpoint::{TokenWithoutRow, first_without_row};
use crate::{Error, Result};

/// Turns records into token ids.
///
/// ```text
///  BOS  instruction ␣  head   input   tail │ output  eos
///       └ not counted ┘└─ max_input_tokens ─┘└ max_output_tokens ┘
///                             ╳╳╳ cut from the left of the input's own text
/// ```
///
/// Everything before the bar is tokenized in one go, as transformers does with the same text. BOS is there if the
/// tokenizer adds one.
#[derive(Debug, Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer, with truncation and padding off (see [`without_limits`]).
    pub tokenizer: &'a Tokenizer,
    /// The template around the input.
    pub template: &'a Template,
    /// Rows of the model's embedding: a text with a token that has no row is refused.
    pub vocab_size: usize,
    /// End-of-text token, the last token of every target.
    pub eos_token_id: u32,
    /// Most tokens of head, input and tail; BOS and the instruction don't count.
    pub max_input_tokens: usize,
    /// Most tokens of the target, eos counted; at least 1.
    pub max_output_tokens: usize,
    /// Plain text before the template, separated by one space (the hard prompt of the base model).
    pub instruction: Option<&'a str>,
}

/// Examples in the order of their records, and how many were too long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// One for each record.
    pub examples: Vec<Example>,
    /// Inputs that lost tokens.
    pub inputs_cut: usize,
    /// Targets that lost tokens (eos is one).
    pub targets_cut: usize,
}

/// Turns off the truncation and padding that a `tokenizer.json` may set, as transformers does by default.
///
/// # Errors
/// Returns [`Error::Tokenizer`] if the tokenizer refuses.
pub fn without_limits(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    tokenizer.with_truncation(None).map_err(tokenizer_error)?.with_padding(None);
    Ok(tokenizer)
}

impl Encoder<'_> {
    /// Encodes records, in parallel; the order is kept.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] with the lines of records that give no token or a token without an embedding row, and
    /// for a template that has such a token or leaves no room for the input, or a `max_output_tokens` of 0. Returns
    /// [`Error::Tokenizer`] if the tokenizer fails.
    pub fn encode(&self, records: &[Record]) -> Result<Encoded> {
        let (encoded, problems) = self.encode_all(records)?;
        problems.into_invalid()?;
        Ok(encoded)
    }

    /// Encodes a dataset's records, as [`encode`](Self::encode) does; errors name its file.
    ///
    /// # Errors
    /// Returns [`Error::Data`] if records can't be encoded, otherwise the errors of [`encode`](Self::encode).
    pub fn encode_dataset(&self, dataset: &Dataset) -> Result<Encoded> {
        let (encoded, problems) = self.encode_all(&dataset.records)?;
        problems.into_data_error(&dataset.path)?;
        Ok(encoded)
    }

    /// Encodes one input: its ids, and whether it was cut.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if the input gives no token or a token without an embedding row, or if the template
    /// has such a token or leaves no room for the input; [`Error::Tokenizer`] if the tokenizer fails.
    pub fn encode_input(&self, input: &str) -> Result<(Vec<u32>, bool)> {
        self.check()?;
        self.input_ids(input)?.map_err(Error::Invalid)
    }

    fn encode_all(&self, records: &[Record]) -> Result<(Encoded, Problems)> {
        self.check()?;
        // Collected before the errors are looked at, so that the first error in the file's order is returned.
        let rows: Vec<_> = records.par_iter().map(|record| self.row(record)).collect();
        let mut encoded = Encoded { examples: Vec::with_capacity(rows.len()), ..Encoded::default() };
        let mut problems = Problems::default();
        for row in rows {
            match row? {
                Ok(EncodedRow { example, input_cut, target_cut }) => {
                    encoded.examples.push(example);
                    encoded.inputs_cut += usize::from(input_cut);
                    encoded.targets_cut += usize::from(target_cut);
                }
                Err(problem) => problems.push(problem),
            }
        }
        Ok((encoded, problems))
    }

    /// The outer error is a fault of the settings, the inner one a fault of the record.
    fn row(&self, record: &Record) -> Result<std::result::Result<EncodedRow, String>> {
        let Record { input, output, line } = record;
        let line = *line;
        let place = |e| match e {
            Error::Tokenizer(message) => Error::Tokenizer(format!("line {line}: {message}")),
            other => other,
        };
        Ok(match (self.input_ids(input).map_err(place)?, self.target_ids(output).map_err(place)?) {
            (Ok((input, input_cut)), Ok((target, target_cut))) => {
                Ok(EncodedRow { example: Example { input, target, line }, input_cut, target_cut })
            }
            (Err(problem), Ok(_)) | (Ok(_), Err(problem)) => Err(format!("line {line}: {problem}")),
            (Err(input), Err(output)) => Err(format!("line {line}: {input}; {output}")),
        })
    }

    fn check(&self) -> Result<()> {
        if self.tokenizer.get_truncation().is_some() || self.tokenizer.get_padding().is_some() {
            return Err(Error::Tokenizer(
                "expected truncation and padding to be off, found one of them on; hint: load the tokenizer \
                 through `without_limits`"
                    .into(),
            ));
        }
        if self.max_output_tokens == 0 {
            return Err(Error::Invalid("data.max_output_tokens: expected at least 1, found 0".into()));
        }
        Ok(())
    }

    /// The input's ids and whether it was cut, or the fault of the input.
    fn input_ids(&self, input: &str) -> Result<std::result::Result<(Vec<u32>, bool), String>> {
        let text = TemplateText::new(self.instruction, self.template, input);
        let encoding = self.tokenizer.encode(text.text.as_str(), true).map_err(tokenizer_error)?;
        let parts = TokenParts::find(&encoding, &text);
        if !parts.has_input || input.trim().is_empty() {
            return Ok(Err(NO_INPUT.into()));
        }
        if let Some(TokenWithoutRow { index, problem }) =
            first_without_row(self.tokenizer, &encoding, self.vocab_size)
        {
            return match text.origin(&encoding, index) {
                Origin::Input => Ok(Err(format!("input: {problem}"))),
                Origin::Other(name) => Err(Error::Invalid(format!("{name}: {problem}"))),
            };
        }
        let excess = parts.counted.saturating_sub(self.max_input_tokens);
        if excess > parts.droppable() {
            return Err(Error::Invalid(format!(
                "the template's head and tail alone take {} tokens and data.max_input_tokens is {}, which \
                 leaves none for the input; hint: raise data.max_input_tokens or shorten the verbalizer",
                parts.fixed(),
                self.max_input_tokens
            )));
        }
        let dropped = &parts.own[..excess];
        let ids = encoding.get_ids()[..self.without_added_eos(&encoding)].iter().enumerate();
        let ids = ids.filter(|(i, _)| dropped.binary_search(i).is_err()).map(|(_, id)| *id);
        Ok(Ok((ids.collect(), excess > 0)))
    }

    /// The text before the input, and its tokens as [`Encoder::encode_alone`] gives them.
    pub(super) fn encode_head(&self) -> Result<(String, Vec<(u32, usize)>)> {
        let TemplateText { mut text, own, .. } = TemplateText::new(self.instruction, self.template, "");
        text.truncate(own.start);
        let tokens = self.encode_alone(&text)?;
        Ok((text, tokens))
    }

    /// The tokens of a text with which an input begins, each with its end in the text, in bytes.
    pub(super) fn encode_alone(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self.tokenizer.encode(text, true).map_err(tokenizer_error)?;
        let tokens =
            encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().map(|(_, end)| *end));
        Ok(tokens.take(self.without_added_eos(&encoding)).collect())
    }

    /// Length without an end-of-text token that a post-processor appends; one that the text itself contains stays.
    fn without_added_eos(&self, encoding: &Encoding) -> usize {
        let added = encoding.get_ids().iter().zip(encoding.get_special_tokens_mask()).rev();
        encoding.len() - added.take_while(|(id, special)| **id == self.eos_token_id && **special == 1).count()
    }

    /// The target's ids and whether it was cut, or the fault of the output.
    fn target_ids(&self, output: &str) -> Result<std::result::Result<(Vec<u32>, bool), String>> {
        let encoding = self.tokenizer.encode_fast(output, false).map_err(tokenizer_error)?;
        if encoding.is_empty() || output.trim().is_empty() {
            return Ok(Err(NO_TARGET.into()));
        }
        if let Some(rowless) = first_without_row(self.tokenizer, &encoding, self.vocab_size) {
            return Ok(Err(format!("output: {}", rowless.problem)));
        }
        let mut ids = encoding.get_ids().to_vec();
        ids.push(self.eos_token_id);
        let cut = ids.len() > self.max_output_tokens;
        ids.truncate(self.max_output_tokens);
        Ok(Ok((ids, cut)))
    }
}

const NO_INPUT: &str = "the input gives no token: it is blank, or the tokenizer knows none of it";
const NO_TARGET: &str = "the output gives no token: it is blank, or the tokenizer knows none of it";

struct EncodedRow {
    example: Example,
    input_cut: bool,
    target_cut: bool,
}

fn tokenizer_error(e: tokenizers::Error) -> Error {
    Error::Tokenizer(e.to_string())
}

/// The text to tokenize, and the places of its parts, in bytes.
struct TemplateText {
    text: String,
    /// Start of the template; 0 without an instruction.
    template: usize,
    /// Place of the input's own text.
    own: Range<usize>,
}

impl TemplateText {
    fn new(instruction: Option<&str>, template: &Template, input: &str) -> Self {
        let mut text = instruction.unwrap_or_default().to_string();
        if !text.is_empty() {
            text.push(' ');
        }
        let start = text.len();
        text.push_str(template.head());
        let own = text.len()..text.len() + input.len();
        text.push_str(input);
        text.push_str(template.tail());
        Self { text, template: start, own }
    }

    /// The part of the text to which a token belongs.
    fn origin(&self, encoding: &Encoding, index: usize) -> Origin {
        let (start, end) = encoding.get_offsets()[index];
        if start < self.own.end && end > self.own.start {
            Origin::Input
        } else if start == end {
            Origin::Other("what the tokenizer adds to every text")
        } else if start < self.template {
            Origin::Other("prompt.init_text")
        } else {
            Origin::Other("verbalizer")
        }
    }

    /// Whether a token that has some of the input's text and some of the template's text belongs to the input.
    ///
    /// A word's token often begins with the space before it. The space belongs to the word: after a cut, the next word
    /// brings its own space. So a token with spaces from the end of the head belongs to the input, and a token with the
    /// input's last spaces and the tail's first word belongs to the tail.
    fn is_own(&self, token: Range<usize>) -> bool {
        let spaces = |range: Range<usize>| self.text.as_bytes()[range].iter().all(|b| *b == b' ');
        let Range { start, end } = self.own;
        let of_head = token.start.min(start)..start;
        let of_input = token.start.max(start)..end;
        spaces(of_head) && (token.end <= end || !spaces(of_input))
    }
}

/// The part of the text that a token comes from.
enum Origin {
    Input,
    /// Another part, by its name in messages.
    Other(&'static str),
}

/// Which tokens belong to which part of the text.
struct TokenParts {
    /// Tokens of head, input and tail.
    counted: usize,
    /// Indices of the input's own tokens, ascending.
    own: Vec<usize>,
    /// Whether any token holds some of the input's own text.
    has_input: bool,
}

impl TokenParts {
    fn find(encoding: &Encoding, text: &TemplateText) -> Self {
        let mut parts = Self { counted: 0, own: Vec::new(), has_input: false };
        let mut covered = 0;
        let tokens = encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask());
        for (i, (&(start, end), special)) in tokens.enumerate() {
            if *special == 1 {
                continue;
            }
            // Byte-level post-processors may trim spaces from offsets. A token of spaces then has no bytes left; it
            // gets the bytes since the token before.
            let start = if start == end { covered.min(start) } else { start };
            covered = covered.max(end);
            parts.counted += usize::from(text.template == 0 || end > text.template);
            if start < text.own.end && end > text.own.start {
                parts.has_input = true;
                if text.is_own(start..end) {
                    parts.own.push(i);
                }
            }
        }
        parts
    }

    /// Number of own tokens that can be removed; one must stay.
    fn droppable(&self) -> usize {
        self.own.len().saturating_sub(1)
    }

    /// Tokens that stay in addition to the one own token.
    fn fixed(&self) -> usize {
        self.counted - self.droppable() - usize::from(!self.own.is_empty())
    }
}

/// Statistics of sequence lengths, in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct LengthStats {
    /// Number of sequences; if it is 0, all other numbers are 0.
    pub count: usize,
    /// Shortest.
    pub min: usize,
    /// Median; the mean of the middle two if their number is even.
    pub median: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// 95th percentile: the smallest length that at least 95 % of the sequences don't exceed.
    pub p95: usize,
    /// Longest.
    pub max: usize,
    /// The histogram's bins, shortest lengths first: first length, last length, number of sequences.
    pub bins: Vec<(usize, usize, usize)>,
}

/// Most bins of a histogram.
const BINS: usize = 8;
/// Characters of its longest bar.
const BAR: usize = 40;

impl LengthStats {
    /// The statistics of `lengths` (tokens), in any order.
    pub fn from_lengths(lengths: impl Iterator<Item = usize>) -> Self {
        let mut sorted: Vec<usize> = lengths.collect();
        sorted.sort_unstable();
        let count = sorted.len();
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return Self { count, min: 0, median: 0.0, mean: 0.0, p95: 0, max: 0, bins: Vec::new() };
        };
        let median = (sorted[(count - 1) / 2] as f64 + sorted[count / 2] as f64) / 2.0;
        let mean = sorted.iter().map(|length| *length as f64).sum::<f64>() / count as f64;
        let p95 = sorted[(count * 95).div_ceil(100) - 1];
        let width = (max - min) / BINS + 1;
        let mut bins: Vec<_> =
            (min..=max).step_by(width).map(|first| (first, max.min(first + width - 1), 0)).collect();
        for length in sorted {
            bins[(length - min) / width].2 += 1;
        }
        Self { count, min, median, mean, p95, max, bins }
    }
}

impl fmt::Display for LengthStats {
    /// One line of numbers, then one line for each bin.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, min, median, mean, p95, max, bins } = self;
        write!(f, "{count} sequences: min {min}, median {median}, mean {mean:.1}, p95 {p95}, max {max}")?;
        let most = bins.iter().map(|bin| bin.2).max().unwrap_or(0);
        let (wide, many) = (max.to_string().len(), most.to_string().len());
        for (first, last, n) in bins {
            // Rounded up, so that every bin with a sequence shows.
            let bar = "#".repeat((n * BAR).div_ceil(most));
            write!(f, "\n{first:>wide$}-{last:>wide$} {bar:<BAR$} {n:>many$}")?;
        }
        Ok(())
    }
}

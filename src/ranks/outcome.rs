//! What a rank sends to rank 0, and what rank 0 answers: a result, or what kind of failure it is.

use crate::{Error, Result};

const DONE: u8 = 0;
const OUT_OF_MEMORY: u8 = 1;
const FAILED: u8 = 2;
const BAD_INPUT: u8 = 3;

/// The outcome of one rank.
#[derive(Debug)]
pub(super) enum Outcome {
    Done(Vec<u8>),
    OutOfMemory(String),
    Failed { problem: String, is_bad_input: bool },
}

/// What rank 0 sends to all.
pub(super) struct Reply;

impl Outcome {
    pub(super) fn new(result: Result<Vec<u8>>) -> Self {
        match result {
            Ok(bytes) => Self::Done(bytes),
            Err(Error::OutOfMemory { problem }) => Self::OutOfMemory(problem),
            Err(error) => Self::Failed { problem: error.to_string(), is_bad_input: error.is_bad_input() },
        }
    }

    /// One byte for the kind, then the result or the message.
    pub(super) fn encode(self) -> Vec<u8> {
        let (kind, mut bytes) = match self {
            Self::Done(bytes) => (DONE, bytes),
            Self::OutOfMemory(problem) => (OUT_OF_MEMORY, problem.into_bytes()),
            Self::Failed { problem, is_bad_input } => {
                (if is_bad_input { BAD_INPUT } else { FAILED }, problem.into_bytes())
            }
        };
        bytes.push(kind);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes.split_last() {
            Some((&DONE, bytes)) => Self::Done(bytes.to_vec()),
            Some((&OUT_OF_MEMORY, bytes)) => Self::OutOfMemory(text(bytes)),
            Some((kind, bytes)) => Self::Failed { problem: text(bytes), is_bad_input: *kind == BAD_INPUT },
            None => Self::Failed { problem: "it sent an empty message".into(), is_bad_input: false },
        }
    }
}

impl Reply {
    /// The answer to the outcomes of all ranks, in rank order, as bytes.
    pub(super) fn new(
        outcomes: Vec<Outcome>,
        combine: impl FnOnce(Vec<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Vec<u8> {
        let (mut done, mut short, mut failed) = (Vec::new(), Vec::new(), Vec::new());
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Outcome::Done(bytes) => done.push(bytes),
                Outcome::OutOfMemory(problem) => short.push((rank, problem)),
                Outcome::Failed { problem, is_bad_input } => failed.push((rank, problem, is_bad_input)),
            }
        }
        if !failed.is_empty() {
            let is_bad_input = failed.iter().all(|(_, _, is_bad_input)| *is_bad_input);
            let problem = listed(
                failed.into_iter().map(|(rank, problem, _)| (rank, problem)),
                done.len() + short.len(),
            );
            return Outcome::Failed { problem, is_bad_input }.encode();
        }
        if !short.is_empty() {
            return Outcome::OutOfMemory(listed(short.into_iter(), done.len())).encode();
        }
        match combine(done) {
            Ok(bytes) => Outcome::Done(bytes).encode(),
            Err(error) => Outcome::new(Err(error)).encode(),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Vec<u8>> {
        match Outcome::decode(bytes) {
            Outcome::Done(bytes) => Ok(bytes),
            Outcome::OutOfMemory(problem) => Err(Error::OutOfMemory { problem }),
            Outcome::Failed { problem, is_bad_input } => Err(Error::Ranks { problem, is_bad_input }),
        }
    }
}

/// The problems with the ranks that have them; one without ranks if all have the same. `others` ranks have none.
fn listed(problems: impl Iterator<Item = (usize, String)>, others: usize) -> String {
    let mut by_text: Vec<(String, Vec<usize>)> = Vec::new();
    for (rank, problem) in problems {
        match by_text.iter_mut().find(|(text, _)| *text == problem) {
            Some((_, ranks)) => ranks.push(rank),
            None => by_text.push((problem, vec![rank])),
        }
    }
    match &by_text[..] {
        [(only, _)] if others == 0 => only.clone(),
        all => {
            all.iter().map(|(text, ranks)| format!("{}: {text}", names(ranks))).collect::<Vec<_>>().join("\n")
        }
    }
}

/// `rank 3`, or `ranks 1, 2, 5`; of many the first ones.
pub(super) fn names(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let numbers: Vec<String> = ranks.iter().take(SHOWN).map(usize::to_string).collect();
    let more = match ranks.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{} {}{more}", if ranks.len() == 1 { "rank" } else { "ranks" }, numbers.join(", "))
}

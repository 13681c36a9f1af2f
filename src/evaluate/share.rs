//! The rows of an evaluation, shared among ranks: each answers some of them, and all get all answers.

use super::exam::Answered;
use crate::ranks::Ranks;
use crate::ranks::agree::{decode, encode};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// One row's answer after one prompt, as ranks send it.
#[derive(Serialize, Deserialize)]
struct RowMessage {
    tokens: Vec<u32>,
    /// Bits of f64: JSON has no infinite numbers.
    scores: Vec<u64>,
    nll: Vec<u64>,
}

/// What a rank sends: the seconds that its rows took, and for each prompt the answer of each of its rows.
#[derive(Serialize, Deserialize)]
struct ShareMessage {
    seconds: f64,
    prompts: Vec<Vec<RowMessage>>,
}

/// The answers of all ranks in the order of the rows, for each of `prompts` prompts, and the longest time. `shares` are the rows of
/// each rank, and `own` the answers of this one's for each prompt.
///
/// # Errors
/// Every rank returns an error if one of them has one.
pub(super) fn join(
    ranks: &dyn Ranks,
    shares: &[Vec<usize>],
    own: Result<(Vec<Vec<Answered>>, f64)>,
) -> Result<(Vec<Vec<Answered>>, f64)> {
    if ranks.size() == 1 {
        return own;
    }
    let own = own.and_then(|(prompts, seconds)| {
        encode(&ShareMessage {
            seconds,
            prompts: prompts.into_iter().map(|rows| rows.iter().map(message).collect()).collect(),
        })
    });
    let all = ranks.combine(own, |all| {
        encode(&all.iter().map(|bytes| decode(bytes)).collect::<Result<Vec<ShareMessage>>>()?)
    })?;
    in_order(shares, decode(&all)?)
}

fn message(Answered { tokens, scores, nll }: &Answered) -> RowMessage {
    let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect();
    RowMessage { tokens: tokens.clone(), scores: bits(scores), nll: bits(nll) }
}

/// The rows of all ranks in their order, and the longest time.
fn in_order(shares: &[Vec<usize>], all: Vec<ShareMessage>) -> Result<(Vec<Vec<Answered>>, f64)> {
    let rows: usize = shares.iter().map(Vec::len).sum();
    let prompts = all.iter().map(|share| share.prompts.len()).max().unwrap_or(0);
    let mut placed: Vec<Vec<Option<Answered>>> =
        (0..prompts).map(|_| (0..rows).map(|_| None).collect()).collect();
    let mut seconds: f64 = 0.0;
    for (share, indices) in all.into_iter().zip(shares) {
        seconds = seconds.max(share.seconds);
        for (prompt, answers) in share.prompts.into_iter().enumerate() {
            for (index, RowMessage { tokens, scores, nll }) in indices.iter().zip(answers) {
                let values = |bits: Vec<u64>| bits.into_iter().map(f64::from_bits).collect();
                placed[prompt][*index] = Some(Answered { tokens, scores: values(scores), nll: values(nll) });
            }
        }
    }
    let complete = |rows: Vec<Option<Answered>>| rows.into_iter().collect::<Option<Vec<_>>>();
    let prompts = placed.into_iter().map(complete).collect::<Option<Vec<_>>>();
    let missing = || Error::Invalid("ranks: expected an answer for each row, found fewer".into());
    Ok((prompts.ok_or_else(missing)?, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::{Threads, deal};

    fn answered(prompt: usize, row: usize) -> Answered {
        let number = (10 * prompt + row) as f64;
        Answered {
            tokens: vec![row as u32],
            scores: vec![-number, f64::NEG_INFINITY],
            nll: vec![number; row % 3],
        }
    }

    /// Two prompts on more ranks than rows, too.
    #[test]
    fn join_puts_rows_into_their_order() {
        for (size, lengths) in [(1, vec![3, 1, 2]), (2, vec![5, 1, 4, 4, 2]), (4, vec![7, 7])] {
            let all = Threads::run(size, |ranks| {
                let shares = deal(&lengths, ranks.size());
                let own = &shares[ranks.rank()];
                let rows = |prompt| own.iter().map(|row| answered(prompt, *row)).collect();
                join(ranks, &shares, Ok(((0..2).map(rows).collect(), ranks.rank() as f64))).unwrap()
            });
            for (prompts, seconds) in all {
                assert_eq!(seconds, (size - 1) as f64);
                let expected =
                    |prompt| (0..lengths.len()).map(|row| answered(prompt, row)).collect::<Vec<_>>();
                assert_eq!(prompts, [expected(0), expected(1)]);
            }
        }
    }

    #[test]
    fn join_is_an_error_on_all_ranks_if_one_fails() {
        let all = Threads::run(3, |ranks| {
            let shares = deal(&[1, 1, 1], ranks.size());
            let own = match ranks.rank() {
                1 => Err(Error::Invalid("row 2: too long".into())),
                rank => Ok((vec![vec![answered(0, rank)]], 0.0)),
            };
            join(ranks, &shares, own).unwrap_err().to_string()
        });
        assert!(all.iter().all(|text| text == "rank 1: row 2: too long"), "{all:?}");
    }
}

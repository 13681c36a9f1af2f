//! Several processes or threads that tune one prompt, as ranks of MPI: rank 0 of `size` collects, decides and sends out.
//!
//! ```text
//! rank 0   its examples ─ gradient ┐                                 ┌ new prompt
//! rank 1   its examples ─ gradient ┼─ rank 0: sum in rank order, ────┼ new prompt
//! rank 2   its examples ─ gradient ┘          clip, AdamW            └ new prompt
//! ```
//!
//! Messages are bytes, and rank 0 alone computes with them. So the result depends neither on the order in which messages
//! arrive nor on the algorithm of a library's reduction, and all ranks go on with the same numbers.

pub mod agree;
mod alone;
mod deal;
pub mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod outcome;
mod threads;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use alone::Alone;
pub use deal::deal;
pub use threads::Threads;

use crate::{Error, Result};
use outcome::{RankOutcome, read_reply, reply};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One of several ranks. Every rank calls the same methods in the same order, from one thread.
pub trait Ranks {
    /// Its number, from 0.
    fn rank(&self) -> usize;
    /// How many there are.
    fn size(&self) -> usize;
    /// The messages of all ranks in rank order, on rank 0; nothing on the others.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] if another rank has ended.
    fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>>;
    /// The message of rank 0 on all ranks; those of the others are not read.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] if another rank has ended.
    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>>;
    /// Ends all ranks at once, with this exit code if there are several processes.
    fn abort(&self, code: i32);
}

impl dyn Ranks + '_ {
    /// What rank 0 makes of the results of all ranks in rank order; every rank gets it.
    ///
    /// # Errors
    /// Every rank returns the same kind of error: [`Error::OutOfMemory`] if a rank ran out of memory and no rank failed in
    /// another way, otherwise [`Error::Ranks`] if a rank or `combine` failed.
    pub fn combine(
        &self,
        own: Result<Vec<u8>>,
        combine: impl FnOnce(Vec<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let outcomes = self.gather(RankOutcome::new(own).encode())?;
        let answer = match self.rank() {
            0 => reply(outcomes.iter().map(|bytes| RankOutcome::decode(bytes)).collect(), combine),
            _ => Vec::new(),
        };
        read_reply(&self.broadcast(answer)?)
    }

    /// The own value of each rank, if all have one.
    ///
    /// # Errors
    /// If one rank has an error, all ranks return one, as [`combine`](#method.combine) says.
    pub fn all<T>(&self, own: Result<T>) -> Result<T> {
        if self.size() == 1 {
            return own;
        }
        let (value, outcome) = match own {
            Ok(value) => (Some(value), Ok(Vec::new())),
            Err(error) => (None, Err(error)),
        };
        self.combine(outcome, |_| Ok(Vec::new()))?;
        value.ok_or_else(|| Error::Invalid("expected a value of this rank, found none".into()))
    }

    /// What `work` returns on rank 0, where alone it is called; every rank gets it.
    ///
    /// # Errors
    /// If rank 0 has an error, all ranks return one, as [`combine`](#method.combine) says.
    pub fn from_first<T: Serialize + DeserializeOwned>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.size() == 1 {
            return work();
        }
        let own =
            if self.rank() == 0 { work().and_then(|value| agree::encode(&value)) } else { Ok(Vec::new()) };
        agree::decode(&self.combine(own, |mut all| Ok(all.swap_remove(0)))?)
    }

    /// Whether `flag` is set on any rank.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] if another rank has ended.
    pub fn any(&self, flag: bool) -> Result<bool> {
        if self.size() == 1 {
            return Ok(flag);
        }
        let flags = self.combine(Ok(vec![flag.into()]), |flags| {
            Ok(vec![flags.iter().any(|flag| flag.contains(&1)).into()])
        })?;
        Ok(flags.contains(&1))
    }

    /// The smallest of the ranks' numbers.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] if another rank has ended.
    pub fn min(&self, number: usize) -> Result<usize> {
        if self.size() == 1 {
            return Ok(number);
        }
        let least = self.combine(Ok(number.to_le_bytes().to_vec()), |numbers| {
            let numbers = numbers.iter().map(|bytes| usize_from(bytes)).collect::<Result<Vec<_>>>()?;
            Ok(numbers.into_iter().min().unwrap_or(0).to_le_bytes().to_vec())
        })?;
        usize_from(&least)
    }
}

fn usize_from(bytes: &[u8]) -> Result<usize> {
    let bytes = bytes.try_into();
    bytes
        .map(usize::from_le_bytes)
        .map_err(|_| Error::Invalid("ranks: expected a number, found other bytes".into()))
}

#[cfg(test)]
mod tests;

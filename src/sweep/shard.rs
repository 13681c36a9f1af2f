//! A part of a sweep that one of several processes tunes, such as a task of an array of Slurm's.

use super::{Sweep, SweepFolder, SweepObserver, Trial};
use crate::tune::Ended;
use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// The trials of which the number from 0 on, divided by `shards`, leaves `index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    shards: usize,
}

impl Shard {
    /// Whether a trial is in it; trials are counted from 1.
    pub fn has(&self, trial: &Trial) -> bool {
        (trial.number - 1) % self.shards == self.index
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.shards)
    }
}

impl FromStr for Shard {
    type Err = Error;

    /// Reads `I/N`, with I from 0 to N - 1.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, shards)) if index < shards => Ok(Self { index, shards }),
            _ => Err(Error::Invalid(format!(
                "expected I/N with I from 0 to N - 1, such as 0/4, found {text:?}; hint: in an array of Slurm's \
                 $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, with --array=0-3 for N = 4"
            ))),
        }
    }
}

impl Sweep<'_> {
    /// Restricts the sweep to the trials of `shard`. The other shards are tuned by other processes, and nothing is decided before
    /// all have ended.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if the sweep prunes, for which it compares all trials.
    pub fn take_shard(&mut self, shard: Shard) -> Result<()> {
        let factor = self.config.sweep.reduction_factor;
        if factor > 1 {
            return Err(Error::Invalid(format!(
                "sweep.reduction_factor: expected 1 with --shard, found {factor}: a process does not see the trials of the others, with \
                 which it would have to compare its own; hint: --set sweep.reduction_factor=1"
            )));
        }
        let own = self.trials.iter().enumerate().filter(|(_, trial)| shard.has(trial));
        self.own = Some(own.map(|(i, _)| i).collect());
        Ok(())
    }

    /// Runs the trials of the shard to their ends, or until the observer interrupts them.
    ///
    /// # Errors
    /// Returns an error if a file of the sweep can't be written.
    pub fn run_shard(&mut self, watch: &dyn SweepObserver) -> Result<Ended> {
        self.load(watch)?;
        self.advance_to(None, watch)
    }

    /// Chooses the best trial of a sweep whose shards have all ended.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if a trial has not ended, and the errors of [`Sweep::run`].
    pub fn collect(&mut self, folder: &mut SweepFolder, watch: &dyn SweepObserver) -> Result<Ended> {
        self.load(watch)?;
        let unfinished: Vec<usize> = self.live().map(|(_, trial)| trial.number).collect();
        if !unfinished.is_empty() {
            let (number, all) = (unfinished.len(), self.trials.len());
            let names: Vec<String> = unfinished.iter().take(8).map(|number| format!("{number:03}")).collect();
            return Err(Error::Invalid(format!(
                "{}: expected {all} trials that have ended, found {number} that have not, such as {}; hint: start their shards \
                 again, which continues them",
                folder.path.display(),
                names.join(", ")
            )));
        }
        self.replay(folder, watch)?;
        self.choose(folder, watch)?;
        Ok(Ended::Completed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_is_read_from_its_number_and_how_many_there_are() {
        let shard: Shard = "2/3".parse().unwrap();
        assert_eq!(shard.to_string(), "2/3");
        for bad in ["3/3", "0/0", "1", "-1/2", "a/b", "1/2/3", ""] {
            let text = bad.parse::<Shard>().unwrap_err().to_string();
            assert!(text.contains("I/N") && text.contains("SLURM_ARRAY_TASK_ID"), "{text}");
        }
    }
}

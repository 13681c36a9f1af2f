//! Synchronous successive halving (Jamieson and Talwalkar, 2016): at some epochs, the rungs, only the best trials stay.
//!
//! ```text
//! 16 trials, 12 epochs, reduction_factor 3, grace_period 2:
//! epochs   1 2 | 3 4 5 6 | 7 ... 12
//! trials    16 |    5    |    2           64 epochs of training instead of 192
//! ```

use crate::config::SweepOptions;
use std::cmp::Ordering;

/// The rungs of a sweep, and how many trials stay at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Halving {
    reduction_factor: usize,
    grace_period: usize,
    keep: usize,
    /// Epochs of the longest trial.
    epochs: usize,
}

/// A trial at a rung or at the end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// Number of the trial.
    pub trial: usize,
    /// What the trials are compared by; lower is better. A value that is not finite is the worst.
    pub value: f64,
    /// Its virtual tokens: of two equal trials the one with fewer is better.
    pub virtual_tokens: usize,
}

impl Halving {
    /// Of a sweep whose longest trial has `epochs` epochs.
    pub fn new(options: &SweepOptions, epochs: usize) -> Self {
        let SweepOptions { reduction_factor, grace_period, keep, .. } = *options;
        Self { reduction_factor, grace_period, keep, epochs }
    }

    /// Epochs of the longest trial.
    pub fn epochs(&self) -> usize {
        self.epochs
    }

    /// The epoch of the first rung after `epoch`, if there is one before the last epoch.
    pub fn rung_after(&self, epoch: usize) -> Option<usize> {
        if self.reduction_factor < 2 {
            return None;
        }
        let mut rung = self.grace_period;
        while rung <= epoch && rung < self.epochs {
            rung = rung.saturating_mul(self.reduction_factor);
        }
        Some(rung).filter(|rung| *rung < self.epochs)
    }

    /// How many of `trials` stay at a rung.
    pub fn stay(&self, trials: usize) -> usize {
        let share = (2 * trials + self.reduction_factor) / (2 * self.reduction_factor);
        share.max(self.keep).min(trials)
    }

    /// Whether a rung at `epoch` may be put off by an epoch if no trial has learned anything yet: up to half of the epochs.
    pub fn can_postpone(&self, epoch: usize) -> bool {
        2 * epoch < self.epochs
    }
}

impl Standing {
    /// The better one is less: by value, then by virtual tokens, then by number.
    pub fn compare(&self, other: &Self) -> Ordering {
        let value = |standing: &Self| if standing.value.is_finite() { standing.value } else { f64::INFINITY };
        value(self)
            .total_cmp(&value(other))
            .then(self.virtual_tokens.cmp(&other.virtual_tokens))
            .then(self.trial.cmp(&other.trial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halving(reduction_factor: usize, grace_period: usize, keep: usize, epochs: usize) -> Halving {
        Halving { reduction_factor, grace_period, keep, epochs }
    }

    /// Rungs with the trials that stay there, and the epochs of training of all trials.
    fn course(halving: Halving, mut trials: usize) -> (Vec<(usize, usize)>, usize) {
        let (mut rungs, mut epoch, mut work) = (Vec::new(), 0, 0);
        while let Some(rung) = halving.rung_after(epoch) {
            work += trials * (rung - epoch);
            trials = halving.stay(trials);
            rungs.push((rung, trials));
            epoch = rung;
        }
        (rungs, work + trials * (halving.epochs - epoch))
    }

    #[test]
    fn rungs_follow_each_other_by_the_factor() {
        assert_eq!(course(halving(3, 2, 1, 5), 16), (vec![(2, 5)], 47));
        assert_eq!(course(halving(3, 2, 1, 12), 16), (vec![(2, 5), (6, 2)], 64));
        assert_eq!(
            course(halving(2, 1, 3, 9), 16),
            (vec![(1, 8), (2, 4), (4, 3), (8, 3)], 16 + 8 + 2 * 4 + 4 * 3 + 3)
        );
        assert_eq!(course(halving(1, 2, 1, 5), 4), (vec![], 20));
        assert_eq!(course(halving(3, 5, 1, 5), 4), (vec![], 20), "no rung at the last epoch");
        assert_eq!(halving(3, 2, 4, 9).stay(2), 2);
    }

    #[test]
    fn a_postponed_rung_is_followed_by_the_next_planned_one() {
        let halving = halving(2, 2, 1, 20);
        assert_eq!([5, 8, 16].map(|epoch| halving.rung_after(epoch)), [Some(8), Some(16), None]);
        assert!(halving.can_postpone(9) && !halving.can_postpone(10));
    }

    #[test]
    fn ties_go_to_fewer_tokens_and_then_to_the_lower_number() {
        let standing = |trial, value, virtual_tokens| Standing { trial, value, virtual_tokens };
        let mut standings = [
            standing(1, f64::NAN, 5),
            standing(2, 0.5, 9),
            standing(3, 0.5, 5),
            standing(4, 0.5, 5),
            standing(5, 0.2, 100),
            standing(6, f64::INFINITY, 5),
            standing(7, -0.1, 5),
        ];
        standings.sort_by(Standing::compare);
        assert_eq!(standings.map(|standing| standing.trial), [7, 5, 3, 4, 2, 1, 6]);
    }
}

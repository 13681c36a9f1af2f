//! Runs that can't learn by their schedule, and runs that have learned nothing.

use crate::config::TrainOptions;
use crate::tune::schedule::warmup_steps;

/// What the texts say, by which those of an earlier part of a run are recognised.
const ONE_STEP: &str = "the run has one step, which is warm-up";
const ALL_WARMUP: &str = "steps of the run are warm-up";
const NOT_MOVED: &str = "the prompt that is kept has not moved";
const LEFT_OUT: &str = "steps were left out as a value was not finite";

/// What is wrong with the learning rates of a run of `total_steps`: 0 at its only step, or never the one that was asked for.
pub fn schedule(options: &TrainOptions, total_steps: usize) -> Option<String> {
    let warmup = warmup_steps(options.warmup_ratio, total_steps);
    if total_steps == 0 || warmup < total_steps {
        return None;
    }
    let most = options.learning_rate * options.schedule.multiplier(total_steps - 1, warmup, total_steps);
    let hint = "set train.warmup_ratio = 0, or give the run more steps by more train.num_epochs or a smaller \
                train.batch_size";
    Some(match total_steps {
        1 => format!("{ONE_STEP}, and its learning rate is 0: the prompt stays as it begins; {hint}"),
        _ => format!(
            "all {total_steps} {ALL_WARMUP}: the learning rate is at most {most:.2e}, and never \
             train.learning_rate, {:.2e}; {hint}",
            options.learning_rate
        ),
    })
}

/// How a run ended.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Whether the prompt that is kept differs from the one that the run began with.
    pub moved: bool,
    /// Steps of training that the kept prompt has had.
    pub kept_step: usize,
    /// Steps that were taken.
    pub taken: usize,
    /// Steps that were left out because a value was not finite.
    pub skipped: usize,
}

impl Outcome {
    /// What is wrong with it: nothing has changed, or most steps were left out.
    pub fn warnings(self) -> Vec<String> {
        let Self { moved, kept_step, taken, skipped } = self;
        let mut found = Vec::new();
        if !moved && taken + skipped > 0 {
            let why = match (taken, kept_step) {
                (0, _) => "no step was taken",
                (_, 0) => "no prompt after it had a finite loss; try a lower train.learning_rate",
                _ => {
                    "every change of it was 0 or too small for f32: see train.learning_rate, train.max_grad_norm and the \
                     gradients' norms"
                }
            };
            let s = if taken == 1 { "" } else { "s" };
            found.push(format!(
                "{NOT_MOVED}: after {taken} step{s} it is the one that the run began with; {why}"
            ));
        }
        if skipped > taken {
            let all = taken + skipped;
            found.push(format!("{skipped} of {all} {LEFT_OUT}: try a lower train.learning_rate"));
        }
        found
    }
}

/// Whether `warning` is of a run's length and end, and so no longer true of a run that goes on.
pub fn is_outdated(warning: &str) -> bool {
    [ONE_STEP, ALL_WARMUP, NOT_MOVED, LEFT_OUT].iter().any(|text| warning.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_without_a_rate_is_told() {
        let of = |warmup_ratio: f64, steps: usize| {
            schedule(&TrainOptions { warmup_ratio, learning_rate: 0.4, ..TrainOptions::default() }, steps)
        };
        let one = of(0.06, 1).unwrap();
        assert!(one.contains("one step, which is warm-up, and its learning rate is 0"), "{one}");
        let all = of(1.0, 4).unwrap();
        assert!(
            all.contains("all 4 steps") && all.contains("at most 3.00e-1") && all.contains("4.00e-1"),
            "{all}"
        );
        assert_eq!([of(0.0, 1), of(0.06, 2), of(0.99, 200), of(0.5, 0)], [None, None, None, None]);
    }

    #[test]
    fn a_run_that_changed_nothing_is_told() {
        let of = |moved, [kept_step, taken, skipped]: [usize; 3]| {
            let found = Outcome { moved, kept_step, taken, skipped }.warnings();
            assert!(found.iter().all(|text| is_outdated(text)), "{found:?}");
            found
        };
        assert_eq!(of(true, [9, 9, 0]), [""; 0]);
        assert_eq!(of(true, [5, 5, 5]), [""; 0]);
        assert_eq!(of(false, [0, 0, 0]), [""; 0], "it ended before its first step");
        let still = of(false, [9, 9, 0]);
        assert!(still[0].contains("after 9 steps") && still[0].contains("too small for f32"), "{still:?}");
        let thrown_off = of(false, [0, 1, 0]);
        assert!(
            thrown_off[0].contains("after 1 step it") && thrown_off[0].contains("finite"),
            "{thrown_off:?}"
        );
        let both = of(false, [0, 0, 4]);
        assert!(both.len() == 2 && both[0].contains("no step was taken"), "{both:?}");
        assert!(both[1].contains("4 of 4 steps were left out"), "{both:?}");
        assert!(!is_outdated("epoch 2: the training loss has not moved (7.9, 7.9 in the first epoch)"));
    }
}

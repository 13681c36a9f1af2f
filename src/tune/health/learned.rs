//! Runs that can't learn by their schedule, and runs that have learned nothing.

use crate::config::TrainOptions;
use crate::tune::schedule::warmup_steps;

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
        1 => format!(
            "the run has one step, which is warm-up, and its learning rate is 0: the prompt stays as it begins; {hint}"
        ),
        _ => format!(
            "all {total_steps} steps of the run are warm-up: the learning rate is at most {most:.2e}, and never \
             train.learning_rate, {:.2e}; {hint}",
            options.learning_rate
        ),
    })
}

/// What is wrong with a run that has ended after `taken` steps and `skipped` more that were left out: nothing has changed,
/// as `moved` says, or most steps were left out.
pub fn outcome(moved: bool, taken: usize, skipped: usize) -> Vec<String> {
    let mut found = Vec::new();
    if !moved && taken + skipped > 0 {
        found.push(format!(
            "the prompt that is kept has not moved: after {taken} step{} it is the one that the run began with; every change \
             of it was 0 or too small for f32: see train.learning_rate, train.max_grad_norm and the gradients' norms",
            if taken == 1 { "" } else { "s" }
        ));
    }
    if skipped > taken {
        found.push(format!(
            "{skipped} of {} steps were left out as a value was not finite: try a lower train.learning_rate",
            taken + skipped
        ));
    }
    found
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
        assert_eq!(outcome(true, 9, 0), [""; 0]);
        assert_eq!(outcome(true, 5, 5), [""; 0]);
        assert_eq!(outcome(false, 0, 0), [""; 0], "it ended before its first step");
        assert!(outcome(false, 9, 0)[0].contains("has not moved: after 9 steps"));
        let both = outcome(false, 0, 4);
        assert!(both.len() == 2 && both[1].contains("4 of 4 steps were left out"), "{both:?}");
    }
}

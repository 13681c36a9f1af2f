//! Learning-rate schedules: transformers' `get_linear_schedule_with_warmup`,
//! `get_cosine_schedule_with_warmup` and `get_constant_schedule_with_warmup` (`optimization.py`).

use std::f64::consts::PI;

pub use crate::config::Schedule;

impl Schedule {
    /// What the learning rate is multiplied by at optimizer step `step`, counted from 0.
    ///
    /// ```text
    /// step < warmup_steps   step / warmup_steps
    /// linear                (total - step) / (total - warmup)
    /// cosine                (1 + cos(π (step - warmup) / (total - warmup))) / 2
    /// constant              1
    /// ```
    ///
    /// Never below 0. From `total_steps` on, linear and cosine give what transformers gives: 0 for
    /// linear, the cosine's further course for cosine.
    pub fn multiplier(self, step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        match self {
            Self::Linear => total_steps.saturating_sub(step) as f64 / decay_steps,
            Self::Cosine => {
                let progress = (step - warmup_steps) as f64 / decay_steps;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
            Self::Constant => 1.0,
        }
    }
}

/// Warm-up steps that `warmup_ratio` of `total_steps` makes, rounded up as transformers'
/// `TrainingArguments.get_warmup_steps` does.
pub fn warmup_steps(warmup_ratio: f64, total_steps: usize) -> usize {
    (total_steps as f64 * warmup_ratio).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/schedules.json");
        let golden: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let steps = |key: &str| usize::try_from(golden[key].as_u64().unwrap()).unwrap();
        let (warmup, total) = (steps("num_warmup_steps"), steps("num_training_steps"));
        assert_eq!((warmup, total), (3, 20));
        assert_eq!(golden["multipliers"].as_object().unwrap().len(), Schedule::ALL.len());
        for schedule in Schedule::ALL {
            let expected = golden["multipliers"][schedule.name()].as_array().unwrap();
            assert_eq!(expected.len(), total);
            for (step, expected) in expected.iter().enumerate() {
                let expected = expected.as_f64().unwrap();
                let ours = schedule.multiplier(step, warmup, total);
                assert!((ours - expected).abs() <= 1e-15, "{schedule}, step {step}: {ours}, {expected}");
            }
        }
    }

    #[test]
    fn starts_at_once_without_warmup_and_ends_at_zero() {
        for schedule in Schedule::ALL {
            assert_eq!(schedule.multiplier(0, 0, 7), 1.0, "{schedule}");
        }
        assert_eq!(Schedule::Linear.multiplier(7, 0, 7), 0.0);
        assert_eq!(Schedule::Linear.multiplier(9, 0, 7), 0.0);
        assert_eq!(Schedule::Cosine.multiplier(7, 0, 7), 0.0);
        assert_eq!(Schedule::Constant.multiplier(9, 0, 7), 1.0);
    }

    #[test]
    fn a_run_that_is_all_warmup_divides_by_no_zero() {
        for schedule in Schedule::ALL {
            assert_eq!(schedule.multiplier(2, 4, 4), 0.5, "{schedule}");
            assert!(schedule.multiplier(4, 4, 4).is_finite(), "{schedule}");
        }
    }

    #[test]
    fn warmup_is_rounded_up() {
        // Python: math.ceil(total * ratio).
        let cases = [(0.06, 50, 3), (0.06, 51, 4), (0.0, 10, 0), (1.0, 10, 10), (0.1, 1, 1), (0.07, 100, 8)];
        for (ratio, total, expected) in cases {
            assert_eq!(warmup_steps(ratio, total), expected, "{ratio} of {total}");
        }
    }
}

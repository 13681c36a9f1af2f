//! Messages about steps during which the machine was disturbed: a table's cell, and warnings.

/// The counted steps of a case.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    pub counted: usize,
    /// `None` without a canary.
    pub disturbed: Option<usize>,
    /// Number of steps from which the figures are computed.
    pub used: usize,
}

impl Steps {
    /// The cell of a table.
    pub fn cell(self) -> String {
        let counted = self.counted;
        match self.disturbed {
            None => "not watched".into(),
            Some(0) => format!("0 of {counted}"),
            Some(n) if self.used < counted => format!("{n} of {counted}, left out"),
            Some(n) => format!("{n} of {counted}, not left out"),
        }
    }

    /// A warning if the figures include disturbed steps; `even` is whether the canary ever ran equally fast on all
    /// threads.
    pub fn warning(self, even: bool) -> Option<String> {
        let disturbed = self.disturbed.filter(|n| *n > 0 && self.used == self.counted)?;
        let cause = match even {
            true => "",
            false => {
                "; the canary never ran equally fast on all threads, as on a CPU with cores of two speeds"
            }
        };
        let counted = self.counted;
        Some(format!(
            "the machine was disturbed during {disturbed} of {counted} steps; figures are of all steps{cause}"
        ))
    }
}

/// A warning about profiled steps, none of which is left out.
pub fn profile_warning(profiled: usize, disturbed: Option<usize>) -> Option<String> {
    let disturbed = disturbed.filter(|n| *n > 0)?;
    Some(format!(
        "the machine was disturbed during {disturbed} of {profiled} profiled steps; times of ops are of all of them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(disturbed: Option<usize>, used: usize) -> Steps {
        Steps { counted: 20, disturbed, used }
    }

    #[test]
    fn cell_says_whether_disturbed_steps_are_left_out() {
        for (disturbed, used, expected) in [
            (None, 20, "not watched"),
            (Some(0), 20, "0 of 20"),
            (Some(3), 17, "3 of 20, left out"),
            (Some(18), 20, "18 of 20, not left out"),
        ] {
            assert_eq!(steps(disturbed, used).cell(), expected);
        }
    }

    #[test]
    fn warning_comes_if_figures_are_of_disturbed_steps() {
        for (disturbed, used) in [(None, 20), (Some(0), 20), (Some(3), 17)] {
            assert_eq!(steps(disturbed, used).warning(true), None);
        }
        let text = steps(Some(18), 20).warning(true).unwrap();
        assert_eq!(text, "the machine was disturbed during 18 of 20 steps; figures are of all steps");
        let uneven = steps(Some(20), 20).warning(false).unwrap();
        assert!(uneven.contains("20 of 20 steps; figures are of all steps; the canary never"), "{uneven}");
        assert_eq!((profile_warning(3, None), profile_warning(3, Some(0))), (None, None));
        assert!(profile_warning(3, Some(2)).unwrap().contains("2 of 3 profiled steps"));
    }
}

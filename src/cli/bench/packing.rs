//! Several prompts in one step, beside one step after another.

use super::report::{CaseReport, digits, sizes};
use gneiss::bench::Measured;
use serde::Serialize;

/// The prompts of a case in one step after another: so many steps of the case with one prompt.
#[derive(Serialize)]
pub struct ByTurns {
    /// Median wall time of a step of each prompt, s.
    pub step_seconds: f64,
    /// Median examples per second.
    pub examples_per_second: f64,
    /// Median packed rows per second.
    pub rows_per_second: f64,
    /// Examples per second in one step, as a multiple of those by turns.
    pub speedup: f64,
}

impl ByTurns {
    /// Of a case with several prompts, from the `measured` case of one.
    pub fn new(several: &Measured, measured: &[CaseReport]) -> Option<Self> {
        let alone =
            measured.iter().map(|case| &case.measured).find(|one| one.case == several.case.alone())?;
        if several.case.prompts == 1 {
            return None;
        }
        let examples_per_second = alone.figures.examples_per_second.median;
        Some(Self {
            step_seconds: several.case.prompts as f64 * alone.figures.step_seconds.median,
            examples_per_second,
            rows_per_second: alone.figures.rows_per_second,
            speedup: several.figures.examples_per_second.median / examples_per_second,
        })
    }
}

/// The table of the cases with several prompts; `None` if there is none.
pub fn rows(cases: &[CaseReport]) -> Option<Vec<Vec<String>>> {
    let head = [
        "several prompts", "one step, ms", "by turns, ms", "examples/s", "by turns", "rows/s", "by turns",
        "speedup",
    ];
    let row = |case: &CaseReport| {
        let (figures, by_turns) = (&case.measured.figures, case.by_turns.as_ref()?);
        Some(vec![
            sizes(case.measured.case),
            digits(1e3 * figures.step_seconds.median),
            digits(1e3 * by_turns.step_seconds),
            digits(figures.examples_per_second.median),
            digits(by_turns.examples_per_second),
            digits(figures.rows_per_second),
            digits(by_turns.rows_per_second),
            format!("{:.2}", by_turns.speedup),
        ])
    };
    let rows: Vec<Vec<String>> = cases.iter().filter_map(row).collect();
    let head = head.map(str::to_owned).to_vec();
    (!rows.is_empty()).then(|| std::iter::once(head).chain(rows).collect())
}

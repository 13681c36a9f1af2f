//! Numbers and tables for people.

pub use gneiss::text::bytes;
use gneiss::tune::{BackwardWeights, MemoryPlan};

/// A plan in two lines: its budget and needs, and its limits.
pub fn plan(plan: &MemoryPlan) -> [String; 2] {
    let size = |n: usize| bytes(n as u64);
    let budget = match (plan.budget.bytes, plan.budget.configured) {
        (None, _) => "free memory not known".to_owned(),
        (Some(n), true) => format!("budget {}", size(n)),
        (Some(n), false) => format!("{} free", size(n)),
    };
    let weights = if plan.budget.with_weights { "" } else { " (loaded)" };
    let (copy, transposed) = match plan.backward_weights {
        BackwardWeights::Shared => (String::new(), ""),
        BackwardWeights::Copied { bytes, .. } => (format!(", their transposes {}", size(bytes)), ""),
        BackwardWeights::TransposedEachTime => {
            (String::new(), "; no room for the weights' transposes, which each backward product makes again")
        }
    };
    let limits = plan.limits;
    [
        format!(
            "{budget}; weights {}{weights}{copy}, tape {}, workspace {}, prompt {}, reserve {}",
            size(plan.weights),
            size(plan.tape),
            size(plan.workspace),
            size(plan.prompt),
            size(plan.reserve)
        ),
        format!(
            "{} rows a pass at most, {} of {} layers recomputed{transposed}",
            limits.max_rows, limits.recompute, plan.layers
        ),
    ]
}

/// A warning if a plan does not fit its budget.
pub fn shortage(plan: &MemoryPlan) -> Option<String> {
    let missing = Some(plan.missing()).filter(|n| *n > 0)?;
    Some(format!(
        "by estimate {} less than the {} that a pass of a single sequence needs with all layers recomputed",
        bytes(missing as u64),
        bytes(plan.total() as u64)
    ))
}

/// `text` on one line, cut to `width` characters.
pub fn short(text: &str, width: usize) -> String {
    let line = text.replace('\n', "⏎");
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width - 1).chain(['…']).collect()
}

/// Rows of cells in aligned columns; the first column is aligned left, the others right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (t, w))| if i == 0 { format!("{t:<w$}") } else { format!("{t:>w$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A number with commas between thousands.
pub fn grouped(n: usize) -> String {
    gneiss::text::grouped(&n.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gneiss::tune::{Budget, Limits};

    #[test]
    fn plan_says_what_the_backward_pass_reads() {
        let example = |backward_weights| MemoryPlan {
            budget: Budget { bytes: Some(24_000_000_000), configured: false, with_weights: false },
            weights: 269_000_000,
            backward_weights,
            tape: 0,
            workspace: 0,
            prompt: 0,
            reserve: 0,
            limits: Limits::rows(512),
            layers: 30,
        };
        let [needs, limits] =
            plan(&example(BackwardWeights::Copied { bytes: 212_000_000, is_packed: false }));
        assert!(needs.contains("weights 269 MB (loaded), their transposes 212 MB, tape"), "{needs}");
        assert_eq!(limits, "512 rows a pass at most, 0 of 30 layers recomputed");
        let [needs, limits] = plan(&example(BackwardWeights::TransposedEachTime));
        assert!(needs.contains("weights 269 MB (loaded), tape"), "{needs}");
        assert!(limits.ends_with(
            "recomputed; no room for the weights' transposes, which each backward product makes again"
        ));
        let [needs, limits] = plan(&example(BackwardWeights::Shared));
        assert!(!needs.contains("transposes") && !limits.contains("transposes"));
    }

    #[test]
    fn thousands_are_apart() {
        for (n, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (134_515_008, "134,515,008")] {
            assert_eq!(super::grouped(n), expected);
        }
    }
}

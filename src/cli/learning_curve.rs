//! The learning curve in a terminal.

use super::text;
use gneiss::layout::{CURVE_PNG, REPORT};
use gneiss::run::Run;

/// Characters of the longest bar.
const BAR: usize = 40;

/// Prints one line for each epoch, with bars of the validation loss, or of the training loss if there is no validation.
pub fn print(run: &Run) {
    let loss = |loss: Option<f64>| loss.map_or_else(String::new, |loss| format!("{loss:.4}"));
    let drawn: Vec<f64> =
        run.epochs.iter().map(|e| e.validation_loss.or(e.train_loss).unwrap_or(f64::NAN)).collect();
    let most = drawn.iter().copied().filter(|loss| loss.is_finite()).fold(0.0, f64::max);
    let best = run.best_epoch().map(|epoch| epoch.epoch);
    let header = ["epoch", "steps", "training loss", "validation loss", "seconds", ""];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (epoch, drawn) in run.epochs.iter().zip(&drawn) {
        let mark = if best == Some(epoch.epoch) { " best" } else { "" };
        let length = if drawn.is_finite() && *drawn > 0.0 {
            ((drawn / most * BAR as f64).round() as usize).max(1)
        } else {
            0
        };
        // Aligned left in a column that the table aligns right.
        let bar = format!("{:<width$}", format!("{}{mark}", "█".repeat(length)), width = BAR + 5);
        rows.push(vec![
            epoch.epoch.to_string(),
            epoch.step.to_string(),
            loss(epoch.train_loss),
            loss(epoch.validation_loss),
            format!("{:.1}", epoch.seconds),
            bar,
        ]);
    }
    println!("{}", text::table(&rows));
    let what = if run.epochs.iter().any(|e| e.validation_loss.is_some()) { "validation" } else { "training" };
    println!("\nBars show the {what} loss; {} shows every step.", run.path.join(CURVE_PNG).display());
    println!("{} has all plots.", run.path.join(REPORT).display());
}

//! The results of an evaluation as text.

use crate::cli::text;
use gneiss::evaluate::{self, Answers, By, EnsembleScores, Evaluation, Paired, Scores};
use gneiss::layout::{EVALUATION, PREDICTIONS};

/// Shows the results: a table of all arms, each tuned prompt against the base, then the details.
pub(in crate::cli) fn print(evaluation: &Evaluation) {
    let names = evaluation.columns();
    let rows = evaluation.arms.first().map_or(0, |base| base.answers.predictions.len());
    println!("{}: {rows} rows", evaluation.test);
    println!("{}", text::table(&summary(evaluation)));
    if !evaluation.pairs.is_empty() {
        println!();
    }
    for pair in &evaluation.pairs {
        println!("{}", paired(pair, evaluation));
    }
    if let Some(ensemble) = &evaluation.ensemble {
        println!("\n{}", text::table(&together(ensemble)));
    }
    for (name, arm) in names.iter().zip(&evaluation.arms) {
        let ways = [("generated", &arm.answers.generated), ("label likelihood", &arm.answers.likelihood)];
        for (way, scores) in ways {
            if let Some(scores) = scores {
                println!("\n{}", text::table(&classes(&format!("{name}, {way}"), scores)));
            }
        }
    }
    if evaluation.labels.len() > WIDE {
        println!("\nThe confusion matrix is in {EVALUATION}: `confusion`");
    }
    for (name, arm) in names.iter().zip(&evaluation.arms) {
        strange(name, &arm.answers, &evaluation.labels);
    }
}

/// The arms side by side.
fn summary(evaluation: &Evaluation) -> Vec<Vec<String>> {
    type EvalCell<'a> = &'a dyn Fn(&Answers) -> Option<String>;
    let mut header = evaluation.columns();
    if let [base, tuned @ ..] = &mut header[..] {
        base.push_str(match (evaluation.hard_prompt.is_empty(), evaluation.teacher) {
            (true, _) => ", no prompt",
            (false, false) => ", hard prompt",
            (false, true) => ", teacher's text",
        });
        if let [tuned] = tuned {
            tuned.push_str(", soft prompt");
        }
    }
    let mut rows = vec![[vec![String::new()], header].concat()];
    let mut row = |what: &str, of: EvalCell| {
        let cells = evaluation.arms.iter().map(|arm| of(&arm.answers));
        // A row without values for the task is left out.
        if let Some(cells) = cells.collect::<Option<Vec<_>>>() {
            rows.push([vec![what.to_owned()], cells].concat());
        }
    };
    let generated = |f: fn(&Scores) -> String| move |a: &Answers| a.generated.as_ref().map(f);
    let likelihood = |f: fn(&Scores) -> String| move |a: &Answers| a.likelihood.as_ref().map(f);
    row("accuracy, generated", &generated(accuracy));
    row("  95 % interval", &generated(|s| interval(s.interval)));
    row("macro precision, generated", &generated(|s| three(s.macro_precision)));
    row("macro recall, generated", &generated(|s| three(s.macro_recall)));
    row("macro F1, generated", &generated(|s| three(s.macro_f1)));
    row("answers that are no label", &generated(|s| s.no_label.to_string()));
    row("accuracy, label likelihood", &likelihood(accuracy));
    row("  95 % interval", &likelihood(|s| interval(s.interval)));
    row("macro F1, label likelihood", &likelihood(|s| three(s.macro_f1)));
    row("exact match", &|a| a.text.as_ref().map(|t| share(t.correct, t.total)));
    row("  95 % interval", &|a| a.text.as_ref().map(|t| interval(t.exact_match_interval)));
    row("token F1", &|a| a.text.as_ref().map(|t| three(t.token_f1)));
    row("ROUGE-L", &|a| a.text.as_ref().map(|t| three(t.rouge_l)));
    row("perplexity of the outputs", &|a| {
        Some(if a.perplexity < 1e5 { three(a.perplexity) } else { format!("{:.2e}", a.perplexity) })
    });
    row("seconds", &|a| Some(format!("{:.1}", a.seconds)));
    rows
}

/// The prompts of an ensemble together and by themselves.
fn together(ensemble: &EnsembleScores) -> Vec<Vec<String>> {
    let EnsembleScores { names, vote, mean_likelihood, mean_accuracy, best, best_accuracy } = ensemble;
    let title = format!("{} prompts, label likelihood", names.len());
    let row = |what: String, share: String, interval: String| vec![what, share, interval];
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    vec![
        row(title, "accuracy".into(), "95 % interval".into()),
        row("  most votes".into(), accuracy(vote), interval(vote.interval)),
        row("  mean likelihood".into(), accuracy(mean_likelihood), interval(mean_likelihood.interval)),
        row("  mean of single prompts".into(), percent(*mean_accuracy), String::new()),
        row(format!("  best single prompt here, {best}"), percent(*best_accuracy), String::new()),
    ]
}

/// A tuned prompt against the base in one line.
fn paired(pair: &Paired, evaluation: &Evaluation) -> String {
    let name = if evaluation.arms.len() > 2 { &pair.name } else { "tuned" };
    let p = match pair.p_value {
        p if p < 1e-300 => "p < 1e-300".to_owned(),
        p if p < 1e-3 => format!("p = {p:.1e}"),
        p => format!("p = {p:.3}"),
    };
    let [low, high] = pair.interval;
    let points = format!("{:+.1} points [{:.1}, {:.1}]", 100.0 * pair.difference, 100.0 * low, 100.0 * high);
    let score = format!("{:+.3} [{low:.3}, {high:.3}]", pair.difference);
    let (way, difference, test, up, down) = match pair.by {
        By::Generated if evaluation.labels.is_empty() => {
            ("exact match", points, "McNemar", "fixed", "broken")
        }
        By::Generated => ("generated", points, "McNemar", "fixed", "broken"),
        By::Likelihood => ("label likelihood", points, "McNemar", "fixed", "broken"),
        By::TokenF1 => ("token F1", score, "sign test", "better", "worse"),
        By::RougeL => ("ROUGE-L", score, "sign test", "better", "worse"),
    };
    let (fixed, broken) = (pair.fixed, pair.broken);
    format!("{name} minus base, {way}: {difference}, {test} {p}; {fixed} rows {up}, {broken} {down}")
}

/// With more labels than this, a line of the confusion matrix is too wide to read.
const WIDE: usize = 8;

/// Each label's scores, and the answers of the rows where it was expected.
fn classes(title: &str, scores: &Scores) -> Vec<Vec<String>> {
    let short = |label: &str| text::short(label, 20);
    let fits = scores.classes.len() <= WIDE;
    let mut header = [title, "precision", "recall", "F1", "rows"].map(str::to_owned).to_vec();
    if fits {
        header.extend(scores.classes.iter().map(|class| format!("said {}", short(&class.label))));
        // A column of zeros says nothing; by likelihood every answer is a label.
        header.extend((scores.no_label > 0).then(|| "no label".into()));
    }
    let columns = header.len();
    let row = |(class, confusion): (&evaluate::ClassScores, &Vec<usize>)| {
        let mut row = vec![format!("  {}", short(&class.label))];
        row.extend([class.precision, class.recall, class.f1].map(three));
        row.push(class.support.to_string());
        row.extend(confusion.iter().map(usize::to_string));
        row.truncate(columns);
        row
    };
    std::iter::once(header).chain(scores.classes.iter().zip(&scores.confusion).map(row)).collect()
}

/// Lists the answers that are no label.
fn strange(name: &str, answers: &Answers, labels: &[String]) {
    let strange: Vec<_> = answers.predictions.iter().filter(|p| !labels.contains(&p.generated)).collect();
    if labels.is_empty() || strange.is_empty() {
        return;
    }
    println!("\n{name}: {} answers are no label and count as wrong", strange.len());
    for p in strange.iter().take(10) {
        let input = text::short(&p.input, 60);
        println!("  line {}: {:?}, expected {:?}: {input}", p.line, p.generated, p.expected);
    }
    if strange.len() > 10 {
        println!("  and {} more ({PREDICTIONS} has them all)", strange.len() - 10);
    }
}

fn accuracy(scores: &Scores) -> String {
    share(scores.correct, scores.total)
}

/// A share in per cent, with its counts.
pub(in crate::cli) fn share(part: usize, of: usize) -> String {
    format!("{:.2} % ({part}/{of})", 100.0 * part as f64 / of as f64)
}

/// The bounds of a share in per cent.
fn interval([low, high]: [f64; 2]) -> String {
    format!("[{:.1}, {:.1}]", 100.0 * low, 100.0 * high)
}

fn three(value: f64) -> String {
    format!("{value:.3}")
}

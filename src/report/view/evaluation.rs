//! Tuned against base: scores, differences, confusion matrices, and the answers.

use super::NumberTile;
use crate::config::Task;
use crate::evaluate::compare::By;
use crate::evaluate::{Answers, Arm, Evaluation, Paired, Prediction, Scores, TextScores};
use crate::report::text;
use serde::Serialize;

/// Most examples in a list; the others are counted.
const SHOWN: usize = 20;

/// Most characters of a text that are shown at first.
const TEXT: usize = 320;

/// Most letters of a label at the top of a column.
const LABEL: usize = 18;

/// An evaluation.
#[derive(Serialize)]
pub(in crate::report) struct EvaluationView<'a> {
    test: &'a str,
    rows: u64,
    /// By generated answers and by likelihood, as far as there are results.
    by: Vec<ByView<'a>>,
    /// For a generation task.
    texts: Vec<TextView<'a>>,
    costs: Vec<Cost<'a>>,
    /// Its first characters, if it is long.
    hard_prompt: String,
    /// Whether that is a teacher's text.
    teacher: bool,
    pairs: Vec<PairView<'a>>,
    /// One for each tuned prompt.
    examples: Vec<Examples<'a>>,
    several: bool,
}

/// A tuned prompt against the base, in one sentence.
#[derive(Serialize)]
struct PairView<'a> {
    name: &'a str,
    /// How rows are judged.
    way: &'static str,
    difference: f64,
    interval: [f64; 2],
    /// The name of the rows that the tuned prompt alone answered, or answered better.
    gained: &'static str,
    fixed: u64,
    lost: &'static str,
    broken: u64,
    test: &'static str,
    p_value: f64,
}

/// Scores of all arms for one way of judging.
#[derive(Serialize)]
struct ByView<'a> {
    name: &'static str,
    arms: Vec<ArmScores<'a>>,
    classes: Vec<ClassRow<'a>>,
    confusion: Vec<Confusion<'a>>,
}

/// One arm's scores.
#[derive(Serialize)]
pub(in crate::report) struct ArmScores<'a> {
    /// The arm.
    pub name: &'a str,
    /// Its scores.
    pub scores: &'a Scores,
}

/// One arm's scores of a generation task.
#[derive(Serialize)]
struct TextView<'a> {
    name: &'a str,
    scores: &'a TextScores,
}

/// The cost of an arm's answers.
#[derive(Serialize)]
struct Cost<'a> {
    name: &'a str,
    perplexity: String,
    seconds: f64,
}

/// A label, and the scores of each arm for it.
#[derive(Serialize)]
struct ClassRow<'a> {
    label: &'a str,
    support: u64,
    /// Precision, recall and F1 of each arm.
    arms: Vec<[f64; 3]>,
}

/// A confusion matrix.
#[derive(Serialize)]
struct Confusion<'a> {
    name: &'a str,
    header: Vec<String>,
    rows: Vec<ConfusionRow<'a>>,
}

/// The predictions of rows with one expected label.
#[derive(Serialize)]
struct ConfusionRow<'a> {
    label: &'a str,
    cells: Vec<ConfusionCell>,
}

#[derive(Serialize)]
struct ConfusionCell {
    count: u64,
    /// Share of the row.
    share: f64,
    right: bool,
}

/// The answers in which a tuned prompt and the base differ.
#[derive(Serialize)]
struct Examples<'a> {
    arm: &'a str,
    groups: Vec<Group<'a>>,
}

#[derive(Serialize)]
struct Group<'a> {
    title: &'static str,
    about: &'static str,
    class: &'static str,
    total: u64,
    more: u64,
    shown: Vec<ExampleView<'a>>,
}

#[derive(Serialize)]
struct ExampleView<'a> {
    line: u64,
    input: TextOfView<'a>,
    expected: TextOfView<'a>,
    answers: [AnswerView<'a>; 2],
}

/// One arm's answer.
#[derive(Serialize)]
struct AnswerView<'a> {
    arm: &'static str,
    text: TextOfView<'a>,
    right: bool,
    /// The most probable labels.
    probabilities: Vec<(&'a str, f64)>,
}

/// A text; of a long one the beginning is shown first.
#[derive(Serialize)]
struct TextOfView<'a> {
    short: Option<String>,
    full: &'a str,
}

/// Returns the scores for one way of judging.
type GetScores<'a> = fn(&'a Answers) -> Option<&'a Scores>;

/// Scores of every arm for one way of judging; `None` if an arm has none.
pub(in crate::report) fn scores<'a>(arms: &'a [Arm], of: GetScores<'a>) -> Option<Vec<ArmScores<'a>>> {
    arms.iter().map(|arm| Some(ArmScores { name: &arm.name, scores: of(&arm.answers)? })).collect()
}

impl<'a> EvaluationView<'a> {
    pub fn new(evaluation: &'a Evaluation) -> Self {
        let arms = &evaluation.arms;
        let ways: [(_, GetScores<'a>); 2] =
            [("generated answer", |a| a.generated.as_ref()), ("label likelihood", |a| a.likelihood.as_ref())];
        let by = ways.into_iter().filter_map(|(name, of)| ByView::new(name, scores(arms, of)?));
        let text = |arm: &'a Arm| Some(TextView { name: &arm.name, scores: arm.answers.text.as_ref()? });
        let cost = |arm: &'a Arm| {
            let perplexity = text::number(arm.answers.perplexity);
            Cost { name: &arm.name, perplexity, seconds: arm.answers.seconds }
        };
        let examples = match arms.split_first() {
            Some((base, tuned)) => tuned.iter().map(|arm| Examples::new(evaluation, base, arm)).collect(),
            None => Vec::new(),
        };
        Self {
            test: &evaluation.test,
            rows: arms.first().map_or(0, |arm| arm.answers.predictions.len()) as u64,
            by: by.collect(),
            texts: arms.iter().filter_map(text).collect(),
            costs: arms.iter().map(cost).collect(),
            hard_prompt: crate::report::text::cut(&evaluation.hard_prompt, TEXT)
                .unwrap_or_else(|| evaluation.hard_prompt.clone()),
            teacher: evaluation.teacher,
            pairs: evaluation.pairs.iter().map(|pair| PairView::new(pair, evaluation.task)).collect(),
            examples,
            several: arms.len() > 2,
        }
    }

    /// The first tuned prompt's share of right answers, with the base's.
    pub(super) fn headline(&self) -> Option<NumberTile> {
        let (label, shares): (_, Vec<(f64, [f64; 2])>) = match self.by.first() {
            Some(by) => {
                let share = |arm: &ArmScores| (arm.scores.accuracy, arm.scores.interval);
                ("Accuracy, tuned", by.arms.iter().map(share).collect())
            }
            None => {
                let share = |arm: &TextView| (arm.scores.exact_match, arm.scores.exact_match_interval);
                ("Exact match, tuned", self.texts.iter().map(share).collect())
            }
        };
        let [(base, of_base), (tuned, of_tuned), ..] = shares[..] else { return None };
        let range = |[low, high]: [f64; 2]| format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high);
        let note = format!("{}; base {} ({})", range(of_tuned), text::percent(base), range(of_base));
        Some(NumberTile { label: label.into(), value: text::percent(tuned), note })
    }
}

impl<'a> PairView<'a> {
    fn new(pair: &'a Paired, task: Task) -> Self {
        let way = match (pair.by, task) {
            (By::Generated, Task::Classification) => "generated answer",
            (By::Generated, Task::Generation) => "exact match",
            (By::Likelihood, _) => "label likelihood",
            (By::TokenF1, _) => "token F1",
            (By::RougeL, _) => "ROUGE-L",
        };
        // With a score a row is not right or wrong, but better or worse.
        let (gained, lost, test) = match pair.by {
            By::Generated | By::Likelihood => ("Rows fixed", "broken", "exact McNemar"),
            By::TokenF1 | By::RougeL => ("Rows better", "worse", "sign test"),
        };
        let (fixed, broken) = (pair.fixed as u64, pair.broken as u64);
        let Paired { name, difference, interval, p_value, .. } = pair;
        let (difference, interval, p_value) = (*difference, *interval, *p_value);
        Self { name, way, difference, interval, gained, fixed, lost, broken, test, p_value }
    }
}

impl<'a> ByView<'a> {
    fn new(name: &'static str, arms: Vec<ArmScores<'a>>) -> Option<Self> {
        let class = |(i, class): (usize, &'a crate::evaluate::ClassScores)| {
            let arm = |arm: &ArmScores| {
                arm.scores.classes.get(i).map_or([0.0; 3], |c| [c.precision, c.recall, c.f1])
            };
            ClassRow {
                label: &class.label,
                support: class.support as u64,
                arms: arms.iter().map(arm).collect(),
            }
        };
        let classes = arms.first()?.scores.classes.iter().enumerate().map(class).collect();
        let confusion = arms.iter().map(|arm| Confusion::new(arm.name, arm.scores)).collect();
        Some(Self { name, arms, classes, confusion })
    }
}

impl<'a> Confusion<'a> {
    /// The column of answers that are no label is left out if there are none.
    fn new(name: &'a str, scores: &'a Scores) -> Self {
        let labels = scores.classes.len();
        let strange = scores.confusion.iter().any(|row| row.get(labels).is_some_and(|n| *n > 0));
        let columns = labels + usize::from(strange);
        let label = |text: &str| text::cut(text, LABEL).unwrap_or_else(|| text.to_owned());
        let mut header: Vec<String> = scores.classes.iter().map(|c| label(&c.label)).collect();
        header.extend(strange.then(|| "no label".into()));
        let row = |(i, (class, counts)): (usize, (&'a crate::evaluate::ClassScores, &Vec<usize>))| {
            let all = counts.iter().sum::<usize>().max(1) as f64;
            let cell = |(column, n): (usize, &usize)| ConfusionCell {
                count: *n as u64,
                share: *n as f64 / all,
                right: i == column,
            };
            ConfusionRow {
                label: &class.label,
                cells: counts.iter().take(columns).enumerate().map(cell).collect(),
            }
        };
        let rows = scores.classes.iter().zip(&scores.confusion).enumerate().map(row).collect();
        Self { name, header, rows }
    }
}

impl<'a> Examples<'a> {
    fn new(evaluation: &'a Evaluation, base: &'a Arm, tuned: &'a Arm) -> Self {
        let group = |title, about, class, wanted: (bool, bool)| {
            let right = |p: &Prediction| p.generated == p.expected;
            let pairs = base.answers.predictions.iter().zip(&tuned.answers.predictions);
            let all: Vec<_> = pairs.filter(|(base, tuned)| (right(base), right(tuned)) == wanted).collect();
            let shown =
                all.iter().take(SHOWN).map(|(base, tuned)| ExampleView::new(&evaluation.labels, base, tuned));
            let total = all.len() as u64;
            Group {
                title,
                about,
                class,
                total,
                more: total.saturating_sub(SHOWN as u64),
                shown: shown.collect(),
            }
        };
        let groups = vec![
            group("Broken", "right before, wrong now", "broken", (true, false)),
            group("Still wrong", "wrong before and now", "wrong", (false, false)),
            group("Fixed", "wrong before, right now", "fixed", (false, true)),
        ];
        Self { arm: &tuned.name, groups }
    }
}

impl<'a> ExampleView<'a> {
    fn new(labels: &'a [String], base: &'a Prediction, tuned: &'a Prediction) -> Self {
        let answers = [("base", base), ("tuned", tuned)].map(|(arm, p)| {
            let mut probabilities: Vec<_> =
                labels.iter().map(String::as_str).zip(p.probabilities.iter().copied()).collect();
            if probabilities.len() > 3 {
                probabilities.sort_by(|a, b| b.1.total_cmp(&a.1));
                probabilities.truncate(3);
            }
            AnswerView {
                arm,
                text: TextOfView::new(&p.generated),
                right: p.generated == p.expected,
                probabilities,
            }
        });
        let input = TextOfView::new(base.input.trim());
        Self { line: base.line as u64, input, expected: TextOfView::new(&base.expected), answers }
    }
}

impl<'a> TextOfView<'a> {
    fn new(full: &'a str) -> Self {
        Self { short: text::cut(full, TEXT), full }
    }
}

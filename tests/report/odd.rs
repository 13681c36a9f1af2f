//! Runs that a report must bear: tiny, huge, failed, and full of texts that are no plain text.

use crate::runs::{Answer, Content, WORDS, classification, steps, tokens, tutorial, under_way};
use gneiss::run::Status;
use serde_json::{Value, json};

/// Texts that would break a page which does not escape them, or a line that does not break.
pub const HOSTILE: [&str; 6] = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "\"quotes\" & 'apostrophes' </textarea></style></svg>]]>",
    "الخدمة كانت ممتازة جداً، شكراً لكم! 100%",
    "Loved it 🐩✨👍🏽 — מצוין",
    "{{ 7 * 7 }} {% raw %} {# no comment #}",
    "averyveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryverylongword",
];

/// A name and the run of that name.
pub fn all() -> Vec<(&'static str, Content)> {
    vec![
        ("tutorial", tutorial()),
        ("not-begun", under_way(0)),
        ("one-step", under_way(1)),
        ("under-way", under_way(31)),
        ("no-validation", no_validation()),
        ("twenty-epochs", twenty_epochs()),
        ("long", long()),
        ("generation", generation()),
        ("five-labels", five_labels()),
        ("odd & 'hostile' 🐩 مرحبا", hostile()),
        ("failed", failed()),
        ("huge-and-small", huge_and_small()),
        ("not-finite", not_finite()),
        ("several-prompts", several_prompts()),
    ]
}

fn no_validation() -> Content {
    let mut content = tutorial();
    for epoch in &mut content.epochs {
        (epoch.validation_loss, epoch.best) = (None, false);
    }
    content.config.data.validation.clear();
    content.config.train.keep = gneiss::config::Keep::Last;
    content.config.train.max_grad_norm = 0.0;
    let summary = &mut content.summary;
    (summary.validation_loss, summary.validation_examples, summary.skipped_steps) = (None, 0, 3);
    (summary.kept_step, summary.kept_epoch) = (225, 5);
    content
}

fn twenty_epochs() -> Content {
    let mut content = tutorial();
    (content.steps, content.epochs) = steps(20, 45, 2);
    let summary = &mut content.summary;
    (summary.steps, summary.total_steps, summary.epochs) = (900, 900, 20);
    (summary.status, summary.resumed) = (Status::StoppedEarly, 2);
    content.tokens = Some(tokens(100, &WORDS));
    content
}

/// 30,000 steps.
fn long() -> Content {
    let mut content = tutorial();
    (content.steps, content.epochs) = steps(3, 10_000, 3);
    content.summary.steps = 30_000;
    content
}

fn generation() -> Content {
    let mut content = tutorial();
    content.config.data.task = gneiss::config::Task::Generation;
    let texts = [
        (
            "Summarise: the groomer was late and the cut uneven.",
            "Late, uneven cut.",
            "The groomer was late.",
            "Late, uneven cut.",
        ),
        ("Summarise: lovely place.", "Lovely place.", "Lovely place.", "A lovely place."),
        ("Summarise: nothing to say.", "Nothing.", "", "Nothing to say, really."),
    ];
    let long = "A long answer that goes on and on about the groomer, the dog, the weather and the price. "
        .repeat(12);
    let arm = |name: &str, of: fn(&(&str, &str, &str, &str)) -> String| {
        let mut predictions: Vec<Value> = (texts.iter().enumerate())
            .map(|(i, t)| {
                json!({ "line": i + 2, "input": t.0, "expected": t.1, "generated": of(t), "likeliest": null,
                        "probabilities": [] })
            })
            .collect();
        predictions
            .push(json!({ "line": 9, "input": "Summarise: all.", "expected": "All.", "generated": long,
                                 "likeliest": null, "probabilities": [] }));
        json!({ "name": name, "adapter": null, "answers": {
            "predictions": predictions, "generated": null, "likelihood": null, "loss": 1.166, "perplexity": 3.21, "seconds": 140.2,
            "text": { "exact_match": 0.25, "exact_match_interval": [0.046, 0.699], "correct": 1, "total": 4,
                      "token_f1": 0.61, "rouge_l": 0.583 } } })
    };
    content.evaluation = Some(json!({
        "test": "data/summaries.jsonl", "task": "generation", "labels": [], "hard_prompt": "",
        "arms": [arm("base", |t| t.2.into()), arm("tuned", |t| t.3.into())],
        "pairs": [{ "name": "tuned", "by": "generated", "fixed": 1, "broken": 1, "difference": 0.0,
                    "interval": [-0.5, 0.5], "p_value": 1.0 },
                  { "name": "tuned", "by": "token_f1", "fixed": 2, "broken": 1, "difference": 0.08,
                    "interval": [-0.2, 0.31], "p_value": 1.0 },
                  { "name": "tuned", "by": "rouge_l", "fixed": 3, "broken": 0, "difference": 0.11,
                    "interval": [0.01, 0.32], "p_value": 0.01 }],
    }));
    content
}

fn five_labels() -> Content {
    let mut content = tutorial();
    let labels = ["billing", "delivery", "other", "quality of the product", "رد"];
    let row = |i: usize| {
        let expected = labels[i % 5].to_owned();
        let answer = |shift: usize| {
            let at = (i + shift) % 5;
            let mut probabilities = vec![0.05; 5];
            probabilities[at] = 0.8;
            let generated = if shift == 4 { "I can't say.".to_owned() } else { labels[at].to_owned() };
            Answer { generated, probabilities }
        };
        let base = answer(i * 7 % 5);
        (
            format!("Question {i}: where is my parcel?"),
            expected,
            base,
            answer(usize::from(i.is_multiple_of(6))),
        )
    };
    content.evaluation = Some(classification(&labels, &(0..90).map(row).collect::<Vec<_>>()));
    content
}

fn hostile() -> Content {
    let mut content = tutorial();
    let rows = |i: usize| {
        let text =
            if i == 6 { "A review of three thousand characters. ".repeat(77) } else { HOSTILE[i].into() };
        let answer = |label: &str| Answer { generated: label.into(), probabilities: vec![0.5, 0.5] };
        let (base, tuned) = match i % 3 {
            0 => (HOSTILE[0], "no"),
            1 => ("no", HOSTILE[1]),
            _ => (HOSTILE[4], ""),
        };
        (text, "no".to_owned(), answer(base), answer(tuned))
    };
    let rows: Vec<_> = (0..7).map(rows).collect();
    content.evaluation = Some(classification(&["<b>yes</b>", "no"], &rows));
    content.tokens = Some(tokens(1, &["<|im_start|>", "</table><script>alert(3)</script>"]));
    content.config.prompt.init_text = HOSTILE.join(" ");
    content.config.data.test = "data/it's <here>.csv".into();
    content.summary.model.id = "models/\"><script>alert(4)</script>.gguf".into();
    content.evaluation.as_mut().unwrap()["hard_prompt"] = HOSTILE[0].into();
    content.summary.warnings = HOSTILE.map(str::to_owned).to_vec();
    content
}

fn failed() -> Content {
    let mut content = under_way(120);
    content.summary.status = Status::Failed {
        error:
            "step 121: the loss is NaN; the prompt before this step is kept; a lower train.learning_rate may \
                help, or train.on_not_finite = \"skip\""
                .into(),
    };
    content.epochs = tutorial().epochs[..2].to_vec();
    content.summary.warnings = vec![
        "labels are unbalanced: 1 is 92 % of the training examples; an accuracy near that says little".into(),
    ];
    content
}

fn huge_and_small() -> Content {
    let mut content = tutorial();
    for (i, step) in content.steps.iter_mut().enumerate() {
        step.loss = if i % 50 == 7 { 1e12 } else { 1e-12 };
        step.learning_rate = 1e-9;
        step.grad_norm = if i == 3 { 0.0 } else { 1e-30 };
        (step.seconds, step.elapsed) = (1e-6, 1e-6 * (i + 1) as f64);
    }
    for epoch in &mut content.epochs {
        (epoch.validation_loss, epoch.train_loss, epoch.elapsed) = (Some(0.0), Some(1e12), 1e-4);
    }
    let summary = &mut content.summary;
    (summary.train_loss, summary.validation_loss) = (Some(1e12), Some(0.0));
    (summary.examples_per_second, summary.seconds) = (8e6, 1e-4);
    summary.model.parameters = 1_000_000_000_000;
    content.evaluation = None;
    content.tokens = Some(tokens(3, &["a"]));
    content
}

fn not_finite() -> Content {
    let mut content = tutorial();
    content.steps[3].grad_norm = f64::INFINITY;
    content.steps[40].loss = f64::NAN;
    content.epochs[1].validation_loss = Some(f64::INFINITY);
    content.epochs[4].validation_loss = Some(f64::NAN);
    content.summary.validation_loss = Some(f64::NAN);
    let tokens = content.tokens.as_mut().unwrap();
    tokens.tokens[0].after.norm = f64::INFINITY;
    tokens.tokens[1].moved = f64::INFINITY;
    tokens.tokens[2].after.nearest[0].cosine = f64::NAN;
    content
}

fn several_prompts() -> Content {
    let mut content = tutorial();
    let evaluation = content.evaluation.as_mut().unwrap();
    let mut other = evaluation["arms"][1].clone();
    other["name"] = "a much longer name of a prompt".into();
    evaluation["arms"].as_array_mut().unwrap().push(other);
    let mut pair = evaluation["pairs"][0].clone();
    (pair["name"], pair["difference"], pair["p_value"]) =
        ("a much longer name of a prompt".into(), (-0.01).into(), 0.021.into());
    evaluation["pairs"].as_array_mut().unwrap().push(pair);
    content
}

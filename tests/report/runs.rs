//! Run folders as `gneiss tune` and `gneiss eval` write them, made of the types that they are written with.

use gneiss::config::Config;
use gneiss::data::Dataset;
use gneiss::evaluate::Scores;
use gneiss::layout::{ADAPTER, CONFIG, EVALUATION, METRICS, SUMMARY, TOKENS};
use gneiss::prompt::vocabulary::{
    NearestPlace, Neighbour, Norms, PromptTokens, VirtualToken, VocabularyToken,
};
use gneiss::run::{LossKind, ModelSummary, Run, Status, Summary};
use gneiss::tune::{EpochRecord, StepRecord};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// What a run folder holds.
#[derive(Clone)]
pub struct Content {
    pub config: Config,
    pub steps: Vec<StepRecord>,
    pub epochs: Vec<EpochRecord>,
    pub summary: Summary,
    pub tokens: Option<PromptTokens>,
    pub evaluation: Option<Value>,
}

/// A base model's or a tuned prompt's answer to a row.
pub struct Answer {
    pub generated: String,
    pub probabilities: Vec<f64>,
}

fn noise(rng: &mut ChaCha8Rng) -> f64 {
    (0..6).map(|_| rng.random_range(-1.0..1.0)).sum::<f64>() / 3.0
}

/// Steps whose loss falls from 6 to 0.04.
pub fn steps(epochs: usize, per_epoch: usize, seed: u64) -> (Vec<StepRecord>, Vec<EpochRecord>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut steps, mut ends, mut elapsed) = (Vec::new(), Vec::new(), 0.0);
    let total = epochs * per_epoch;
    for epoch in 1..=epochs {
        let started = elapsed;
        for i in 1..=per_epoch {
            let step = (epoch - 1) * per_epoch + i;
            let done = step as f64 / total as f64;
            let seconds = 0.92 * (1.0 + 0.15 * noise(&mut rng));
            elapsed += seconds;
            steps.push(StepRecord {
                step,
                epoch,
                loss: (0.035 + 6.0 * (-done * 16.0).exp() + 0.25 * (-done * 3.0).exp())
                    * noise(&mut rng).exp(),
                learning_rate: 0.01 * (done / 0.06).min((1.0 - done) / 0.94),
                grad_norm: (2.0 + 40.0 * (-done * 9.0).exp()) * (1.5 * noise(&mut rng)).exp(),
                examples: 8,
                target_tokens: 16,
                rows: 300,
                seconds,
                elapsed,
            });
        }
        elapsed += 2.1;
        let losses = [0.379, 0.121, 0.0581, 0.0447, 0.0462];
        let validation = losses.get(epoch - 1).copied().unwrap_or(0.0451 + 0.002 * (epoch % 3) as f64);
        ends.push(EpochRecord {
            epoch,
            step: epoch * per_epoch,
            train_loss: Some(
                steps[steps.len() - per_epoch..].iter().map(|s| s.loss).sum::<f64>() / per_epoch as f64,
            ),
            validation_loss: Some(validation),
            best: epoch <= 4,
            seconds: elapsed - started,
            elapsed,
        });
    }
    (steps, ends)
}

/// `n` virtual tokens.
pub fn tokens(n: usize, texts: &[&str]) -> PromptTokens {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    let mut place = |i: usize, norm: f64, cosine: f64| NearestPlace {
        norm: norm * (1.0 + 0.08 * noise(&mut rng)),
        nearest: (0..3)
            .map(|k| Neighbour {
                token: VocabularyToken {
                    id: (i + k) as u32,
                    text: Some(texts[(i + 7 * k) % texts.len()].into()),
                },
                cosine: cosine - 0.07 * k as f64,
            })
            .collect(),
    };
    let token = |i: usize| VirtualToken {
        before: place(i, 3.1, 1.0),
        after: place(if i.is_multiple_of(3) { i + 5 } else { i }, 3.3, 0.91),
        moved: 0.4 + 0.9 * ((i * 37) % 11) as f64 / 11.0,
    };
    PromptTokens {
        vocabulary: Norms { mean: 3.16, min: 1.02, max: 4.38 },
        tokens: (0..n).map(token).collect(),
    }
}

pub const WORDS: [&str; 12] = [
    "Extract", " the", " satisfaction", " from", " comment", ".", " Return", " simple", " '", "1", "\n",
    " <script>",
];

/// An evaluation of a classification, as JSON; `rows` are input, expected, base's and the tuned prompt's answer.
pub fn classification(labels: &[&str], rows: &[(String, String, Answer, Answer)]) -> Value {
    let labels: Vec<String> = labels.iter().map(|l| (*l).to_owned()).collect();
    let likeliest = |answer: &Answer| {
        let best = answer.probabilities.iter().copied().fold(0.0, f64::max);
        labels[answer.probabilities.iter().position(|p| *p == best).unwrap()].clone()
    };
    let arm = |name: &str, adapter: Value, of: fn(&(String, String, Answer, Answer)) -> &Answer| {
        let prediction = |(i, row): (usize, &(String, String, Answer, Answer))| {
            let answer = of(row);
            json!({
                "line": 2 + 3 * i, "input": row.0, "expected": row.1, "generated": answer.generated,
                "likeliest": likeliest(answer), "probabilities": answer.probabilities,
            })
        };
        let generated =
            Scores::from_pairs(&labels, rows.iter().map(|r| (r.1.as_str(), of(r).generated.as_str())));
        let by_likelihood: Vec<String> = rows.iter().map(|r| likeliest(of(r))).collect();
        let pairs = rows.iter().zip(&by_likelihood).map(|(r, l)| (r.1.as_str(), l.as_str()));
        json!({
            "name": name, "adapter": adapter,
            "answers": {
                "predictions": rows.iter().enumerate().map(prediction).collect::<Vec<_>>(),
                "generated": generated, "likelihood": Scores::from_pairs(&labels, pairs), "text": null,
                "loss": if name == "base" { 3.153 } else { 0.044 },
                "perplexity": if name == "base" { 23.4 } else { 1.045 }, "seconds": 11.3,
            },
        })
    };
    json!({
        "test": "data/test.csv", "task": "classification", "labels": labels,
        "hard_prompt": "Extract the satisfaction from the comment.",
        "arms": [arm("base", Value::Null, |r| &r.2), arm("tuned", "runs/tutorial/adapter".into(), |r| &r.3)],
        "pairs": [
            { "name": "tuned", "by": "generated", "fixed": 112, "broken": 0, "difference": 0.9655,
              "interval": [0.931, 0.9914], "p_value": 3.85e-34 },
            { "name": "tuned", "by": "likelihood", "fixed": 55, "broken": 3, "difference": 0.4655,
              "interval": [0.362, 0.5603], "p_value": 2.1e-13 },
        ],
    })
}

fn reviews() -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let records = Dataset::read(&folder.join("data/test.csv"), "input", "output").unwrap().records;
    let row = |(i, record): (usize, &gneiss::data::Record)| {
        let expected = record.output.trim().to_owned();
        let wrong = if expected == "1" { "0" } else { "1" };
        let base = match i {
            3 | 9 | 31 => expected.clone(),
            _ => "1.".into(),
        };
        let tuned = if [3, 17, 58, 101].contains(&i) { wrong.to_owned() } else { expected.clone() };
        let sure = 0.5 + 0.49 * ((i * 29) % 17) as f64 / 17.0;
        let probabilities = if tuned == "1" { vec![1.0 - sure, sure] } else { vec![sure, 1.0 - sure] };
        let base = Answer { generated: base, probabilities: vec![0.21, 0.79] };
        (record.input.clone(), expected, base, Answer { generated: tuned, probabilities })
    };
    classification(&["0", "1"], &records.iter().enumerate().map(row).collect::<Vec<_>>())
}

/// A run as the tutorial's: 225 steps, 5 epochs, 116 answers, 25 virtual tokens.
pub fn tutorial() -> Content {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = Config::load(&folder.join("configs/tutorial.toml"), &[]).unwrap();
    let (steps, epochs) = steps(5, 45, 1);
    let model = ModelSummary {
        id: config.model.id.clone(),
        format: "gguf Q4_1".into(),
        dtype: "f32".into(),
        device: "cpu".into(),
        parameters: 134_515_008,
        num_hidden_layers: 30,
        hidden_size: 576,
        vocab_size: 49_152,
    };
    let summary = Summary {
        status: Status::Completed,
        version: "0.1.0".into(),
        started: 1_795_380_271,
        model,
        init_method: config.prompt.init_method,
        num_virtual_tokens: 25,
        trainable_parameters: 14_400,
        layout: None,
        train_examples: 360,
        validation_examples: 80,
        steps: 225,
        total_steps: 225,
        skipped_steps: 0,
        epochs: 5,
        kept_step: 180,
        kept_epoch: 4,
        loss: LossKind::CrossEntropy,
        train_loss: epochs[3].train_loss,
        validation_loss: epochs[3].validation_loss,
        seconds: epochs[4].elapsed,
        examples_per_second: 8.71,
        peak_memory_bytes: Some(970_000_000),
        resumed: 0,
        warnings: Vec::new(),
    };
    Content { config, steps, epochs, summary, tokens: Some(tokens(25, &WORDS)), evaluation: Some(reviews()) }
}

/// A run under way: `n` steps of the first epoch, and nothing else.
pub fn under_way(n: usize) -> Content {
    let mut content = tutorial();
    content.steps.truncate(n);
    (content.epochs, content.tokens, content.evaluation) = (Vec::new(), None, None);
    let summary = &mut content.summary;
    (summary.status, summary.steps, summary.epochs) = (Status::Running, n, 0);
    (summary.kept_step, summary.kept_epoch) = (0, 0);
    (summary.train_loss, summary.validation_loss, summary.peak_memory_bytes) = (None, None, None);
    summary.seconds = content.steps.last().map_or(0.0, |s| s.elapsed);
    content
}

impl Content {
    /// The run folder `under`/`name`.
    pub fn write(&self, under: &Path, name: &str) -> PathBuf {
        let path = under.join(name);
        fs::create_dir_all(&path).unwrap();
        let mut config = self.config.clone();
        config.name = name.into();
        fs::write(path.join(CONFIG), config.to_toml().unwrap()).unwrap();
        let mut lines: Vec<(usize, String)> = Vec::new();
        lines.extend(self.steps.iter().map(|s| (s.step, serde_json::to_string(s).unwrap())));
        lines.extend(self.epochs.iter().map(|e| (e.step, serde_json::to_string(e).unwrap())));
        lines.sort_by_key(|line| line.0);
        let lines: String = lines.into_iter().map(|(_, line)| line + "\n").collect();
        fs::write(path.join(METRICS), lines).unwrap();
        let json = |file: &str, value: Value| fs::write(path.join(file), value.to_string()).unwrap();
        json(SUMMARY, serde_json::to_value(&self.summary).unwrap());
        if let Some(tokens) = &self.tokens {
            json(TOKENS, serde_json::to_value(tokens).unwrap());
            fs::create_dir_all(path.join(ADAPTER)).unwrap();
        }
        if let Some(evaluation) = &self.evaluation {
            json(EVALUATION, evaluation.clone());
        }
        path
    }

    /// The same, read back.
    pub fn run(&self, under: &Path, name: &str) -> Run {
        Run::read(&self.write(under, name)).unwrap()
    }
}

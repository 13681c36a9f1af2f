//! The program as a user runs it, in a folder of its own, on a checkpoint of 40 columns.

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use candle_core::{Device, Tensor};
use gneiss::adapter::Adapter;
use gneiss::config::Config;
use gneiss::evaluate::{Answers, Arm, By, Evaluation};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/tutorial.rs"]
mod tutorial;

const VOCAB: usize = 131;
const GOOD: [&str; 4] = ["shiny", "gentle", "happy", "fluffy"];
const BAD: [&str; 4] = ["late", "rude", "smelly", "matted"];

const CONFIG: &str = r#"name = "dogs"

[model]
id = "model"
device = "cpu"

[prompt]
init_text = "say 1 or 0"
num_virtual_tokens = 5

[data]
task = "classification"
train = "train.csv"
validation = "validation.csv"
test = "test.csv"
verbalizer = "say {{input}} :"
max_output_tokens = 2

[train]
learning_rate = 0.05
batch_size = 4
num_epochs = 3
"#;

/// A folder with a checkpoint, its tokenizer, a configuration and three CSV files.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
        std::fs::create_dir(place.path("model")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
        }
        place.write("model/tokenizer.json", &tokenizer().to_string());
        place.write("model/tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        place.write("dogs.toml", CONFIG);
        for (name, rows) in [("train.csv", 12), ("validation.csv", 4), ("test.csv", 6)] {
            place.write(name, &reviews(rows));
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Runs `gneiss` in this folder, without a network.
    fn gneiss<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Assert {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.0.path());
        command.args(args).assert()
    }

    /// Asserts exit code 2, an empty stdout, and all `parts` in one error message.
    #[track_caller]
    fn refuses<'a>(&self, args: impl IntoIterator<Item = &'a str>, parts: &[&str]) {
        let assert = self.gneiss(args).code(2);
        let (stdout, stderr) = texts(&assert);
        assert_eq!(stdout, "");
        let Some((_, message)) = stderr.split_once("error: ") else { panic!("no error in: {stderr}") };
        for part in parts {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    }

    /// All files under a folder, by their path in it.
    fn files(&self, folder: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.path(folder)];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(self.path(folder)).unwrap().to_path_buf();
                    found.insert(name, std::fs::read(path).unwrap());
                }
            }
        }
        found
    }
}

/// One word a token: the words of these tests, and as many others as fill the checkpoint's vocabulary.
fn tokenizer() -> Value {
    let mut words: Vec<String> =
        ["<unk>", "<s>", "</s>", "0", "1", "say", "or", ":", "dog"].map(str::to_owned).to_vec();
    words.extend(GOOD.iter().chain(&BAD).map(|w| (*w).to_owned()));
    words.extend((words.len()..VOCAB).map(|i| format!("word{i}")));
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": words[id], "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "post_processor": null, "added_tokens": [special(0), special(1), special(2)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

/// Rows of a CSV file, satisfied and unsatisfied by turns.
fn reviews(rows: usize) -> String {
    let row = |i: usize| {
        let words = if i.is_multiple_of(2) { GOOD } else { BAD };
        format!("{} dog word{},{}\n", words[i / 2 % 4], 40 + i, (i + 1) % 2)
    };
    format!("input,output\n{}", (0..rows).map(row).collect::<String>())
}

fn texts(assert: &Assert) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&assert.get_output().stdout), text(&assert.get_output().stderr))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn tune_writes_a_run() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tune", "dogs.toml"]).success());
    let files = place.files("runs/dogs");
    let names =
        ["README.md", "adapter_config.json", "adapter_model.safetensors"].map(|n| format!("adapter/{n}"));
    let mut names: BTreeSet<PathBuf> = names.iter().map(PathBuf::from).collect();
    let files_of_run = [
        "config.toml",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "summary.json",
        "tokens.json",
        "report.html",
        "curve.svg",
        "curve.png",
    ];
    names.extend(files_of_run.map(PathBuf::from));
    assert_eq!(files.keys().cloned().collect::<BTreeSet<_>>(), names);

    // Results on stdout, what happens on the way on stderr.
    for part in ["adapter", "virtual tokens   5", "validation loss", "wall time", "throughput"] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
        assert!(part == "adapter" || part == "validation loss" || !stderr.contains(part), "{stderr}");
    }
    for part in ["model      model (safetensors)", "train      train.csv: 12 examples", "epoch 1 "] {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
        assert!(!stdout.contains(part), "{stdout}");
    }

    // The configuration is the resolved one, and its own input.
    let (given, kept) = (Config::load(&place.path("dogs.toml"), &[]), place.path("runs/dogs/config.toml"));
    assert_eq!(Config::load(&kept, &[]).unwrap(), given.unwrap());
    assert!(std::fs::read_to_string(kept).unwrap().contains("weight_decay"));

    let adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    assert_eq!(adapter.prompt.dims(), [5, 40]);
    assert_eq!(adapter.config.base_model_name_or_path.as_deref(), Some("model"));
    assert_eq!(adapter.config.prompt_tuning_init_text.as_deref(), Some("say 1 or 0"));
    let card = std::fs::read_to_string(place.path("runs/dogs/adapter/README.md")).unwrap();
    assert!(card.contains("say {{input}} :") && card.contains("learning rate"), "{card}");
}

#[test]
fn metrics_have_a_line_a_step_and_a_line_an_epoch() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=12"]).success();
    let text = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n'));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (epochs, steps): (Vec<&Value>, Vec<&Value>) =
        lines.iter().partition(|line| line.get("validation_loss").is_some());
    assert_eq!((steps.len(), epochs.len()), (36, 12));
    let of_step = [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "examples",
        "target_tokens",
        "rows",
        "seconds",
        "elapsed",
    ];
    let of_epoch = ["epoch", "step", "train_loss", "validation_loss", "best", "seconds", "elapsed"];
    for step in &steps {
        assert_eq!(keys(step), BTreeSet::from(of_step));
        assert_eq!((&step["examples"], &step["target_tokens"]), (&json!(4), &json!(8)));
    }
    for epoch in &epochs {
        assert_eq!(keys(epoch), BTreeSet::from(of_epoch));
        assert!(epoch["validation_loss"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(lines[3]["epoch"], json!(1), "an epoch's line is behind its steps");
    assert!(lines[3].get("best").is_some());
    let train_loss = |i: usize| epochs[i]["train_loss"].as_f64().unwrap();
    assert!(train_loss(11) < 0.8 * train_loss(0), "from {} to {}", train_loss(0), train_loss(11));
}

#[test]
fn a_second_run_moves_the_first_aside() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let first = place.files("runs/dogs");
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--set", "train.seed=7"]).success());
    assert!(stderr.contains("is now runs/dogs~1"), "{stderr}");
    assert_eq!(place.files("runs/dogs~1"), first);
    let second = place.files("runs/dogs");
    assert_ne!(second[Path::new("config.toml")], first[Path::new("config.toml")]);
    place.gneiss(["tune", "dogs.toml"]).success();
    assert_eq!(place.files("runs/dogs~1"), first);
    assert_eq!(place.files("runs/dogs~2"), second);
    // One seed, one prompt: the third run was the first again.
    let weights = Path::new("adapter/adapter_model.safetensors");
    assert_eq!(place.files("runs/dogs")[weights], first[weights]);
    assert_ne!(second[weights], first[weights]);
}

#[test]
fn tune_gives_json_alone_on_stdout() {
    let place = Place::new();
    let (stdout, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--json"]).success());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result["run"], json!("runs/dogs"));
    assert_eq!(result["num_virtual_tokens"], json!(5));
    assert!(result["examples_per_second"].as_f64().unwrap() > 0.0);
    assert!(result["validation_loss"].as_f64().unwrap() > 0.0);
    Adapter::read(&place.path(result["adapter"].as_str().unwrap())).unwrap();
    assert!(stderr.contains("epoch 3"), "{stderr}");
}

#[test]
fn eval_answers_with_both_arms() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=200"]).success();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs/adapter"];
    let (stdout, stderr) = texts(&place.gneiss(eval).success());
    for part in [
        "test.csv: 6 rows",
        "base, hard prompt  tuned, soft prompt",
        "accuracy, generated",
        "macro F1, label likelihood",
        "perplexity of the outputs",
        "answers that are no label",
        // Six rows, all right: SciPy's binomtest(6, 6).proportion_ci(method="wilson").
        "[61.0, 100.0]",
        // binomtest(6, 6) says 0.03125.
        "tuned minus base, generated: +100.0 points [100.0, 100.0], McNemar p = 0.031; 6 rows fixed, 0 broken",
        "tuned minus base, label likelihood: ",
        "base, generated  precision  recall     F1  rows  said 0  said 1  no label\n",
        "  1                  0.000   0.000  0.000     3       0       0         3\n",
        "tuned, generated  precision  recall     F1  rows  said 0  said 1\n",
        "  1                   1.000   1.000  1.000     3       0       3\n",
        // The base model is random and answers with any word.
        "base: 6 answers are no label and count as wrong",
        "  line 2: ",
        ", expected \"1\": shiny dog word40",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(stderr.contains("dogs       6 rows in") && !stdout.contains("rows in"), "{stderr}");
    let written = "results    runs/dogs/evaluation.json and runs/dogs/predictions.csv";
    assert!(stderr.contains(written), "{stderr}");

    // The run's folder is as good as its adapter's.
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--json"];
    let (stdout, _) = texts(&place.gneiss(eval).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    let kept = std::fs::read_to_string(place.path("runs/dogs/evaluation.json")).unwrap();
    assert_eq!(serde_json::from_str::<Evaluation>(&kept).unwrap(), result);
    assert_eq!((result.labels.join(" "), result.hard_prompt.as_str()), ("0 1".into(), "say 1 or 0"));
    let [base, tuned] = &result.arms[..] else { panic!("{stdout}") };
    assert_eq!((base.name.as_str(), base.adapter.as_deref()), ("base", None));
    assert_eq!((tuned.name.as_str(), tuned.adapter.as_deref()), ("dogs", Some("runs/dogs/adapter")));
    let pairs: Vec<_> = result.pairs.iter().map(|pair| (pair.name.as_str(), pair.by)).collect();
    assert_eq!(pairs, [("dogs", By::Generated), ("dogs", By::Likelihood)]);
    for arm in [base, tuned] {
        let Answers { predictions, generated, likelihood, text, .. } = &arm.answers;
        assert_eq!(predictions.iter().map(|p| p.line).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
        let sums = predictions.iter().map(|p| p.probabilities.iter().sum::<f64>());
        sums.for_each(|sum| assert!((sum - 1.0).abs() < 1e-9, "{sum}"));
        let (generated, likelihood) = (generated.as_ref().unwrap(), likelihood.as_ref().unwrap());
        assert_eq!((generated.total, likelihood.total, likelihood.no_label, text), (6, 6, 0, &None));
    }
    let scores =
        |arm: &Arm| (arm.answers.generated.clone().unwrap(), arm.answers.likelihood.clone().unwrap());
    assert_eq!(scores(base).0.no_label, 6);
    assert_eq!(scores(tuned).0.no_label, 0, "a tuned prompt answers with labels");
    assert!(scores(tuned).1.correct >= scores(base).1.correct, "{stdout}");
    assert!(tuned.answers.perplexity < base.answers.perplexity, "{stdout}");
}

#[test]
fn eval_puts_several_prompts_side_by_side() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=100"]).success();
    place.gneiss(["tune", "dogs.toml", "--set", "name=cats", "--set", "train.num_epochs=1"]).success();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--adapter", "runs/cats/adapter"];
    let (stdout, stderr) = texts(&place.gneiss(eval).success());
    for part in [
        "base, hard prompt ",
        "dogs minus base, generated: ",
        "cats minus base, generated: ",
        "cats minus base, label likelihood: ",
        "\ncats, label likelihood  precision ",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(stderr.contains("results    runs/dogs.eval/evaluation.json and "), "{stderr}");
    // Each run gets its own part.
    for name in ["dogs", "cats"] {
        let own: Evaluation =
            serde_json::from_value(place.json(&format!("runs/{name}/evaluation.json"))).unwrap();
        assert_eq!(own.arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>(), ["base", name]);
        assert!(own.pairs.len() == 2 && own.pairs.iter().all(|pair| pair.name == name));
        let report = std::fs::read_to_string(place.path(&format!("runs/{name}/report.html"))).unwrap();
        assert!(report.contains("Tuned against base"), "{name}");
    }
    let before = place.files("runs/cats");
    let kept = std::fs::read_to_string(place.path("runs/dogs.eval/evaluation.json")).unwrap();
    let kept: Evaluation = serde_json::from_str(&kept).unwrap();
    let [base, dogs, cats] = ["base", "dogs", "cats"];
    assert_eq!(kept.arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>(), [base, dogs, cats]);
    assert_ne!(kept.arms[1].answers.perplexity, kept.arms[2].answers.perplexity);
    let pairs: Vec<_> = kept.pairs.iter().map(|pair| (pair.name.as_str(), pair.by)).collect();
    let (generated, likelihood) = (By::Generated, By::Likelihood);
    assert_eq!(pairs, [(dogs, generated), (cats, generated), (dogs, likelihood), (cats, likelihood)]);

    let mut table = csv::Reader::from_path(place.path("runs/dogs.eval/predictions.csv")).unwrap();
    let header = "line,input,expected,base,dogs,cats,base_likeliest,dogs_likeliest,cats_likeliest,\
                  base P(0),base P(1),dogs P(0),dogs P(1),cats P(0),cats P(1)";
    assert_eq!(table.headers().unwrap().iter().collect::<Vec<_>>().join(","), header);
    assert_eq!(table.records().count(), 6);

    let eval = ["eval", "dogs.toml", "--adapter", "runs/cats", "--out", "results/cats"];
    let (_, stderr) = texts(&place.gneiss(eval).success());
    assert!(stderr.contains("results/cats/predictions.csv"), "{stderr}");
    assert_eq!(place.files("results/cats").len(), 2);
    assert_eq!(place.files("runs/cats"), before);
}

#[test]
fn eval_of_texts_gives_their_metrics_and_a_table_that_reads_back() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let rows = [
        ("shiny, \"happy\" dog", "happy dog"),
        ("two\nlines; of dog", "=1, or 0"),
        ("späte 狗 dog", "rude dog"),
    ];
    let mut file = csv::Writer::from_path(place.path("texts.csv")).unwrap();
    file.write_record(["input", "output"]).unwrap();
    rows.iter().for_each(|(input, output)| file.write_record([input, output]).unwrap());
    file.flush().unwrap();
    let sets = ["--set", "data.task=generation", "--set", "data.test=texts.csv", "--json"];
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs"].into_iter().chain(sets);
    let (stdout, _) = texts(&place.gneiss(eval.clone()).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert!(result.labels.is_empty());
    assert_eq!(
        result.pairs.iter().map(|p| p.by).collect::<Vec<_>>(),
        [By::Generated, By::TokenF1, By::RougeL]
    );
    for arm in &result.arms {
        let Answers { predictions, generated, likelihood, text, perplexity, .. } = &arm.answers;
        assert!(generated.is_none() && likelihood.is_none() && *perplexity > 1.0);
        assert_eq!(text.as_ref().unwrap().total, 3);
        assert!(predictions.iter().all(|p| p.likeliest.is_none() && p.probabilities.is_empty()));
    }
    let mut table = csv::Reader::from_path(place.path("runs/dogs/predictions.csv")).unwrap();
    assert_eq!(table.headers().unwrap(), vec!["line", "input", "expected", "base", "tuned"]);
    let answers = |arm: usize, row: usize| result.arms[arm].answers.predictions[row].generated.clone();
    for (i, record) in table.records().enumerate() {
        let line = ["2", "3", "5"][i].to_owned();
        let (input, expected) = (rows[i].0.to_owned(), rows[i].1.to_owned());
        let expected = [line, input, expected, answers(0, i), answers(1, i)];
        assert_eq!(record.unwrap().iter().collect::<Vec<_>>(), expected);
    }
    let (stdout, _) = texts(&place.gneiss(eval.filter(|arg| *arg != "--json")).success());
    for part in [
        "exact match",
        "token F1",
        "ROUGE-L",
        "perplexity",
        "base, exact match: ",
        "sign test p = ",
        "rows better, ",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(!stdout.contains("label"), "{stdout}");
}

/// Perplexity and the labels' probabilities, from each text alone. One label begins as the other ends, so that each
/// has to have its end counted.
#[test]
fn eval_scores_are_those_of_each_text_alone() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let rows = [("shiny word40", "dog"), ("rude word41 late", "dog happy"), ("gentle", "dog happy")];
    let text = |(input, output): &(&str, &str)| format!("{input},{output}\n");
    place.write("labels.csv", &format!("input,output\n{}", rows.iter().map(text).collect::<String>()));
    let set = ["data.test=labels.csv", "data.train=labels.csv", "data.max_output_tokens=3"];
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--json", "--set", set[0], "--set", set[1]];
    let (stdout, _) = texts(&place.gneiss(eval.into_iter().chain(["--set", set[2]])).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result.labels, ["dog", "dog happy"]);

    let mut config = Config::load(&place.path("dogs.toml"), &[]).unwrap();
    config.model.id = place.path("model").display().to_string();
    let session = gneiss::setup::open(&config.model, &mut |_, _| ()).unwrap();
    let words = |text: &str| session.tokenizer.encode(text, false).unwrap();
    let prompt = Adapter::read(&place.path("runs/dogs/adapter")).unwrap().prompt;
    let none = prompt.narrow(0, 0, 0).unwrap();
    let loss = |prompt: &Tensor, before: &str, input: &str, output: &str| -> Vec<f64> {
        let input = words(&format!("{before}say {input} :"));
        let target = [words(output), vec![session.tokenizer.eos_token_id]].concat();
        let example = gneiss::data::Example { input, target, line: 0 };
        let groups = [gneiss::data::PrefixGroup::new(0..prompt.dims()[0] as u32, [&example])];
        gneiss::tune::evaluate(&session.model, prompt, &groups, usize::MAX).unwrap().nll().unwrap()
    };
    for (arm, (prompt, before)) in result.arms.iter().zip([(&none, "say 1 or 0 "), (&prompt, "")]) {
        let all: Vec<f64> =
            rows.iter().flat_map(|(input, output)| loss(prompt, before, input, output)).collect();
        assert_eq!(all.len(), 2 + 3 + 3);
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let Answers { loss: found, perplexity, predictions, .. } = &arm.answers;
        assert!((found - mean).abs() < 1e-5, "{}: {found}, expected {mean}", arm.name);
        assert!((perplexity / mean.exp() - 1.0).abs() < 1e-5, "{}", arm.name);
        for (row, prediction) in rows.iter().zip(predictions) {
            let label = |label: &str| (-loss(prompt, before, row.0, label).iter().sum::<f64>()).exp();
            let (short, long) = (label("dog"), label("dog happy"));
            let expected = [short / (short + long), long / (short + long)];
            for (p, expected) in prediction.probabilities.iter().zip(expected) {
                assert!((p - expected).abs() < 1e-5, "{}: {prediction:?}, {expected}", arm.name);
            }
        }
    }
}

#[test]
fn eval_keeps_what_came_before_an_error() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let mut adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    adapter.prompt = (adapter.prompt.ones_like().unwrap() * 3e38).unwrap();
    adapter.write(&place.path("wild"), &Default::default()).unwrap();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--adapter", "wild", "--out", "out"];
    let (stdout, stderr) = texts(&place.gneiss(eval).code(1));
    assert_eq!(stdout, "");
    for part in
        ["out/evaluation.json and out/predictions.csv, of base, dogs alone", "error: evaluating wild: "]
    {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
    }
    let kept = std::fs::read_to_string(place.path("out/evaluation.json")).unwrap();
    let kept: Evaluation = serde_json::from_str(&kept).unwrap();
    assert_eq!((kept.arms.len(), kept.pairs.len(), kept.arms[1].name.as_str()), (2, 2, "dogs"));

    // Alone, it leaves nothing, and an earlier result where it was.
    let before = place.files("out");
    place.gneiss(["eval", "dogs.toml", "--adapter", "wild", "--out", "out"]).code(1);
    assert_eq!(place.files("out"), before);
}

#[test]
fn eval_refuses_before_it_computes() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let eval = |more: &[&'static str]| {
        ["eval", "dogs.toml", "--adapter", "runs/dogs"].into_iter().chain(more.to_vec())
    };
    place.refuses(eval(&["--adapter", "runs/dogs/adapter"]), &["runs/dogs/adapter", "once", "same"]);
    place.refuses(eval(&["--adapter", "nowhere"]), &["nowhere", "adapter folder"]);
    place.refuses(eval(&["--adapter", "runs"]), &["runs", "adapter_config.json"]);
    place.refuses(eval(&["--set", "data.test="]), &["data.test", "none"]);
    place.refuses(eval(&["--set", "data.test=no.csv"]), &["no.csv", "o such file"]);
    // Words that the checkpoint's tokenizer doesn't know are one token.
    place.write("unknown.csv", "input,output\nshiny,yes\nrude,no\n");
    let sets = ["--set", "data.test=unknown.csv", "--set", "data.train=unknown.csv"];
    place.refuses(eval(&sets), &["\"no\" and \"yes\"", "the same"]);
    place.gneiss(eval(&["--out", "test.csv"])).code(1);
    std::fs::rename(place.path("runs/dogs/adapter"), place.path("base")).unwrap();
    place.refuses(eval(&[]), &["runs/dogs", "adapter/"]);
    assert!(place.files("runs").keys().all(|name| !name.ends_with("evaluation.json")));

    // Its name is another than the base's.
    let eval = ["eval", "dogs.toml", "--adapter", "base", "--json"];
    let (stdout, _) = texts(&place.gneiss(eval).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert!(result.arms[1].name.ends_with("/base"), "{}", result.arms[1].name);
    assert!(place.path("runs/dogs.eval/evaluation.json").is_file());
}

#[test]
fn generate_continues_a_text() {
    let place = Place::new();
    let base = ["generate", "--model", "model", "--max-new-tokens", "4"];
    let (stdout, stderr) = texts(&place.gneiss(base.into_iter().chain(["say happy dog :"])).success());
    assert!(!stdout.trim().is_empty() && stdout.ends_with('\n') && stdout.lines().count() == 1, "{stdout}");
    assert!(stderr.contains("model      model (safetensors)"), "{stderr}");
    let (again, _) = texts(&place.gneiss(base.into_iter().chain(["say happy dog :"])).success());
    assert_eq!(again, stdout, "greedy");

    place.gneiss(["tune", "dogs.toml"]).success();
    let tuned = base.into_iter().chain(["--adapter", "runs/dogs/adapter", "--json", "say happy dog :"]);
    let (stdout, _) = texts(&place.gneiss(tuned).success());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        keys(&result),
        BTreeSet::from(["generated_text", "generated_token_count", "input_token_count", "stop_reason"])
    );
    assert_eq!(result["input_token_count"], json!(5 + 4));
    let count = result["generated_token_count"].as_u64().unwrap();
    assert!(count <= 4);
    let stop_reason = if count == 4 { "max_tokens" } else { "stop_token" };
    assert_eq!(result["stop_reason"], json!(stop_reason));
}

#[test]
fn help_and_version_are_no_errors() {
    let place = Place::new();
    for args in [vec!["--help"], vec!["--version"], vec!["tune", "--help"], vec!["eval", "-h"]] {
        let (stdout, stderr) = texts(&place.gneiss(args).code(0));
        assert!(stdout.contains("gneiss"), "{stdout}");
        assert_eq!(stderr, "");
    }
    let (stdout, _) = texts(&place.gneiss(["--help"]).success());
    for command in ["tune", "eval", "generate"] {
        assert!(stdout.contains(command), "{stdout}");
    }
}

#[test]
fn bad_usage_is_refused() {
    let place = Place::new();
    place.refuses(["tune"], &["<CONFIG>"]);
    place.refuses(["tuna", "dogs.toml"], &["tuna", "tune"]);
    place.refuses(["tune", "dogs.toml", "--device", "gpu"], &["gpu", "cuda:N"]);
    place.refuses(["eval", "dogs.toml"], &["--adapter"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn a_bad_configuration_is_refused() {
    let place = Place::new();
    place.refuses(["tune", "cats.toml"], &["cats.toml", "o such file"]);
    place.write("typo.toml", &CONFIG.replace("learning_rate", "lerning_rate"));
    place.refuses(
        ["tune", "typo.toml"],
        &["typo.toml", "line 20", "`train.lerning_rate`", "did you mean `train.learning_rate`?"],
    );
    place.refuses(
        ["tune", "dogs.toml", "--set", "train.num_epochs=many", "--set", "prompt.length=4"],
        &["2 problems", "`--set train.num_epochs`", "a whole number", "\"many\"", "`--set prompt.length`"],
    );
    place.refuses(["tune", "dogs.toml", "--set", "train.seed"], &["train.seed", "KEY=VALUE"]);
    place.refuses(
        ["eval", "dogs.toml", "--adapter", "a", "--set", "data.validation="],
        &["train.keep", "\"best\""],
    );
    assert!(!place.path("runs").exists());
}

#[test]
fn a_bad_model_is_refused() {
    let place = Place::new();
    place.refuses(["tune", "dogs.toml", "--model", "./no-model"], &["no-model"]);
    place.refuses(["generate", "--model", "no/such.gguf", "say"], &["no/such.gguf"]);
    place.refuses(["tune", "dogs.toml", "--model", "."], &["config.json"]);
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.refuses(["tune", "dogs.toml"], &["model", "tokenizer.json", "AutoTokenizer"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn bad_data_is_refused() {
    let place = Place::new();
    place.write("bad.csv", "input,output\nshiny dog,1\nlate,rude dog,0\n,1\n");
    place.refuses(
        ["tune", "dogs.toml", "--set", "data.train=bad.csv"],
        &[
            "bad.csv",
            "2 problems",
            "line 3",
            "expected 2 fields, found 3",
            "double quotes",
            "line 4",
            "`input`",
        ],
    );
    place.refuses(["tune", "dogs.toml", "--set", "data.output=label"], &["train.csv", "`label`"]);
    place.refuses(["tune", "dogs.toml", "--set", "data.train=no.csv"], &["no.csv", "o such file"]);
    place.refuses(
        ["tune", "dogs.toml", "--set", "prompt.num_virtual_tokens=300"],
        &["256", "max_position_embeddings", "prompt.num_virtual_tokens"],
    );
    assert!(!place.path("runs").exists(), "nothing is written before all is well");
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let mut adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    adapter.prompt = Tensor::ones((5, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    adapter.config.token_dim = 32;
    adapter.config.base_model_name_or_path = Some("org/other".into());
    adapter.write(&place.path("other"), &Default::default()).unwrap();
    let parts = ["other", "width 40", "32", "org/other"];
    place.refuses(["eval", "dogs.toml", "--adapter", "other"], &parts);
    place.refuses(["generate", "--model", "model", "--adapter", "other", "say"], &parts);
    let sets = ["prompt.init_method=file", "prompt.init_file=other"];
    place
        .refuses(["tune", "dogs.toml", "--set", sets[0], "--set", sets[1]], &["other", "[5, 40]", "[5, 32]"]);
    place.refuses(["eval", "dogs.toml", "--adapter", "nowhere"], &["nowhere", "adapter folder"]);
    assert_eq!(place.json("other/adapter_config.json")["token_dim"], json!(32));
}

#[test]
fn a_run_that_blows_up_fails_and_leaves_its_last_good_prompt() {
    let place = Place::new();
    let args = ["tune", "dogs.toml", "--set", "train.learning_rate=1e38"];
    let (stdout, stderr) = texts(&place.gneiss(args).code(1));
    assert_eq!(stdout, "");
    assert!(stderr.contains("error: step ") && stderr.contains("train.learning_rate"), "{stderr}");
    let adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    assert_eq!(adapter.prompt.dims(), [5, 40]);
}

#[test]
fn bench_takes_the_sizes_and_rows_of_a_configuration() {
    let place = Place::new();
    let args = ["bench", "dogs.toml", "--steps", "2", "--warmup", "0", "--json"];
    let run = |more: &[&str]| -> Value {
        let (stdout, _) = texts(&place.gneiss(args.iter().chain(more).copied()).success());
        serde_json::from_str(&stdout).unwrap()
    };
    let report = run(&[]);
    assert_eq!((&report["model"], &report["weights"]), (&json!("model"), &json!("safetensors")));
    assert_eq!(report["examples"], "12 of train.csv");
    let case = &report["cases"][0];
    for (key, expected) in [("batch_size", 4), ("accumulate_steps", 1), ("num_virtual_tokens", 5)] {
        assert_eq!(case[key], expected, "{key}");
    }
    // "say", three words, ":", a label and the end of text, four times; the head and a row of each are shared or none.
    assert_eq!(case["tokens_per_step"], 28.0);
    assert_eq!(case["rows_per_step"], 5.0 + 1.0 + 4.0 * 5.0);

    let report = run(&["--data", "test.csv", "--set", "prompt.num_virtual_tokens=0", "--batch", "3"]);
    assert_eq!(report["examples"], "6 of test.csv");
    // As many as "say 1 or 0" has.
    assert_eq!(report["cases"][0]["num_virtual_tokens"], 4);
    assert_eq!(report["cases"][0]["tokens_per_step"], 21.0);
    place.refuses(["bench", "dogs.toml", "--data", "none.csv"], &["none.csv"]);
    assert!(!place.path("runs").exists(), "a benchmark leaves no run");
}

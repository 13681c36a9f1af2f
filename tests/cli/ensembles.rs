//! Several prompts that answer together: `gneiss eval --ensemble` and `gneiss serve --ensemble`.

use super::*;
use crate::common::server::ServerProcess;
use gneiss::evaluate::{Evaluation, Prediction};

/// The prompts: other kinds, lengths and seeds.
const MEMBERS: [(&str, [&str; 2]); 3] = [
    ("one", ["prompt.num_virtual_tokens=5", "train.seed=1"]),
    ("two", ["prompt.kind=prefix", "train.seed=2"]),
    ("three", ["prompt.num_virtual_tokens=9", "train.num_epochs=6"]),
];

/// With the runs of the members; labels are `labels` instead of 0 and 1.
fn place(labels: [&str; 2]) -> Place {
    let place = Place::new();
    for (name, rows) in [("train.csv", 12), ("validation.csv", 4), ("test.csv", 6)] {
        let text = reviews(rows);
        let rows = text.lines().map(|line| match line.rsplit_once(',') {
            Some((input, "0")) => format!("{input},{}\n", labels[0]),
            Some((input, "1")) => format!("{input},{}\n", labels[1]),
            _ => format!("{line}\n"),
        });
        place.write(name, &rows.collect::<String>());
    }
    for (name, sets) in MEMBERS {
        let name = format!("name={name}");
        place.gneiss(["tune", "dogs.toml", "--set", &name, "--set", sets[0], "--set", sets[1]]).success();
    }
    place
}

fn evaluation(place: &Place, dtype: &str, more: &[&str]) -> Evaluation {
    let mut eval = vec!["eval", "dogs.toml", "--json", "--out", "out", "--dtype", dtype];
    eval.extend(MEMBERS.iter().flat_map(|_| ["--adapter", ""]));
    let runs = MEMBERS.map(|(name, _)| format!("runs/{name}"));
    eval.iter_mut().filter(|part| part.is_empty()).zip(&runs).for_each(|(part, run)| *part = run);
    eval.extend(more);
    serde_json::from_str(&texts(&place.gneiss(eval).success()).0).unwrap()
}

fn assert_near(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance, "{a} and {b}");
}

/// All prompts in one batch answer as one after another: in bf16 bit for bit, in f32 to rounding.
#[test]
fn prompts_in_one_batch_answer_as_by_turns() {
    for labels in [["0", "1"], ["rude dog", "happy dog"]] {
        let place = place(labels);
        for (dtype, tolerance) in [("bf16", 0.0), ("f32", 1e-5)] {
            let by_turns = evaluation(&place, dtype, &[]);
            let together = evaluation(&place, dtype, &["--ensemble"]);
            assert_eq!((by_turns.arms.len(), together.arms.len()), (4, 4));
            for (a, b) in by_turns.arms.iter().zip(&together.arms) {
                assert_eq!((&a.name, &a.adapter), (&b.name, &b.adapter));
                assert_near(a.answers.loss, b.answers.loss, tolerance * a.answers.loss);
                for (a, b) in a.answers.predictions.iter().zip(&b.answers.predictions) {
                    assert_eq!((a.line, &a.generated, &a.likeliest), (b.line, &b.generated, &b.likeliest));
                    let pairs = a.probabilities.iter().zip(&b.probabilities);
                    pairs.for_each(|(a, b)| assert_near(*a, *b, tolerance));
                }
            }
            assert_ne!(together.arms[1].answers.loss, together.arms[2].answers.loss);
            assert!(by_turns.ensemble.is_none() && together.ensemble.is_some());
        }
    }
}

/// A server of the model of a place.
struct Server(ServerProcess);

impl Server {
    fn start(place: &Place, more: &[&str]) -> Self {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(place.0.path()).env("HF_HUB_OFFLINE", "1");
        command.args(["serve", "--model", "model", "--device", "cpu", "--dtype", "f32"]);
        command.args(["--listen", "127.0.0.1:0"]).args(more);
        Self(ServerProcess::start(command))
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.0.url);
        let request = ureq::post(&url).config().http_status_as_error(false).build();
        let mut answer = request.content_type("application/json").send(body.to_string()).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert_eq!(answer.status(), 200, "{path} {body}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    fn get(&self, path: &str) -> String {
        let mut answer = ureq::get(format!("{}{path}", self.0.url)).call().unwrap();
        answer.body_mut().read_to_string().unwrap()
    }
}

/// The mean probabilities of the labels, and the label with the most votes, by the definition.
fn expected(row: &[&Prediction], labels: &[String]) -> (Vec<f64>, String) {
    let mean = |label: usize| row.iter().map(|p| p.probabilities[label]).sum::<f64>() / row.len() as f64;
    let means: Vec<f64> = (0..labels.len()).map(mean).collect();
    let votes = |label: &String| row.iter().filter(|p| p.likeliest.as_ref() == Some(label)).count();
    let vote = if votes(&labels[0]) > votes(&labels[1]) { 0 } else { 1 };
    (means, labels[vote].clone())
}

#[test]
fn a_served_ensemble_answers_as_the_evaluation() {
    for labels in [["0", "1"], ["rude dog", "happy dog"]] {
        let place = place(labels);
        let evaluation = evaluation(&place, "f32", &["--ensemble"]);
        let ensemble = "pack=runs/one,runs/two,runs/three";
        let server = Server::start(&place, &["--ensemble", ensemble, "--adapter", "one=runs/one"]);
        for path in ["/v1/models", "/v1/tasks", "/ml/v4/deployments?version=1"] {
            assert!(server.get(path).contains("\"pack\""), "{path}");
        }
        let rows = evaluation.arms[1].answers.predictions.len();
        assert_eq!(rows, 6);
        for row in 0..rows {
            let predictions: Vec<&Prediction> =
                evaluation.arms[1..].iter().map(|arm| &arm.answers.predictions[row]).collect();
            let (means, vote) = expected(&predictions, &evaluation.labels);
            let input = &predictions[0].input;
            let answer = server.post("/v1/classify", &json!({"model": "pack", "input": input}));
            for (i, label) in evaluation.labels.iter().enumerate() {
                let entry =
                    answer["labels"].as_array().unwrap().iter().find(|entry| entry["label"] == **label);
                assert_near(entry.unwrap()["probability"].as_f64().unwrap(), means[i], 1e-5);
            }
            assert_eq!(answer["vote"], json!(vote));
            let likeliest = &evaluation.labels[usize::from(means[1] > means[0])];
            assert_eq!(answer["mean_likelihood"], json!(likeliest));
            let of_members: Vec<_> = answer["members"].as_array().unwrap().iter().collect();
            for (member, prediction) in of_members.iter().zip(&predictions) {
                assert_eq!(member["label"], json!(prediction.likeliest));
            }
            // Constrained texts are the likeliest label too.
            let choices = json!(evaluation.labels);
            let prompt = format!("say {input} :");
            let body = json!({"model": "pack", "prompt": prompt, "temperature": 0, "guided_choice": choices});
            let answer = server.post("/v1/completions", &body);
            assert_eq!(answer["choices"][0]["text"], json!(likeliest));
            let parameters = json!({"decoding_method": "greedy", "max_new_tokens": 4});
            let body = json!({"input": input, "parameters": parameters});
            let answer = server.post("/ml/v1/deployments/pack/text/generation?version=1", &body);
            assert_eq!(answer["results"][0]["generated_text"], json!(likeliest));
        }
    }
}

#[test]
fn ensembles_that_cannot_be_served_are_refused_by_name() {
    let place = Place::new();
    let tune = |name: &str, set: &str| {
        let name = format!("name={name}");
        place
            .gneiss(["tune", "dogs.toml", "--set", &name, "--set", set, "--set", "train.max_steps=1"])
            .success();
    };
    tune("one", "train.seed=1");
    tune("two", "train.seed=2");
    tune("other", "data.verbalizer=say {{input}} or");
    tune("text", "data.task=generation");
    let serve = |more: &[&'static str]| [&["serve", "--model", "./none"], more].concat();
    for (more, parts) in [
        (&["--ensemble", "runs/one,runs/two"][..], &["--ensemble", "NAME=DIR,DIR,...", "no name"][..]),
        (&["--ensemble", "a=runs/one"], &["--ensemble a", "two adapters or more, found 1"]),
        (&["--ensemble", "a="], &["--ensemble a", "found none"]),
        (&["--ensemble", "a=runs/one,runs/none"], &["--ensemble a=runs/one,runs/none", "runs/none"]),
        (&["--ensemble", "a=runs/one,runs/one/adapter"], &["every adapter once"]),
        (&["--ensemble", "a b=runs/one,runs/two"], &["a b", "letters, digits"]),
        (&["--ensemble", "a=runs/one,runs/other"], &["runs/other", "say {{input}} or", "say {{input}} :"]),
        (&["--ensemble", "a=runs/one,runs/text"], &["runs/text", "classification", "generation"]),
        (&["--ensemble", "a=runs/one,runs/two", "--adapter", "a=runs/one"], &["a name of its own"]),
        (
            &["--ensemble", "a=runs/one,runs/two", "--ensemble", "a=runs/two,runs/one"],
            &["--ensemble a=runs/two,runs/one", "a name of its own"],
        ),
        // Nothing is wrong before the model.
        (&["--ensemble", "a=runs/one,runs/two", "--adapter", "one=runs/one"], &["./none"]),
    ] {
        place.refuses(serve(more), parts);
    }
    // Of another model: its prompts have another width.
    let mut config = place.json("runs/two/adapter/adapter_config.json");
    config["token_dim"] = json!(48);
    let values = Tensor::zeros((5, 48), candle_core::DType::F32, &Device::Cpu).unwrap();
    let weights = place.path("runs/two/adapter/adapter_model.safetensors");
    candle_core::safetensors::save(&[("prompt_embeddings", values)].into_iter().collect(), weights).unwrap();
    place.write("runs/two/adapter/adapter_config.json", &config.to_string());
    place.refuses(
        ["serve", "--model", "model", "--ensemble", "a=runs/one,runs/two", "--listen", "127.0.0.1:0"],
        &["runs/two"],
    );
}

//! `gneiss watsonx` as IBM's SDK sees it, and what is left of it after a kill.

use crate::clients::{KEY, Place, REQUIRED, browser, run, screenshots, start};
use crate::common::python::python_with;
use serde_json::Value;
use std::path::PathBuf;

const ALIAS: &str = "ibm/granite-13b-instruct-v2";
/// A profile by which a random model of 170 kB learns to answer with a label.
const PROFILE: [&str; 10] = [
    "--as", ALIAS, "--set", "prompt.num_virtual_tokens=8", "--set", "train.learning_rate=0.3", "--set",
    "train.accumulate_steps=1", "--store", "store",
];
const USED: [&str; 5] = ["--stand-in", "--used", "learning_rate=0.3", "--used", "accumulate_steps=1"];

fn python() -> Option<PathBuf> {
    python_with(&["ibm_watsonx_ai", "matplotlib", "IPython", "peft"], REQUIRED)
}

/// Reviews that a small model can tell apart.
fn write_rows(place: &Place) {
    let row = |i: usize| {
        let text = if i % 2 == 1 { "very good" } else { "bad and rude" };
        serde_json::json!({"input": format!("Comment: visit {i} was {text}.\nSatisfaction:\n"), "output": (i % 2).to_string()})
    };
    let rows: Vec<Value> = (0..48).map(row).collect();
    std::fs::write(place.path("train.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    std::fs::write(place.path("test.json"), serde_json::to_vec(&rows[..6]).unwrap()).unwrap();
}

/// Runs the notebook's steps against a server of these arguments, with those of the flow; what the server said.
fn flow(python: &std::path::Path, place: &Place, server: &[&str], client: &[&str]) -> String {
    let server = start(place, "watsonx", server);
    let (train, test) = (place.path("train.json"), place.path("test.json"));
    let files = ["--train", train.to_str().unwrap(), "--test", test.to_str().unwrap()];
    let args = ["--url", &server.url, "--base", ALIAS, "--least-accuracy", "0.5"];
    run(python, "watsonx_flow.py", &[&args[..], &files, &USED, client].concat());
    server.end()
}

#[test]
fn ibms_notebook_runs_and_its_scores_are_those_of_gneiss_eval() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    write_rows(&place);
    let answers = place.path("answers.json");
    let certificate = place.path("store/tls/certificate.pem");
    let client = [
        "--key",
        KEY,
        "--only",
        "tutorial",
        "--set",
        "num_epochs=25",
        "--answers",
        answers.to_str().unwrap(),
    ];
    let verify = ["--verify", certificate.to_str().unwrap()];
    let server = [&PROFILE[..], &["--api-key-file", "key"]].concat();
    flow(&python, &place, &server, &[&client[..], &verify].concat());
    let answers: Value = serde_json::from_slice(&std::fs::read(answers).unwrap()).unwrap();
    let training = format!("store/trainings/{}/run", answers["training"].as_str().unwrap());
    let config = format!("{training}/config.toml");
    // The SDK asks for 20 tokens if it is not told otherwise.
    let sets = ["--set", "data.test=test.json", "--set", "data.max_output_tokens=20"];
    let args = ["eval", &config, "--adapter", &training, "--out", "."];
    let evaluated = place.command(&[&args[..], &sets].concat()).output().unwrap();
    assert!(evaluated.status.success(), "{}", String::from_utf8_lossy(&evaluated.stderr));
    let evaluation: Value =
        serde_json::from_slice(&std::fs::read(place.path("evaluation.json")).unwrap()).unwrap();
    let arms = evaluation["arms"].as_array().unwrap();
    let tuned = arms.iter().find(|arm| arm["name"] != "base").unwrap();
    let generated = |prediction: &Value| prediction["generated"].as_str().unwrap().to_owned();
    let expected: Vec<String> =
        tuned["answers"]["predictions"].as_array().unwrap().iter().map(generated).collect();
    let found: Vec<&str> = answers["answers"]["tuned"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().trim())
        .collect();
    assert_eq!(found, expected);
    assert_eq!(
        answers["scores"]["tuned"]["accuracy"], tuned["answers"]["generated"]["accuracy"],
        "accuracy by the notebook and by gneiss eval"
    );
}

#[test]
fn clients_of_ibm_cloud_can_do_everything_around_the_notebook() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    write_rows(&place);
    let server = [&PROFILE[..], &["--api-key-file", "key"]].concat();
    flow(&python, &place, &server, &["--key", KEY, "--kind", "cloud"]);
}

/// The name stands for the second of two models.
#[test]
fn clients_of_cloud_pak_can_do_everything_around_the_notebook() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    write_rows(&place);
    std::fs::create_dir(place.path("second")).unwrap();
    for file in std::fs::read_dir(place.path("base")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), place.path("second").join(file.file_name())).unwrap();
    }
    let alias = format!("{ALIAS}=second");
    let server = [&["--model", "second", "--as", &alias][..], &PROFILE[2..]].concat();
    let said = flow(&python, &place, &server, &["--kind", "cpd"]);
    assert!(said.contains("serving    second: the base model"), "{said}");
    // A training whose data was refused has no run.
    let configs: Vec<String> = std::fs::read_dir(place.path("store/trainings"))
        .unwrap()
        .filter_map(|training| std::fs::read_to_string(training.unwrap().path().join("run/config.toml")).ok())
        .collect();
    assert!(
        !configs.is_empty() && configs.iter().all(|config| config.contains("id = \"second\"")),
        "{configs:?}"
    );
}

#[test]
fn the_notebook_runs_in_a_jupyter_kernel() {
    let packages = ["ibm_watsonx_ai", "matplotlib", "IPython", "nbclient", "ipykernel", "peft"];
    let Some(python) = python_with(&packages, REQUIRED) else { return };
    let place = Place::new(&python);
    write_rows(&place);
    let server = start(&place, "watsonx", &PROFILE);
    let (train, test) = (place.path("train.json"), place.path("test.json"));
    let files = ["--train", train.to_str().unwrap(), "--test", test.to_str().unwrap()];
    run(&python, "watsonx_jupyter.py", &[&["--url", &server.url, "--key", "none"][..], &files].concat());
    server.end();
}

#[test]
fn the_tutorial_can_be_done_in_a_browser() {
    let (Some(python), Some(browser)) = (python(), browser()) else { return };
    let place = Place::new(&python);
    write_rows(&place);
    let server = start(&place, "watsonx", &[&PROFILE[..], &["--api-key-file", "key"]].concat());
    let (train, shots) = (place.path("train.json"), screenshots("watsonx"));
    let args = [&server.url, "--key", KEY, "--train", train.to_str().unwrap(), "--shots", &shots];
    run(&browser, "watsonx_page.py", &args);
    server.end();
}

#[test]
fn what_no_client_of_watsonx_should_send_is_answered_and_survived() {
    let Some(python) = python_with(&["httpx", "peft"], REQUIRED) else { return };
    let place = Place::new(&python);
    let limits = [
        "--api-key-file", "key", "--store", "folder/store", "--max-read-seconds", "1", "--max-connections",
        "256", "--max-asset-bytes", "100000", "--max-body-bytes", "20000", "--max-records", "100",
    ];
    let server = start(&place, "watsonx", &limits);
    let (store, pid) = (place.path("folder/store"), server.pid());
    let args = ["--url", &server.url, "--key", KEY, "--pid", &pid, "--store", store.to_str().unwrap()];
    run(&python, "watsonx_hostile.py", &args);
    server.end();
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged() {
    let Some(python) = python_with(&["httpx", "peft"], REQUIRED) else { return };
    let place = Place::new(&python);
    let model = place.path("base");
    let args =
        ["--gneiss", env!("CARGO_BIN_EXE_gneiss"), "--model", model.to_str().unwrap(), "--rounds", "12"];
    let folder = place.path("");
    run(&python, "watsonx_kill.py", &[&args[..], &["--folder", folder.to_str().unwrap()]].concat());
}

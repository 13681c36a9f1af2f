//! Runs over files as people have them.

use super::*;
use gneiss::evaluate::Evaluation;

/// The examples that a run's state was made of.
fn fingerprint(place: &Place, run: &str) -> String {
    let bytes = std::fs::read(place.path(run).join("checkpoint.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let metadata = header["__metadata__"].as_object().unwrap().values().next().unwrap().as_str().unwrap();
    serde_json::from_str::<Value>(metadata).unwrap()["examples"].as_str().unwrap().to_owned()
}

/// Rows of [`reviews`] as (input, output).
fn rows(n: usize) -> Vec<(String, String)> {
    let text = reviews(n);
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    reader.records().map(|row| row.unwrap()).map(|row| (row[0].to_owned(), row[1].to_owned())).collect()
}

#[test]
fn a_run_is_the_same_whatever_its_files_are() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "name=csv"]).success();
    let expected = fingerprint(&place, "runs/csv");
    let numbers: String =
        rows(12).iter().map(|(a, b)| format!("{{\"input\": {a:?}, \"output\": {b}}}\n")).collect();
    place.write("lines.json", &numbers);
    let columns: (Vec<String>, Vec<String>) = rows(12).into_iter().unzip();
    place.write("columns.json", &json!({"input": columns.0, "output": columns.1}).to_string());
    let spaced: String = rows(12).iter().map(|(a, b)| format!("\"{a}\"; \"{b}\"; \r\n")).collect();
    place.write("excel.csv", &format!("sep=;\r\ninput; output;\r\n{spaced};;\r\n"));
    let chats: Vec<Value> = rows(12)
        .iter()
        .map(|(a, b)| json!({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}))
        .collect();
    place.write("chats.json", &Value::Array(chats).to_string());
    let labels: String = rows(12).iter().map(|(a, b)| format!("{a}\t\u{feff}{b}\u{a0}\n")).collect();
    place.write("labels.tsv", &format!("input\toutput\n{labels}"));
    for file in ["lines.json", "columns.json", "excel.csv", "chats.json", "labels.tsv"] {
        let (name, train) = (format!("name={file}"), format!("data.train={file}"));
        let tune = ["tune", "dogs.toml", "--set", "train.num_epochs=1", "--set", &name, "--set", &train];
        let (_, stderr) = texts(&place.gneiss(tune).success());
        assert_eq!(fingerprint(&place, &format!("runs/{file}")), expected, "{file}");
        let said = if file == "labels.tsv" {
            "warning    data.train: 12 of 12 labels"
        } else {
            "note       data.train: "
        };
        assert!(stderr.contains(said), "{file}: {stderr}");
    }
    // The prompt's folder has the labels as they are trained.
    assert_eq!(place.json("runs/labels.tsv/adapter/task.json")["labels"], json!(["0", "1"]));
}

#[test]
fn labels_are_scored_in_the_form_that_they_are_trained_in() {
    let place = Place::new();
    let test: String = rows(6).iter().map(|(a, b)| format!("{a},{b}\u{200b}\n")).collect();
    place.write("test.csv", &format!("input,output\n{test}"));
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=200"]).success());
    assert!(
        stderr.contains("warning    data.test: 6 of 6 labels") && stderr.contains("\\u{200b}"),
        "{stderr}"
    );
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--json"];
    let (stdout, stderr) = texts(&place.gneiss(eval).success());
    assert!(stderr.contains("warning    data.test: 6 of 6 labels"), "{stderr}");
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result.labels, ["0", "1"]);
    let tuned = result.arms[1].answers.generated.as_ref().unwrap();
    assert_eq!((tuned.correct, tuned.total), (6, 6));
}

#[test]
fn free_text_is_trained_as_it_is_written() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "name=plain", "--set", "data.task=generation"]).success();
    let spaced: String = rows(12).iter().map(|(a, b)| format!("{a},{b}\u{200b}\n")).collect();
    place.write("train.csv", &format!("input,output\n{spaced}"));
    let tune = ["tune", "dogs.toml", "--set", "data.task=generation"];
    let (_, stderr) = texts(&place.gneiss(tune).success());
    assert!(!stderr.contains("labels"), "{stderr}");
    assert_ne!(fingerprint(&place, "runs/dogs"), fingerprint(&place, "runs/plain"));
}

#[test]
fn contradictions_are_told_before_the_run() {
    let place = Place::new();
    place.write("train.csv", "input,output\nshiny dog,1\nShiny  dog,0\nlate dog,0\nshiny dog,1\n");
    let said = "\"shiny dog\" is labelled \"0\" in line 3 and \"1\" in lines 2, 5";
    let (_, stderr) = texts(&place.gneiss(["tune", "dogs.toml"]).success());
    assert!(stderr.contains("warning    data.train: 3 of 4 rows") && stderr.contains(said), "{stderr}");
    let (stdout, stderr) = texts(&place.gneiss(["inspect", "train.csv", "--json"]).success());
    assert!(stderr.contains("warning    3 of 4 rows") && stderr.contains(said), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert!(report["warnings"][0].as_str().unwrap().contains(said), "{report}");
    let (_, stderr) = texts(&place.gneiss(["inspect", "dogs.toml"]).success());
    assert!(stderr.contains("warning    data.train: 3 of 4 rows"), "{stderr}");
}

#[test]
fn inspect_shows_labels_that_can_be_told_apart() {
    let place = Place::new();
    let family = "\u{1f468}\u{200d}\u{1f469}";
    let text = format!("input,output\na,yes\nb,yes\u{a0}\nc,yes \nd,{family}\ne,\u{1f468}\u{1f469}\n");
    place.write("odd.csv", &text);
    let (stdout, stderr) = texts(&place.gneiss(["inspect", "odd.csv"]).success());
    assert!(stdout.contains("     3 ( 60.0 %)  yes\n") && stdout.contains("\\u{200d}"), "{stdout}");
    assert!(stderr.contains("\"yes\\u{a0}\" is \"yes\" (line 3)"), "{stderr}");
    place.write("odd.csv", "input,output\na,1\nb,null\nc,\n");
    place.refuses(["inspect", "odd.csv"], &["odd.csv: line 4: field `output`"]);
}

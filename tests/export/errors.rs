//! What is refused, by the command line: exit code 2, a message that says what to do, and nothing left behind.

use crate::bake::SETUPS;
use crate::fixtures::*;
use assert_cmd::Command;
use std::path::Path;

struct Place {
    here: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let here = tempfile::tempdir().unwrap();
        let base_folder = here.path().join("base");
        std::fs::create_dir(&base_folder).unwrap();
        base(&base_folder, &SETUPS[1]);
        for name in ["a", "b"] {
            adapter(&here.path().join(name), &base_folder, &prompt(3, 40), Some("say {{input}}"));
        }
        Self { here }
    }

    fn path(&self) -> &Path {
        self.here.path()
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::cargo_bin("gneiss")
            .unwrap()
            .arg("export")
            .args(args)
            .current_dir(self.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn refuses(&self, args: &[&str], expected: &str) {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: expected {expected:?} in {stderr:?}");
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn bad_requests_say_what_to_do() {
    let place = Place::new();
    std::fs::create_dir(place.path().join("full")).unwrap();
    std::fs::write(place.path().join("full/x"), "").unwrap();
    std::fs::write(place.path().join("there.gguf"), "").unwrap();
    adapter(&place.path().join("wide"), &tests("golden/llama_bias"), &prompt(3, 42), None);
    let before = place.names();
    for (args, expected) in [
        (&["--bake", "--adapter", "x=a", "--adapter", "x=b", "--out", "o"][..], "found \"x\" twice"),
        (&["--bake", "--adapter", "x y=a", "--out", "o"], "hint: --adapter NAME=a"),
        (&["--bake", "--adapter", "a", "--adapter", "a", "--out", "o"], "expected every adapter once"),
        (&["--bake", "--adapter", "a", "--out", "full"], "found one with files in it"),
        (&["--bake", "--adapter", "a", "--format", "gguf", "--out", "o"], "a path that ends in .gguf"),
        (&["--bake", "--adapter", "a", "--format", "gguf", "--out", "there.gguf"], "no such file yet"),
        (&["--bake", "--adapter", "wide", "--model", "base", "--out", "o"], "expected a prompt of width 40"),
        (&["--bake", "--adapter", "a", "--adapter", "wide", "--out", "o"], "expected prompts of one model"),
        (
            &["--bake", "--adapter", "a", "--type", "q8_0", "--out", "o"],
            "expected f32, f16 or bf16 for safetensors",
        ),
        (&["--bake", "--adapter", "a", "--type", "q4", "--out", "o"], "expected f32, f16, bf16 or q8_0"),
        (&["--bake", "--adapter", "a", "--text", "x", "--out", "o"], "expected --format prompt-embeds"),
        (&["--bake", "--adapter", "a", "--format", "prompt-embeds", "--out", "o"], "expected no --bake"),
        (&["--format", "gguf", "--adapter", "a", "--out", "o.gguf"], "expected --bake"),
        (&["--adapter", "a", "--out", "o"], "--bake"),
        (&["--format", "prompt-embeds", "--adapter", "a", "--adapter", "b", "--out", "o.pt"], "expected one"),
        (&["--format", "prompt-embeds", "--adapter", "a", "--type", "q8_0", "--out", "o.pt"], "found q8_0"),
        (
            &["--format", "prompt-embeds", "--adapter", "wide", "--input", "x", "--out", "o.pt"],
            "hint: --text",
        ),
        (&["--bake", "--adapter", "nothing", "--out", "o"], "expected an adapter folder"),
    ] {
        place.refuses(args, expected);
    }
    assert_eq!(place.names(), before, "something was left");
}

#[test]
fn a_prompt_is_not_baked_twice() {
    let place = Place::new();
    let (code, stdout, stderr) = place.run(&["--bake", "--adapter", "dogs=a", "--out", "once"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "once\n"), "{stderr}");
    assert!(stderr.contains("dogs: 3 tokens, ids 131 to 133"), "{stderr}");
    place.refuses(
        &["--bake", "--adapter", "dogs=b", "--model", "once", "--out", "twice"],
        "without <|dogs:0|>, found it there",
    );
    // Another name is another matter.
    let (code, stdout, stderr) =
        place.run(&["--bake", "--json", "--adapter", "cats=b", "--model", "once", "--out", "twice"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("note: cats was tuned on"), "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&json["vocab_size"], &json["prompts"]["cats"]["token_ids"]),
        (&137.into(), &serde_json::json!([134, 136]))
    );
    assert_eq!(json["embedding_type"], "f32");
}

/// A base whose tokenizer knows tokens that its embedding has no rows for.
#[test]
fn tokens_without_rows_are_refused() {
    let place = Place::new();
    let json = tokenizer_json(140, false).to_string();
    std::fs::write(place.path().join("base/tokenizer.json"), json).unwrap();
    place.refuses(&["--bake", "--adapter", "a", "--out", "o"], "expected an embedding of 140 rows");
}

/// By which a prompt's tokens would be text in every engine.
#[test]
fn a_tokenizer_that_splits_special_tokens_is_refused() {
    let place = Place::new();
    let config = place.path().join("base/tokenizer_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["split_special_tokens"] = true.into();
    std::fs::write(config, json.to_string()).unwrap();
    place.refuses(
        &["--bake", "--adapter", "a", "--out", "o"],
        "`split_special_tokens` of tokenizer_config.json: expected false, found true",
    );
}

//! `prompt.position = "after_head"` from the configuration to the answers.

use super::*;

/// The configuration of the tests with the prompt after `say dog :`.
fn place() -> Place {
    let place = Place::new();
    let text = CONFIG
        .replace("[prompt]\n", "[prompt]\nposition = \"after_head\"\n")
        .replace("\"say {{input}} :\"", "\"say dog : {{input}} :\"")
        .replace("[train]\n", "[train]\nschedule = \"constant\"\nwarmup_ratio = 0.0\n");
    place.write("dogs.toml", &text);
    place
}

#[test]
fn prompt_after_a_head_is_tuned_and_used() {
    let place = place();
    let (stdout, _) = texts(&place.gneiss(["inspect", "dogs.toml"]).success());
    assert!(stdout.contains("position         after 3 tokens, say·dog·:"), "{stdout}");
    place.gneiss(["tune", "dogs.toml"]).success();
    assert_eq!(place.json("runs/dogs/adapter/adapter_config.json")["peft_type"], "GNEISS_PROMPT_TUNING");
    assert_eq!(
        place.json("runs/dogs/adapter/task.json")["before"],
        json!({"text": "say dog :", "token_ids": [5, 8, 7]})
    );
    let steps = std::fs::read_to_string(place.path("runs/dogs/metrics.jsonl")).unwrap();
    let losses: Vec<f64> = steps
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64())
        .collect();
    assert!(losses.last().unwrap() < &losses[0], "{losses:?}");

    // A run that is continued ends with the same prompt.
    place.gneiss(["tune", "dogs.toml", "--set", "name=cut", "--set", "train.num_epochs=1"]).success();
    place.gneiss(["tune", "--resume", "runs/cut", "--set", "train.num_epochs=3"]).success();
    let weights = |run: &str| {
        std::fs::read(place.path(&format!("runs/{run}/adapter/adapter_model.safetensors"))).unwrap()
    };
    assert!(weights("dogs") == weights("cut"));

    let (stdout, _) =
        texts(&place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs", "--json"]).success());
    let evaluation: Value = serde_json::from_str(&stdout).unwrap();
    let answer = &evaluation["arms"][1]["answers"]["predictions"][0];
    let (input, generated) = (answer["input"].as_str().unwrap(), answer["generated"].as_str().unwrap());
    let text = format!("say dog : {input} :");
    let args = ["generate", "--model", "model", "--adapter", "runs/dogs", "--max-new-tokens", "2", &text];
    assert_eq!(texts(&place.gneiss(args).success()).0.trim(), generated);

    let (stdout, _) = texts(&place.gneiss(["inspect", "runs/dogs/adapter", "--model", "model"]).success());
    assert!(stdout.contains("after \"say dog :\" (3 tokens)"), "{stdout}");
    let (stdout, _) = texts(&place.gneiss(["inspect", "runs/dogs/adapter", "--json"]).success());
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["before"]["text"], "say dog :");

    // A teacher reads its text before the head, and the run's inputs as they are.
    let sets = ["name=taught", "data.teacher_text=word7 word8", "train.num_epochs=1"];
    place
        .gneiss(["tune", "dogs.toml"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set])))
        .success();
    assert_eq!(place.json("runs/taught/adapter/task.json")["before"]["text"], "say dog :");

    // Its rows may start another prompt, which stands where its own configuration says.
    let sets =
        ["name=start", "prompt.position=start", "prompt.init_method=file", "prompt.init_file=runs/dogs"];
    place
        .gneiss(["tune", "dogs.toml"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set])))
        .success();
    assert_eq!(place.json("runs/start/adapter/adapter_config.json")["peft_type"], "PROMPT_TUNING");
}

#[test]
fn what_a_prompt_after_a_head_can_not_do_is_refused() {
    let place = place();
    let tune = |set: &'static str| ["tune", "dogs.toml", "--set", set];
    let key = "prompt.position";
    place.refuses(
        tune("prompt.kind=prefix"),
        &[key, "expected \"start\" with kind = \"prefix\"", "after_head"],
    );
    place.refuses(tune("prompt.position=after"), &[key, "after_head", "`after`"]);
    place.refuses(
        tune("data.verbalizer={{input}} :"),
        &[key, "data.verbalizer", "found \"{{input}} :\"", "system turn"],
    );
    assert!(!place.path("runs").exists());
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=1"]).success();
    let generate = ["generate", "--model", "model", "--adapter", "runs/dogs"];
    for text in ["say shiny dog :", "dog", "say dog :"] {
        place.refuses(
            generate.into_iter().chain([text]),
            &["TEXT", "begins with \"say dog :\"", "soft prompt"],
        );
    }
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--set", "data.verbalizer=say {{input}} :"];
    place.refuses(eval, &["data.verbalizer", "line 2", "begins with \"say dog :\""]);
    let embeds = ["export", "--adapter", "runs/dogs", "--format", "prompt-embeds", "--out", "e.pt"];
    place.refuses(embeds, &["--text: required", "after_head"]);
    let config = std::fs::read_to_string(place.path("runs/dogs/config.toml")).unwrap();
    place.write("runs/dogs/config.toml", &config.replace("say dog : {{input}}", "say dog {{input}}"));
    place.refuses(["tune", "--resume", "runs/dogs"], &[key, "[5, 8, 7]", "[5, 8]", "start a new run"]);
}

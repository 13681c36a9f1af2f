//! Adapters of every kind that PEFT writes, by the commands: tasks after a colon, keys and values.

use super::*;
use std::fs;

/// A place with an adapter that PEFT wrote under `tests/golden/peft_kinds/granite`, as the folder `adapter`.
fn place_with(kind: &str) -> Place {
    let place = Place::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_kinds/granite").join(kind);
    fs::create_dir(place.path("adapter")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden.join(name), place.path("adapter").join(name)).unwrap();
    }
    place
}

fn json(assert: &Assert) -> Value {
    serde_json::from_str(&texts(assert).0).unwrap()
}

fn generate(form: &str) -> [&str; 6] {
    ["generate", "--model", "model", "--adapter", form, "say shiny dog :"]
}

fn export<'a>(form: &'a str, out: &'a str) -> [&'a str; 9] {
    ["export", "--adapter", form, "--format", "prompt-embeds", "--model", "model", "--out", out]
}

/// The adapter is read before the model, which is not there.
fn serve(named: &str) -> [&str; 5] {
    ["serve", "--model", "./none", "--adapter", named]
}

/// Tunes one step from the adapter that `init_file`, `prompt.init_file=...`, names.
fn tune(init_file: &str) -> [&str; 10] {
    [
        "tune", "dogs.toml", "--set", "prompt.init_method=file", "--set", init_file, "--set",
        "prompt.num_virtual_tokens=0", "--set", "train.max_steps=1",
    ]
}

#[test]
fn every_command_takes_a_task_after_a_colon_and_refuses_others() {
    let place = place_with("multitask");
    place.gneiss(generate("adapter:1")).success();

    let eval =
        ["eval", "dogs.toml", "--adapter", "adapter:0", "--adapter", "adapter:2", "--out", "eval", "--json"];
    let result = json(&place.gneiss(eval).success());
    let arm = |i: usize| (result["arms"][i]["name"].clone(), result["arms"][i]["adapter"].clone());
    assert_eq!(arm(1), (json!("adapter-0"), json!("adapter:0")));
    assert_eq!(arm(2), (json!("adapter-2"), json!("adapter:2")));

    let report = json(&place.gneiss(["inspect", "adapter:1", "--model", "model", "--json"]).success());
    assert_eq!(
        (&report["task"], &report["kind"], &report["shape"]),
        (&json!(1), &json!("embeddings"), &json!([4, 40]))
    );
    let (stdout, _) = texts(&place.gneiss(["inspect", "adapter:1", "--model", "model"]).success());
    assert!(
        stdout.contains("MULTITASK_PROMPT_TUNING, CAUSAL_LM") && stdout.contains("1 of 0 to 2"),
        "{stdout}"
    );

    for form in ["dogs=adapter:0", "adapter:1"] {
        place.gneiss(export(form, &form.replace([':', '='], "-"))).success();
    }
    let file = |name| fs::read(place.path(name)).unwrap();
    assert_ne!(file("dogs-adapter-0"), file("adapter-1"));
    let bake = ["export", "--adapter", "adapter:1", "--bake", "--model", "model", "--out", "baked"];
    place.gneiss(bake).success();
    assert!(fs::read_to_string(place.path("baked/prompts.json")).unwrap().contains("<|adapter-1:0|>"));

    place.gneiss(tune("prompt.init_file=adapter:2")).success();
    place.refuses(serve("dogs=adapter:1"), &["./none"]);

    for (form, part) in [
        (
            "adapter",
            "holds the prompts of 3 tasks, found none; hint: name one from 0 to 2 after a colon, such as DIR:0",
        ),
        ("adapter:3", "adapter: expected a task from 0 to 2 of the adapter's 3, found 3"),
    ] {
        place.refuses(generate(form), &[part]);
        place.refuses(["eval", "dogs.toml", "--adapter", form], &[part]);
        place.refuses(["inspect", form], &[part]);
        place.refuses(export(form, "no.pt"), &[part]);
        place.refuses(serve(&format!("dogs={form}")), &[part]);
        place.refuses(tune(&format!("prompt.init_file={form}")), &[part]);
    }
}

#[test]
fn inspect_shows_the_layers_of_keys_and_values() {
    let place = place_with("cartridge");
    let report = json(&place.gneiss(["inspect", "adapter", "--model", "model", "--json"]).success());
    assert_eq!((&report["kind"], &report["shape"]), (&json!("prefix"), &json!([4, 48])));
    assert_eq!((&report["norms"], &report["tokens"]), (&Value::Null, &json!([])));
    let rows = Adapter::read(&place.path("adapter")).unwrap().prompt.values().to_vec2::<f32>().unwrap();
    for (layer, found) in report["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(found["layer"], layer);
        for (kind, name) in ["keys", "values"].into_iter().enumerate() {
            // One head of 8 columns.
            let column = (2 * layer + kind) * 8;
            let norm = |row: &Vec<f32>| {
                row[column..column + 8].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
            };
            let norms: Vec<f64> = rows.iter().map(norm).collect();
            let close = |key: &str, expected: f64| {
                let found = found[name][key].as_f64().unwrap();
                assert!((found - expected).abs() < 1e-5, "{name}.{key}: {found} against {expected}");
            };
            close("mean", norms.iter().sum::<f64>() / 4.0);
            close("min", norms.iter().copied().fold(f64::MAX, f64::min));
            close("max", norms.iter().copied().fold(0.0, f64::max));
        }
    }
    assert_eq!(report["layers"].as_array().unwrap().len(), 3);
    let (stdout, _) = texts(&place.gneiss(["inspect", "adapter"]).success());
    for part in [
        "CARTRIDGE, CAUSAL_LM",
        "keys and values of 4 virtual tokens in 3 layers, 1 heads",
        "the first 1 virtual",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
}

/// The network of a reparameterization is trained too: its values and their two moments are in the plan.
#[test]
fn inspect_plans_the_network_of_a_reparameterization() {
    let place = Place::new();
    let prompt_bytes = |keys: &str| {
        place.write("kind.toml", &CONFIG.replace("[prompt]\n", &format!("[prompt]\n{keys}\n")));
        let report = json(&place.gneiss(["inspect", "kind.toml", "--json"]).success());
        report["memory"][0]["prompt"].as_u64().unwrap()
    };
    // Two matrices of 40 x 40, their biases, and a norm's weight and bias; f32.
    let network = 2 * 40 * 40 + 4 * 40;
    let added = prompt_bytes("reparameterization = \"residual\"") - prompt_bytes("");
    assert_eq!(added, 3 * 4 * network);
    place.write("kind.toml", &CONFIG.replace("[prompt]\n", "[prompt]\nfrozen_tokens = 5\n"));
    place.refuses(["inspect", "kind.toml"], &["frozen_tokens", "5"]);
}

#[test]
fn keys_and_values_are_not_exported_with_the_reason() {
    let place = place_with("prefix");
    let parts = [
        "--adapter adapter: expected a prompt of embeddings, found keys and values (PREFIX_TUNING)",
        "`gneiss serve`",
    ];
    for kind in [&["--bake"][..], &["--format", "prompt-embeds"]] {
        let export = ["export", "--adapter", "adapter", "--model", "model", "--out", "out"];
        place.refuses(export.into_iter().chain(kind.iter().copied()), &parts);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_prefix_of_another_model_is_refused() {
    let place = place_with("prefix");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_bias");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
    }
    let part = "num_attention_heads: expected 2, the key-value heads of model, found 1; it was tuned on tests/golden/granite";
    place.refuses(["generate", "--model", "model", "--adapter", "adapter", "say"], &[part]);
    place.refuses(["eval", "dogs.toml", "--adapter", "adapter"], &[part]);
    place.refuses(["inspect", "adapter", "--model", "model"], &[part]);
}

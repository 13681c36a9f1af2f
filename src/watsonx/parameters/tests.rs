use super::*;
use serde_json::json;

fn read(body: Value, profile: &[&str]) -> std::result::Result<TuningParameters, ApiError> {
    let profile = TuningProfile::new(profile.iter().map(|&set| set.to_owned()).collect()).unwrap();
    let body = json!({"prompt_tuning": body});
    let (fields, ignored) = Fields::checked(body.as_object().unwrap(), &TRAINING)?;
    assert!(ignored.names().is_empty());
    let fields = fields.object("prompt_tuning", "prompt_tuning.")?.unwrap();
    TuningParameters::read(&fields, "ibm/granite", &profile)
}

/// What IBM's tutorial sends.
fn tutorial() -> Value {
    json!({
        "base_model": {"model_id": "ibm/granite"}, "task_id": "classification", "tuning_type": "prompt_tuning",
        "accumulate_steps": 16, "batch_size": 8, "learning_rate": 0.001, "num_epochs": 12, "max_input_tokens": 128,
        "max_output_tokens": 2, "init_method": "text", "init_text": "Say 1 or 0.",
        "verbalizer": "classify {0, 1} {{input}}",
    })
}

#[test]
fn parameters_map_to_keys_one_to_one() {
    let TuningParameters { config, prompt_tuning, warnings } = read(tutorial(), &[]).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(config.data.task, Task::Classification);
    assert_eq!((config.data.max_input_tokens, config.data.max_output_tokens), (128, 2));
    assert_eq!(config.data.verbalizer, "classify {0, 1} {{input}}");
    let train = &config.train;
    assert_eq!((train.accumulate_steps, train.batch_size, train.num_epochs), (16, 8, 12));
    assert_eq!((train.learning_rate, train.keep), (0.001, Keep::Last));
    assert_eq!(
        (config.prompt.init_method, config.prompt.init_text.as_str()),
        (InitMethod::Text, "Say 1 or 0.")
    );
    let mut expected = tutorial();
    expected["num_virtual_tokens"] = 100.into();
    assert_eq!(Value::Object(prompt_tuning), expected, "the answer repeats what was asked for");
}

#[test]
fn absent_parameters_have_watsonxs_defaults() {
    let TuningParameters { config, prompt_tuning, .. } = read(json!({}), &[]).unwrap();
    assert_eq!(config.data.task, Task::Generation);
    let expected = json!({
        "base_model": {"model_id": "ibm/granite"}, "task_id": "generation", "tuning_type": "prompt_tuning",
        "accumulate_steps": 16, "batch_size": 16, "learning_rate": 0.3, "num_epochs": 20, "max_input_tokens": 256,
        "max_output_tokens": 128, "init_method": "random", "verbalizer": "Input: {{input}} Output:",
        "num_virtual_tokens": 100,
    });
    assert_eq!(Value::Object(prompt_tuning), expected);
}

#[test]
fn profile_wins_and_is_told() {
    let sets = ["train.learning_rate=0.02", "prompt.num_virtual_tokens=20", "train.batch_size=8"];
    let TuningParameters { config, prompt_tuning, warnings } = read(tutorial(), &sets).unwrap();
    assert_eq!((config.train.learning_rate, config.prompt.num_virtual_tokens), (0.02, 20));
    assert_eq!(prompt_tuning["learning_rate"], 0.02);
    assert_eq!(prompt_tuning["num_virtual_tokens"], 20);
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    assert!(
        warning.contains("`learning_rate`: 0.001 was asked for") && warning.contains("uses 0.02"),
        "{warning}"
    );
    for (set, word) in [
        ("model.id=x", "model.id"),
        ("runs=x", "runs"),
        ("train.nothing=1", "nothing"),
        ("data.train=x", "data.train"),
    ] {
        let error = TuningProfile::new(vec![set.to_owned()]).map(drop).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    for (key, value, words) in [
        ("tuning_type", json!("fine_tuning"), "expected \"prompt_tuning\""),
        ("batch_size", json!(0), "`prompt_tuning.batch_size`: expected a whole number"),
        ("num_epochs", json!("12"), "found \"12\""),
        ("learning_rate", json!(-1), "expected a number over 0"),
        ("verbalizer", json!("no place"), "{{input}}"),
        ("init_method", json!("preset"), "expected \"random\" or \"text\""),
        ("init_text", json!(null), "`prompt_tuning.init_text`: expected a text"),
        ("batchsize", json!(3), "did you mean `prompt_tuning.batch_size`"),
    ] {
        let mut body = tutorial();
        body[key] = value;
        let message = read(body, &[]).map(drop).unwrap_err().message;
        assert!(message.contains(words), "{key}: {words} is not in {message}");
    }
    let mut unused = tutorial();
    unused["init_method"] = "random".into();
    let warnings = read(unused, &[]).unwrap().warnings;
    assert!(warnings[0].contains("`init_text`"), "{warnings:?}");
}

#[test]
fn profile_of_a_file_is_overridden_by_sets() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let profile = |text: &str| {
        std::fs::write(file.path(), text).unwrap();
        TuningProfile::read(file.path())
    };
    let sets = vec!["train.learning_rate=0.3".to_owned()];
    let text = "[watsonx.train]\nlearning_rate = 0.01\naccumulate_steps = 1\n[watsonx.prompt]\ninit_method = \"vocab\"\n";
    let profile_with_sets = profile(text).unwrap().with("--set", sets).unwrap();
    let config = profile_with_sets.apply(&defaults()).unwrap();
    assert_eq!((config.train.learning_rate, config.train.accumulate_steps), (0.3, 1));
    assert_eq!(config.prompt.init_method, InitMethod::Vocab);
    for (text, words) in [
        ("", "[watsonx]"),
        ("watsonx = 1", "[watsonx]"),
        ("[watsonx.train]\n[train]\nlearning_rate = 1", "found train"),
        ("[watsonx.train]\nlearning_rat = 1", "learning_rate"),
        ("[watsonx.train]\nlearning_rate = \"fast\"", "learning_rate"),
        ("[watsonx.model]\nid = \"x\"", "model.id"),
        ("[watsonx", "line 1"),
    ] {
        let message = profile(text).unwrap_err().to_string();
        assert!(message.contains(words), "{words} is not in {message}");
        assert!(message.contains(&file.path().display().to_string()), "{message}");
    }
    let small = TuningProfile::read(Path::new("configs/watsonx/small-model.toml")).unwrap();
    let fields = json!({"base_model": {"model_id": "m"}, "init_method": "text", "init_text": "t"});
    let used = TuningParameters::read(&Fields::new(fields.as_object().unwrap()), "m", &small).unwrap();
    assert_eq!((used.config.prompt.num_virtual_tokens, used.config.train.learning_rate), (0, 0.01));
}

//! Prompts that stand after a text: the folder says so, and PEFT refuses it.

use super::*;
use gneiss::config::Task;
use gneiss::data::InputHead;
use gneiss::prompt::peft::{PeftType, PromptTask};

fn after_head() -> Adapter {
    let before = InputHead { text: "be kind\n".into(), token_ids: vec![7, 8] };
    let start = adapter();
    let task = PromptTask {
        task: Task::Generation,
        verbalizer: "be kind\nsay {{input}}".into(),
        labels: Vec::new(),
        before: Some(before),
        hard_prompt: String::new(),
        max_output_tokens: 2,
        examples: Vec::new(),
    };
    Adapter {
        prompt: start.prompt.after(&[7, 8]).unwrap(),
        config: AdapterConfig { peft_type: PeftType::GneissPromptTuning, ..start.config },
        task: Some(task),
    }
}

fn written(adapter: &Adapter) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = adapter.task.as_ref().and_then(|task| Some(task.before.as_ref()?.text.clone()));
    adapter.write(folder.path(), &ModelCard { before: text, ..ModelCard::default() }).unwrap();
    folder
}

#[test]
fn position_reads_back() {
    let folder = written(&after_head());
    let read = Adapter::read(folder.path()).unwrap();
    assert_eq!(read.prompt.before(), [7, 8]);
    assert_eq!(
        read.prompt.values().to_vec2::<f32>().unwrap(),
        adapter().prompt.values().to_vec2::<f32>().unwrap()
    );
    assert_eq!((&read.task, &read.config), (&after_head().task, &after_head().config));
    assert_eq!(
        json_of(&folder.path().join("task.json"))["before"],
        json!({"text": "be kind\n", "token_ids": [7, 8]})
    );
    let card = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
    for part in ["## Position", "be kind\n", "PEFT can't use this prompt", "GNEISS_PROMPT_TUNING", "--bake"] {
        assert!(card.contains(part), "{part} is not in {card}");
    }
    assert!(!card.contains("PeftModel") && !card.contains("library_name"), "{card}");
}

/// The place of the virtual tokens may not get lost: the three parts of an adapter must agree.
#[test]
fn position_that_the_files_disagree_about_is_refused() {
    let folder = written(&after_head());
    let config = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("GNEISS_PROMPT_TUNING", "PROMPT_TUNING")).unwrap();
    assert!(problem(folder.path()).contains("expected GNEISS_PROMPT_TUNING"));
    std::fs::write(&config, &text).unwrap();
    let task = folder.path().join("task.json");
    let whole = json_of(&task);
    for (change, words) in [
        (json!(null), "expected `before` in task.json"),
        (json!({"text": "be kind\n", "token_ids": []}), "at least one token"),
        (json!({"text": "be unkind\n", "token_ids": [7]}), "before.text"),
    ] {
        let mut other = whole.clone();
        other["before"] = change;
        std::fs::write(&task, other.to_string()).unwrap();
        assert!(problem(folder.path()).contains(words), "{words}: {}", problem(folder.path()));
    }
    std::fs::remove_file(&task).unwrap();
    assert!(problem(folder.path()).contains("expected `before` in task.json"));

    let (good, empty) = (after_head(), tempfile::tempdir().unwrap());
    for (bad, words) in [
        (Adapter { prompt: adapter().prompt, ..good.clone() }, "found one after []"),
        (Adapter { config: adapter().config, ..good.clone() }, "GNEISS_PROMPT_TUNING"),
        (Adapter { task: None, ..good }, "expected a prompt after the tokens []"),
    ] {
        let message = bad.write(empty.path(), &ModelCard::default()).unwrap_err().to_string();
        assert!(message.contains(words), "{words}: {message}");
    }
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn peft_refuses_a_prompt_that_is_not_at_the_start() {
    let Some(python) = crate::common::python::python_with(&["peft"], "GNEISS_REQUIRE_PEFT") else { return };
    let folder = written(&after_head());
    let load = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])";
    let output = std::process::Command::new(python).args(["-c", load]).arg(folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("GNEISS_PROMPT_TUNING"), "{stderr}");
}

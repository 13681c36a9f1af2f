//! Adapters from a hub.

use super::*;
use gneiss::prompt::peft::{Adapter, Place};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// What PEFT saved, as a repository holds it.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_adapter");
    [CONFIG, TENSORS].map(|name| (name, fs::read(golden.join(name)).unwrap())).to_vec()
}

fn find(client: &Client, argument: &str) -> Result<Place> {
    Place::find(Path::new(argument), &client.options)
}

/// Problem and hint of the error that has to come.
fn refusal(client: &Client, argument: &str) -> (String, String) {
    match find(client, argument) {
        Err(Error::Hub { repo, problem, hint }) => {
            assert!(repo.starts_with(REPO), "{repo}");
            (problem, hint)
        }
        other => panic!("expected an error of the hub, got {other:?}"),
    }
}

#[test]
fn an_adapter_is_downloaded_once() {
    let hub = Hub::serve(&files());
    let client = Client::of(&hub);
    let place = find(&client, REPO).unwrap();
    assert_eq!(place.folder, client.repo().join("snapshots").join(COMMIT));
    assert_eq!((place.run, place.title), (None, PathBuf::from(REPO)));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_adapter");
    let rows = |folder: &Path| Adapter::read(folder).unwrap().prompt.values().to_vec2::<f32>().unwrap();
    assert_eq!(rows(&place.folder), rows(&golden));
    let first = hub.requests();
    assert_eq!(first[0], format!("HEAD /org/name/resolve/main/{CONFIG}"));
    assert!(first.contains(&format!("GET /org/name/resolve/{COMMIT}/{TENSORS}")), "{first:?}");
    assert!(!first.iter().any(|request| request.contains("model.safetensors") && !request.contains(TENSORS)));

    // Which commit `main` is, and nothing else; nothing at all for the commit itself, and offline.
    assert_eq!(find(&client, REPO).unwrap().folder, place.folder);
    assert_eq!(hub.requests(), [format!("HEAD /org/name/resolve/main/{CONFIG}")]);
    let named = format!("{REPO}@{COMMIT}");
    let of_commit = find(&client, &named).unwrap();
    assert_eq!((of_commit.folder, of_commit.title), (place.folder.clone(), PathBuf::from(named)));
    let client = client.offline();
    assert_eq!(find(&client, REPO).unwrap().folder, place.folder);
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn what_a_prompt_was_tuned_for_comes_with_it() {
    let task = br#"{"task": "generation", "verbalizer": "{{input}}", "max_output_tokens": 2}"#;
    let hub = Hub::serve(&[files(), vec![("task.json", task.to_vec())]].concat());
    let client = Client::of(&hub);
    let place = find(&client, REPO).unwrap();
    assert_eq!(Adapter::read(&place.folder).unwrap().task.unwrap().max_output_tokens, 2);
}

#[test]
fn a_repository_without_an_adapter_is_told_from_one() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    let (problem, hint) = refusal(&client, REPO);
    assert_in(&problem, &["holds no adapter_config.json"]);
    assert_in(&hint, &["give its path"]);
    // `inspect` asks so: a model is none, and no error.
    assert_eq!(Place::on_hub(Path::new(REPO), &client.options).unwrap(), None);
    client.resolve().unwrap();
    assert_eq!(Place::on_hub(Path::new(REPO), &client.options).unwrap(), None);
    assert_in(&refusal(&client.offline(), REPO).0, &["HF_HUB_OFFLINE", "adapter_config.json"]);
}

#[test]
fn an_adapter_without_safetensors_is_explained() {
    let config = files().remove(0);
    let hub = Hub::serve(&[config.clone(), ("adapter_model.bin", b"\x80\x02}q\x00.".to_vec())]);
    let (problem, hint) = refusal(&Client::of(&hub), REPO);
    assert_in(&problem, &["adapter_model.bin", "pickle", TENSORS]);
    assert_in(&hint, &["save_pretrained"]);
    let hub = Hub::serve(&[config]);
    let (problem, hint) = refusal(&Client::of(&hub), REPO);
    assert_in(&problem, &["holds no adapter_model.safetensors"]);
    assert_in(&hint, &["may not be finished"]);
}

#[test]
fn an_adapter_that_the_hub_refuses_says_why() {
    let hub = Hub::serve(&files());
    hub.set(|script| script.refuse = Some((403, "GatedRepo")));
    assert!(matches!(find(&Client::of(&hub), REPO), Err(Error::Hub { .. })));
    for malformed in ["a--b/c", "a/b@..", "https://example.com/a/b"] {
        let error = find(&Client::of(&hub), malformed).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("adapter `"), "{error}");
    }
}

//! Checkpoints from a hub that the test itself serves on 127.0.0.1: whole, broken, refused, offline.

mod adapters;
mod server;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gneiss::checkpoint::{HubOptions, Local, resolve};
use gneiss::{Error, Result};
use server::{BREAK, COMMIT, Fault, Hub, SILENCE, WEIGHTS, etag, weights};
use tempfile::TempDir;

const REPO: &str = "org/name";

struct Client {
    folder: TempDir,
    options: HubOptions,
}

impl Client {
    fn of(hub: &Hub) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut options = HubOptions::from_vars(|_| None);
        options.cache = Some(folder.path().join("hub"));
        options.endpoint = format!("http://{}", hub.address);
        options.attempts = 3;
        options.pause = Duration::from_millis(1);
        options.timeout = Duration::from_secs(5);
        options.progress = false;
        Self { folder, options }
    }

    fn offline(mut self) -> Self {
        self.options.offline = true;
        self
    }

    fn resolve(&self) -> Result<PathBuf> {
        self.resolve_as(REPO)
    }

    fn resolve_as(&self, model: &str) -> Result<PathBuf> {
        match resolve(model, &self.options, &|_| Ok(()))? {
            Local::Folder(folder) => Ok(folder),
            Local::Gguf(path) => panic!("a hub id gave {}", path.display()),
        }
    }

    /// Problem and hint of the error that has to come.
    fn refusal(&self, model: &str) -> (String, String) {
        match self.resolve_as(model) {
            Err(error @ Error::Hub { .. }) => {
                assert!(!error.is_bad_input());
                let Error::Hub { repo, problem, hint } = error else { unreachable!() };
                assert!(repo.starts_with(REPO) && repo.contains('@'), "{repo}");
                (problem, hint)
            }
            other => panic!("expected an error of the hub, got {other:?}"),
        }
    }

    fn repo(&self) -> PathBuf {
        self.folder.path().join("hub/models--org--name")
    }

    fn blob(&self, content: &[u8]) -> PathBuf {
        self.repo().join("blobs").join(etag(content))
    }

    fn part(&self, content: &[u8]) -> PathBuf {
        self.repo().join("blobs").join(format!("{}.gneiss-part", etag(content)))
    }
}

fn assert_file(folder: &Path, name: &str, expected: &[u8]) {
    let found = fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(found == expected, "{name}: {} bytes, expected {} others", found.len(), expected.len());
}

#[track_caller]
fn assert_in(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn a_checkpoint_is_downloaded_once() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    let folder = client.resolve().unwrap();
    assert_eq!(folder, client.repo().join("snapshots").join(COMMIT));
    assert_file(&folder, "config.json", b"{}");
    assert_file(&folder, "tokenizer.json", b"{\"a\": 1}");
    assert_file(&folder, "chat_template.jinja", b"x");
    assert_file(&folder, WEIGHTS, &weights(7));
    assert_eq!(fs::read_to_string(client.repo().join("refs/main")).unwrap(), COMMIT);
    assert!(!client.part(&weights(7)).exists());
    let first = hub.requests();
    assert_eq!(first[0], "HEAD /org/name/resolve/main/config.json");
    assert!(first.contains(&format!("GET /org/name/resolve/{COMMIT}/{WEIGHTS}")), "{first:?}");

    // The one question left is which commit `main` is; not even absent files are asked for again.
    assert_eq!(client.resolve().unwrap(), folder);
    assert_eq!(hub.requests(), ["HEAD /org/name/resolve/main/config.json"]);
    assert_eq!(client.resolve_as(&format!("{REPO}@{COMMIT}")).unwrap(), folder);
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn shards_are_those_of_the_index() {
    let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
    let hub = Hub::serve(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.into()),
        ("m-1.safetensors", weights(1)),
        ("m-2.safetensors", weights(2)),
        ("m-3.safetensors", weights(3)),
    ]);
    let client = Client::of(&hub);
    let folder = client.resolve().unwrap();
    assert_file(&folder, "m-1.safetensors", &weights(1));
    assert_file(&folder, "m-2.safetensors", &weights(2));
    assert!(!folder.join("m-3.safetensors").exists());
    hub.requests();
    client.resolve().unwrap();
    assert_eq!(hub.requests().len(), 1);

    // One shard is gone from the cache, and from the hub.
    fs::remove_file(folder.join("m-2.safetensors")).unwrap();
    hub.set(|script| drop(script.files.remove("m-2.safetensors")));
    assert_in(&client.refusal(REPO).0, &["holds no m-2.safetensors"]);
    assert_in(&client.offline().refusal(REPO).0, &["HF_HUB_OFFLINE", "m-2.safetensors"]);
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    let hub = Hub::serve(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors.index.json", br#"{"weight_map": {"a": "../../x.safetensors"}}"#.to_vec()),
    ]);
    let error = Client::of(&hub).resolve().unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    assert_in(&error.to_string(), &["../../x.safetensors", "index.json"]);
}

#[test]
fn an_interrupted_download_goes_on() {
    for fault in [Fault::Closes, Fault::ClosesUnannounced, Fault::Stalls] {
        let hub = Hub::whole();
        hub.set(|script| script.faults = Some((1, fault)));
        let mut client = Client::of(&hub);
        if fault == Fault::Stalls {
            client.options.timeout = Duration::from_millis(150);
        }
        let started = Instant::now();
        assert_file(&client.resolve().unwrap(), WEIGHTS, &weights(7));
        assert!(started.elapsed() < SILENCE / 2);
        let range = format!("GET /storage/{WEIGHTS} bytes={BREAK}-");
        let requests = hub.requests();
        assert_eq!(requests.iter().filter(|line| **line == range).count(), 1, "{requests:?}");
    }
}

#[test]
fn an_interrupted_download_restarts_where_ranges_are_ignored() {
    let hub = Hub::whole();
    hub.set(|script| (script.faults, script.no_ranges) = (Some((1, Fault::Closes)), true));
    assert_file(&Client::of(&hub).resolve().unwrap(), WEIGHTS, &weights(7));
}

#[test]
fn a_download_that_always_breaks_leaves_nothing_that_passes_as_whole() {
    for fault in [Fault::Closes, Fault::ClosesUnannounced] {
        let hub = Hub::whole();
        hub.set(|script| (script.faults, script.no_ranges) = (Some((usize::MAX, fault)), true));
        let client = Client::of(&hub);
        let (problem, hint) = client.refusal(REPO);
        assert_in(&problem, &[WEIGHTS, "broke off at 70000 of 200000 bytes"]);
        assert_in(&hint, &["again"]);
        let bodies = hub.requests().iter().filter(|line| line.starts_with("GET /storage")).count();
        // Only the first one brought new bytes, so that it and the two after it are the three attempts.
        assert_eq!(bodies, 3);
        let snapshot = client.repo().join("snapshots").join(COMMIT);
        assert!(snapshot.join("config.json").exists());
        assert!(snapshot.join(WEIGHTS).symlink_metadata().is_err());
        assert!(!client.blob(&weights(7)).exists());
        assert!(!client.repo().join("refs/main").exists());
        assert_eq!(fs::metadata(client.part(&weights(7))).unwrap().len(), BREAK as u64);

        // A later run finishes it, from where the first one was.
        hub.set(|script| (script.faults, script.no_ranges) = (None, false));
        assert_file(&client.resolve().unwrap(), WEIGHTS, &weights(7));
        assert_in(&hub.requests().join("\n"), &[&format!("GET /storage/{WEIGHTS} bytes={BREAK}-")]);
    }
}

#[test]
fn progress_resets_the_count_of_attempts() {
    let hub = Hub::whole();
    // Each of these brings half of what lacks, at most `BREAK` bytes, and all are more than `attempts`.
    hub.set(|script| script.faults = Some((6, Fault::Closes)));
    assert_file(&Client::of(&hub).resolve().unwrap(), WEIGHTS, &weights(7));
}

#[test]
fn a_body_that_is_too_long_is_not_kept() {
    let hub = Hub::whole();
    hub.set(|script| script.faults = Some((1, Fault::Overflows)));
    let client = Client::of(&hub);
    assert_file(&client.resolve().unwrap(), WEIGHTS, &weights(7));
    hub.set(|script| {
        script.files.insert(WEIGHTS.to_string(), weights(8));
        script.faults = Some((usize::MAX, Fault::Overflows));
    });
    fs::remove_dir_all(client.repo()).unwrap();
    assert_in(&client.refusal(REPO).0, &["more than 200000 bytes"]);
    assert!(!client.part(&weights(8)).exists());
}

#[test]
fn leftovers_of_other_runs_do_no_harm() {
    let whole = weights(7);
    let longer = [whole.clone(), whole.clone()].concat();
    for (left, expected_range) in [
        (&whole[..], None),
        (&whole[..1000], Some("bytes=1000-")),
        (&whole[..199_999], Some("bytes=199999-")),
        (&longer[..], Some("")),
    ] {
        let hub = Hub::whole();
        let client = Client::of(&hub);
        fs::create_dir_all(client.repo().join("blobs")).unwrap();
        fs::write(client.part(&whole), left).unwrap();
        assert_file(&client.resolve().unwrap(), WEIGHTS, &whole);
        let requests = hub.requests();
        let bodies: Vec<_> = requests.iter().filter_map(|line| line.strip_prefix("GET /storage/")).collect();
        let expected = expected_range.map(|range| format!("{WEIGHTS} {range}").trim_end().to_string());
        assert_eq!(bodies, expected.iter().collect::<Vec<_>>(), "{} bytes were there", left.len());
    }
    // A blob that someone else cut short, and a link to a blob that is gone.
    let hub = Hub::whole();
    let client = Client::of(&hub);
    fs::create_dir_all(client.repo().join("blobs")).unwrap();
    fs::write(client.blob(&whole), &whole[..1000]).unwrap();
    let folder = client.resolve().unwrap();
    assert_file(&folder, WEIGHTS, &whole);
    fs::remove_file(client.blob(&whole)).unwrap();
    assert_file(&client.resolve().unwrap(), WEIGHTS, &whole);
    #[cfg(unix)]
    {
        fs::remove_file(folder.join(WEIGHTS)).unwrap();
        std::os::unix::fs::symlink("../../blobs/gone", folder.join(WEIGHTS)).unwrap();
        assert_file(&client.resolve().unwrap(), WEIGHTS, &whole);
    }
}

#[test]
fn refusals_say_what_to_do() {
    let hub = Hub::whole();
    let mut client = Client::of(&hub);
    let page = format!("http://{}/{REPO}", hub.address);
    for (status, code, problem, hint) in [
        (401, "GatedRepo", "needs a token (401", &["accept the licence", &page, "HF_TOKEN"][..]),
        (403, "GatedRepo", "needs a token (403", &["accept the licence", &page, "HF_TOKEN"]),
        (401, "RepoNotFound", "no such repository, or a private one (401", &["spelling", "HF_TOKEN"]),
        (404, "RepoNotFound", "no such repository, or a private one (404", &["spelling", "HF_TOKEN"]),
        (404, "RevisionNotFound", "no such revision (404", &["spelling"]),
        (404, "", "no such repository or revision (404", &["spelling", "HF_TOKEN", "local folder"]),
        (404, "EntryNotFound", "holds no config.json", &["GGUF"]),
        (503, "", "the hub answered 503", &["later"]),
        (418, "", "the hub answered 418", &["HF_ENDPOINT"]),
    ] {
        hub.set(|script| script.refuse = Some((status, code)));
        let (found, hinted) = client.refusal(REPO);
        assert_in(&found, &[problem]);
        assert_in(&hinted, hint);
    }
    client.options.token = Some("hf_x".to_string());
    hub.set(|script| script.refuse = Some((403, "GatedRepo")));
    assert_in(&client.refusal(REPO).0, &["gives no access (403"]);
    assert!(!client.repo().exists(), "a refusal left files");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let hub = Hub::whole();
    hub.set(|script| script.busy = 2);
    assert_file(&Client::of(&hub).resolve().unwrap(), WEIGHTS, &weights(7));
}

#[test]
fn no_connection() {
    let hub = Hub::whole();
    let mut client = Client::of(&hub);
    // Were this waited for, the test would take minutes.
    client.options.pause = Duration::from_secs(60);
    drop(hub);
    let (problem, hint) = client.refusal(REPO);
    assert_in(&problem, &["no connection to 127.0.0.1", "refused"]);
    assert_in(&hint, &["HF_HUB_OFFLINE", "local folder"]);
    client.options.endpoint = "not a url".to_string();
    assert_in(&client.refusal(REPO).1, &["HF_ENDPOINT"]);
    client.options.cache = None;
    assert_in(&client.refusal(REPO).1, &["HF_HOME"]);
}

#[test]
fn offline_uses_the_cache_alone() {
    let hub = Hub::whole();
    let client = Client::of(&hub).offline();
    let (problem, hint) = client.refusal(REPO);
    assert_in(&problem, &["HF_HUB_OFFLINE", "config.json", client.repo().to_str().unwrap()]);
    assert_in(&hint, &["without HF_HUB_OFFLINE"]);

    let mut client = client;
    client.options.offline = false;
    let folder = client.resolve().unwrap();
    hub.requests();
    let client = client.offline();
    assert_eq!(client.resolve().unwrap(), folder);
    assert_eq!(client.resolve_as(&format!("{REPO}@{COMMIT}")).unwrap(), folder);
    assert_in(&client.refusal("org/name@other").0, &["HF_HUB_OFFLINE"]);
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    assert_in(&client.refusal(REPO).0, &["HF_HUB_OFFLINE", WEIGHTS]);
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    assert_in(&client.refusal(REPO).0, &["HF_HUB_OFFLINE", "tokenizer.json"]);
    assert_eq!(hub.requests(), [""; 0]);
}

/// An index of an earlier commit, or of another program, whose shards are not there.
#[test]
fn an_index_left_beside_one_file_does_no_harm() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    let folder = client.resolve().unwrap();
    let index = r#"{"weight_map": {"a": "model-00001-of-00030.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(client.resolve().unwrap(), folder);
    assert_eq!(client.offline().resolve().unwrap(), folder);
}

#[test]
fn the_token_goes_to_the_hub_and_no_further() {
    let storage = Hub::whole();
    let hub = Hub::whole();
    hub.set(|script| script.storage = Some(storage.address));
    let mut client = Client::of(&hub);
    client.options.token = Some("hf_secret".to_string());
    assert_file(&client.resolve().unwrap(), WEIGHTS, &weights(7));
    let requests = hub.requests();
    assert!(!requests.is_empty() && requests.iter().all(|line| line.ends_with(" Bearer hf_secret")));
    assert_eq!(storage.requests(), [format!("GET /storage/{WEIGHTS}")]);
}

#[test]
fn a_storage_host_that_fails_is_asked_again_through_the_hub() {
    let storage = Hub::whole();
    let hub = Hub::whole();
    hub.set(|script| script.storage = Some(storage.address));
    storage.set(|script| script.refuse = Some((403, "")));
    let client = Client::of(&hub);
    assert_in(&client.refusal(REPO).0, &["broke off at 0 of 200000", "storage host answered 403"]);
    storage.set(|script| (script.refuse, script.busy) = (None, 2));
    assert_file(&client.resolve().unwrap(), WEIGHTS, &weights(7));
}

#[test]
fn an_unsupported_model_is_refused_before_its_weights() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    let seen = Cell::new(0);
    let refuse = |path: &Path| {
        seen.set(seen.get() + fs::read(path).unwrap().len());
        Err(Error::Invalid("unsupported".to_string()))
    };
    let error = resolve(REPO, &client.options, &refuse).unwrap_err();
    assert_eq!((error.to_string().as_str(), seen.get()), ("unsupported", 2));
    let requests = hub.requests();
    assert!(requests.iter().all(|line| line.ends_with("config.json")), "{requests:?}");
}

#[test]
fn the_revision_is_asked_for() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    client.resolve_as("org/name@refs/pr/5").unwrap();
    assert_eq!(hub.requests()[0], "HEAD /org/name/resolve/refs%2Fpr%2F5/config.json");
    assert_eq!(fs::read_to_string(client.repo().join("refs/refs/pr/5")).unwrap(), COMMIT);
}

#[test]
fn a_repository_without_safetensors() {
    let hub = Hub::serve(&[("config.json", b"{}".to_vec()), ("tokenizer.json", b"{}".to_vec())]);
    let (problem, hint) = Client::of(&hub).refusal(REPO);
    assert_in(&problem, &["no safetensors", WEIGHTS, "model.safetensors.index.json"]);
    assert_in(&hint, &[".gguf"]);
    hub.set(|script| drop(script.files.remove("tokenizer.json")));
    assert_in(&Client::of(&hub).refusal(REPO).0, &["holds no tokenizer.json"]);
}

/// Two runs at once share a part; whoever ends first must not harm the other.
#[test]
fn two_downloads_at_once() {
    let hub = Hub::whole();
    let client = Client::of(&hub);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| client.resolve().unwrap())).collect();
        for run in runs {
            assert_file(&run.join().unwrap(), WEIGHTS, &weights(7));
        }
    });
}

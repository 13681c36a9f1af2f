//! Requests of several models through one thread, and models that come and go.

use candle_core::{DType, Device, Tensor};
use gneiss::checkpoint::Checkpoint;
use gneiss::generate::{Event, Request, StopReason, generate};
use gneiss::model::{Decoder, Dtypes};
use gneiss::prompt::Prefix;
use gneiss::prompt::check_name;
use gneiss::prompt::peft::{Adapter, AdapterConfig, ModelCard, PromptTuningInit};
use gneiss::serve::ServerLimits;
use gneiss::serve::client::{Client, SubmitError};
use gneiss::serve::served::Served;
use gneiss::serve::watch::{AdapterFolder, FolderChange};
use gneiss::serve::worker::{StepMetrics, start};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LIMITS: ServerLimits =
    ServerLimits { queue: 100, sequence_tokens: 200, cache_rows: 400, step_rows: 24 };

fn model() -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&folder).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

/// Embeddings of some tokens as a prompt.
fn adapter(model: &Decoder, tokens: &[u32]) -> Adapter {
    let prompt = model.embedding().index_select(&Tensor::new(tokens, &Device::Cpu).unwrap(), 0).unwrap();
    let config = AdapterConfig::new("base", model.config(), tokens.len(), PromptTuningInit::Random, None);
    Adapter { prompt: Prefix::Embeddings(prompt), config, task: None }
}

struct Server {
    client: Client,
    thread: Option<JoinHandle<()>>,
    steps: Arc<Mutex<Vec<StepMetrics>>>,
}

impl Server {
    fn new(limits: ServerLimits) -> Self {
        let steps = Arc::new(Mutex::new(Vec::new()));
        let seen = steps.clone();
        let watch = move |step| seen.lock().unwrap().push(step);
        let (client, thread) = start(model(), Served::base("base"), limits, watch).unwrap();
        Self { client, thread: Some(thread), steps }
    }

    fn load(&self, name: &str, tokens: &[u32]) {
        let adapter = adapter(&model(), tokens);
        self.client.load(Served::tuned(name, Path::new(name), &adapter).unwrap(), adapter).unwrap();
    }

    fn served(&self, name: &str) -> Arc<Served> {
        self.client.models().iter().find(|served| served.name == name).unwrap().clone()
    }

    fn names(&self) -> Vec<String> {
        self.client.models().iter().map(|served| served.name.clone()).collect()
    }

    fn ask(&self, name: &str, request: Request) -> (Vec<u32>, Event) {
        let mut events = self.client.submit(&self.served(name), request).unwrap();
        let mut tokens = Vec::new();
        loop {
            match events.blocking_recv().expect("an answer ends with a word about it") {
                Event::Token(token) => tokens.push(token.id),
                last => return (tokens, last),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.client.end();
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok());
    }
}

fn request(seed: u32) -> Request {
    let tokens = (0..3 + seed % 5).map(|i| (seed * 7 + i * 3) % 90).collect();
    Request { tokens, max_new_tokens: 2 + seed as usize % 4, ..Request::default() }
}

fn alone(model: &Decoder, prompt: Option<&[u32]>, request: Request) -> Vec<u32> {
    let adapter = prompt.map(|tokens| adapter(model, tokens));
    let prompt = adapter.as_ref().map(|adapter| &adapter.prompt);
    generate(model, prompt, vec![request], 512, &mut |_| ()).unwrap().remove(0).tokens
}

#[test]
fn many_at_once_get_what_each_gets_alone() {
    let server = Server::new(LIMITS);
    let prompts: [(&str, Option<&[u32]>); 3] =
        [("base", None), ("one", Some(&[4, 9, 1])), ("two", Some(&[30, 2]))];
    server.load("one", prompts[1].1.unwrap());
    server.load("two", prompts[2].1.unwrap());
    assert_eq!(server.names(), ["base", "one", "two"]);
    let model = model();
    std::thread::scope(|scope| {
        for seed in 0..32 {
            let (server, model) = (&server, &model);
            scope.spawn(move || {
                let (name, prompt) = prompts[seed as usize % 3];
                let (tokens, last) = server.ask(name, request(seed));
                assert_eq!(last, Event::Finished(StopReason::MaxTokens));
                assert_eq!(tokens, alone(model, prompt, request(seed)), "{name}, {seed}");
            });
        }
    });
    let steps = server.steps.lock().unwrap();
    assert_eq!(
        steps.iter().map(|step| step.generated).sum::<usize>(),
        (0..32).map(|s| request(s).max_new_tokens).sum::<usize>()
    );
    assert!(steps.iter().all(|step| step.rows <= LIMITS.step_rows && step.seconds > 0.0));
    assert!(steps.iter().any(|step| step.sequences > 1), "no two requests were in one step");
    assert_eq!(server.client.waiting(), 0);
}

#[test]
fn what_can_not_be_taken_is_refused() {
    let server = Server::new(ServerLimits { queue: 2, ..LIMITS });
    let base = server.served("base");
    let submit = |request| server.client.submit(&base, request).map(drop).unwrap_err();
    let long = Request { tokens: vec![1; 150], max_new_tokens: 51, ..Request::default() };
    assert_eq!(submit(long), SubmitError::TooLong { found: 201, most: 200 });
    let strange = Request { tokens: vec![1_000_000], ..Request::default() };
    assert!(matches!(submit(strange), SubmitError::Invalid(problem) if problem.contains("found 1000000")));
    // What waits holds the queue: a long answer, and more than one step can take in.
    let long = Request { tokens: vec![1; 100], max_new_tokens: 100, ..Request::default() };
    let held: Vec<_> = (0..50).map(|_| server.client.submit(&base, long.clone())).collect();
    assert!(held.iter().any(|refused| matches!(refused, Err(SubmitError::Busy { waiting: 2 }))));
    assert!(held.iter().any(Result::is_ok));
    // Whoever hangs up leaves the queue, and the next is served.
    drop(held);
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.client.waiting() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.ask("base", request(1)).1, Event::Finished(StopReason::MaxTokens));
}

#[test]
fn models_come_and_go_while_requests_run() {
    let server = Server::new(LIMITS);
    server.load("one", &[4, 9, 1]);
    let one = server.served("one");
    let long = Request { max_new_tokens: 60, ..request(3) };
    let mut events = server.client.submit(&one, long.clone()).unwrap();
    let first = events.blocking_recv().unwrap();
    assert!(matches!(first, Event::Token(_)), "{first:?}");
    // Another prompt under the name: what runs goes on behind the old one.
    server.load("one", &[30, 2]);
    server.client.unload("one");
    let mut tokens = vec![first];
    while let Some(event) = events.blocking_recv() {
        tokens.push(event);
    }
    let expected = alone(&model(), Some(&[4, 9, 1]), long);
    let ids: Vec<u32> =
        tokens.iter().filter_map(|e| if let Event::Token(t) = e { Some(t.id) } else { None }).collect();
    assert_eq!(ids, expected);
    // The order of the worker's commands is that of the calls: it has unloaded the one when it has loaded the other.
    server.load("other", &[7]);
    assert_eq!(server.names(), ["base", "other"]);
    assert_eq!(server.client.submit(&one, request(1)).map(drop), Err(SubmitError::Gone("one".into())));
    let wide = Adapter {
        prompt: Prefix::Embeddings(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()),
        ..adapter(&model(), &[1])
    };
    let error =
        server.client.load(Served::tuned("wide", Path::new("wide"), &wide).unwrap(), wide).unwrap_err();
    assert!(error.to_string().contains("expected a prompt of width"), "{error}");
}

#[test]
fn a_thread_that_ended_refuses() {
    let server = Server::new(LIMITS);
    assert!(server.client.is_serving());
    let base = server.served("base");
    let mut last = server.client.submit(&base, request(5)).unwrap();
    server.client.end();
    let mut events = Vec::new();
    while let Some(event) = last.blocking_recv() {
        events.push(event);
    }
    assert_eq!(events.last(), Some(&Event::Finished(StopReason::MaxTokens)), "what was taken is answered");
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.client.is_serving() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.client.submit(&base, request(1)).map(drop), Err(SubmitError::Ending));
}

fn write(adapter: &Adapter, folder: &Path) {
    adapter.write(folder, &ModelCard::default()).unwrap();
}

#[test]
fn a_folder_says_which_prompts_there_are() {
    let (server, model, place) = (Server::new(LIMITS), model(), tempfile::tempdir().unwrap());
    let mut folder = AdapterFolder::new(place.path(), vec!["taken".into()]).unwrap();
    assert_eq!(folder.update(&server.client).unwrap(), []);
    write(&adapter(&model, &[1, 2]), &place.path().join("one"));
    // A run folder holds its adapter a level deeper; a file and an empty folder are no adapters.
    write(&adapter(&model, &[1, 2, 3]), &place.path().join("two/adapter"));
    std::fs::write(place.path().join("two/config.toml"), "").unwrap();
    std::fs::write(place.path().join("two/metrics.jsonl"), "").unwrap();
    std::fs::write(place.path().join("notes.txt"), "").unwrap();
    std::fs::create_dir(place.path().join("empty")).unwrap();
    let loaded = |name: &str| FolderChange::Loaded(name.into());
    assert_eq!(folder.update(&server.client).unwrap(), [loaded("one"), loaded("two")]);
    assert_eq!(folder.update(&server.client).unwrap(), []);
    assert_eq!(server.names(), ["base", "one", "two"]);
    assert_eq!(server.served("two").virtual_tokens, 3);
    // Changed, broken, mended, gone.
    write(&adapter(&model, &[5, 6, 7, 8]), &place.path().join("one"));
    assert_eq!(folder.update(&server.client).unwrap(), [loaded("one")]);
    assert_eq!(server.served("one").virtual_tokens, 4);
    std::fs::write(place.path().join("one/adapter_config.json"), "{").unwrap();
    let changes = folder.update(&server.client).unwrap();
    assert!(
        matches!(&changes[..], [FolderChange::Failed { name, problem }] if name == "one" && problem.contains("adapter_config.json"))
    );
    assert_eq!(folder.update(&server.client).unwrap(), [], "a mistake is told once");
    assert_eq!(server.served("one").virtual_tokens, 4, "what was offered still is");
    std::fs::remove_dir_all(place.path().join("one")).unwrap();
    assert_eq!(folder.update(&server.client).unwrap(), [FolderChange::Unloaded("one".into())]);
    write(&adapter(&model, &[1]), &place.path().join("taken"));
    write(&adapter(&model, &[1]), &place.path().join("bad name"));
    let changes = folder.update(&server.client).unwrap();
    assert!(changes.iter().all(|change| matches!(change, FolderChange::Failed { .. })) && changes.len() == 2);
    // The order of the worker's commands is that of the calls: the last of them has been taken when this one has.
    server.load("three", &[1]);
    assert_eq!(server.names(), ["base", "three", "two"]);
}

#[test]
fn names_stand_in_addresses() {
    for name in ["a", "dog-grooming_v1.2", "A1"] {
        check_name(name).unwrap();
    }
    for name in ["", "a b", "a/b", "..", ".hidden", "ü", &"x".repeat(129)] {
        assert!(check_name(name).unwrap_err().to_string().contains("expected 1 to 128"), "{name}");
    }
}

//! `gneiss export --push` against a hub on this machine.

use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What the hub has and was asked.
#[derive(Default)]
struct HubState {
    /// Method, path and token of each request.
    log: Vec<String>,
    /// Whether the repository exists.
    exists: bool,
    created: Value,
    /// Large files by their SHA-256.
    storage: BTreeMap<String, Vec<u8>>,
    /// Lines of the last commit.
    commit: Vec<Value>,
    /// Uploads to the storage that fail from now on.
    failures: usize,
    /// Whether the token may not write.
    refuses: bool,
    /// The model card of org/base.
    base_card: Option<String>,
}

/// A hub that takes uploads.
struct UploadHub {
    address: SocketAddr,
    state: Arc<Mutex<HubState>>,
}

impl UploadHub {
    fn serve() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<Mutex<HubState>>::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), address, &mut shared.lock().unwrap());
            }
        });
        Self { address, state }
    }

    fn push(&self, place: &Place, args: &[&str]) -> Assert {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(place.path("")).env("HF_ENDPOINT", format!("http://{}", self.address));
        command.env("HF_HOME", place.path("")).env("HF_TOKEN", "hf_x").env_remove("HF_HUB_OFFLINE");
        command.args(["export", "--push", "me/dogs"]).args(args).assert()
    }
}

/// Answers the one request of a connection.
fn answer(mut stream: TcpStream, address: SocketAddr, state: &mut HubState) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = Vec::new();
    while let Some(Ok(line)) =
        reader.by_ref().lines().next().filter(|line| line.as_ref().is_ok_and(|l| !l.is_empty()))
    {
        head.push(line);
    }
    let header = |name: &str| {
        let found = head
            .iter()
            .filter_map(|line| line.split_once(": "))
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_owned()).unwrap_or_default()
    };
    if head[0].contains(" /org/base/resolve/") {
        return send_card(&mut stream, &head[0], state);
    }
    let Ok(length) = header("content-length").parse::<usize>() else { return };
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let request = head[0].trim_end_matches(" HTTP/1.1").to_owned();
    state.log.push(format!("{request} {}", header("authorization")).trim_end().to_owned());
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (status, reply) = reply(&request, &body, &parsed, address, state);
    let text = reply.to_string();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
    .unwrap();
}

/// Answers a request for the card of org/base, as the hub does for a file.
fn send_card(stream: &mut TcpStream, request: &str, state: &HubState) {
    assert!(request.contains("/README.md"), "only the card of the base is asked for: {request}");
    let (status, code, card) = match &state.base_card {
        Some(card) => (200, "", card.as_str()),
        None => (404, "X-Error-Code: EntryNotFound\r\n", ""),
    };
    let (commit, length) = ("c".repeat(40), card.len());
    let body = if request.starts_with("HEAD") { "" } else { card };
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{code}ETag: \"e{length}\"\r\nX-Repo-Commit: {commit}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .unwrap();
}

fn reply(
    request: &str,
    body: &[u8],
    parsed: &Value,
    address: SocketAddr,
    state: &mut HubState,
) -> (u16, Value) {
    match request {
        _ if state.refuses => (403, json!({ "error": "You don't have the rights" })),
        "POST /api/repos/create" if state.exists => {
            (409, json!({ "error": "You already created this model repo" }))
        }
        "POST /api/repos/create" => {
            (state.exists, state.created) = (true, parsed.clone());
            (200, json!({ "url": "x" }))
        }
        "POST /api/models/me/dogs/preupload/main" => {
            let mode = |file: &Value| {
                let is_large = file["path"].as_str().unwrap().ends_with(".safetensors");
                json!({ "path": file["path"], "uploadMode": if is_large { "lfs" } else { "regular" } })
            };
            (
                200,
                json!({ "files": parsed["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>() }),
            )
        }
        "POST /me/dogs.git/info/lfs/objects/batch" => {
            let object = &parsed["objects"][0];
            let oid = object["oid"].as_str().unwrap();
            let upload =
                json!({ "href": format!("http://{address}/storage/{oid}"), "header": { "x-amz": "1" } });
            let actions =
                if state.storage.contains_key(oid) { Value::Null } else { json!({ "upload": upload }) };
            (200, json!({ "objects": [{ "oid": oid, "size": object["size"], "actions": actions }] }))
        }
        "POST /api/models/me/dogs/commit/main" => {
            let text = std::str::from_utf8(body).unwrap();
            state.commit = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            (200, json!({ "commitUrl": "x" }))
        }
        put if put.starts_with("PUT /storage/") => {
            if state.failures > 0 {
                state.failures -= 1;
                return (503, json!({}));
            }
            state.storage.insert(put["PUT /storage/".len()..].to_owned(), body.to_vec());
            (200, json!({}))
        }
        other => (404, json!({ "error": format!("no {other}") })),
    }
}

/// The text of a file of a commit.
fn committed(commit: &[Value], path: &str) -> String {
    use base64::Engine;
    let line = commit.iter().find(|line| line["key"] == "file" && line["value"]["path"] == path).unwrap();
    let bytes = base64::engine::general_purpose::STANDARD.decode(line["value"]["content"].as_str().unwrap());
    String::from_utf8(bytes.unwrap()).unwrap()
}

#[test]
fn an_adapter_is_pushed_with_its_card_and_a_repeated_push_sends_no_weights() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    place.gneiss(["eval", "dogs.toml", "--adapter", "runs/dogs"]).success();
    let hub = UploadHub::serve();
    let args = ["--adapter", "runs/dogs", "--model", "org/base", "--private"];
    let card = "---\nlicense: other\nlicense_name: base-1\nlicense_link: LICENSE\n---\n# Base\n";
    hub.state.lock().unwrap().base_card = Some(card.to_owned());
    hub.state.lock().unwrap().failures = 1;
    let (stdout, _) = texts(&hub.push(&place, &args).success());
    assert_eq!(stdout, format!("http://{}/me/dogs\n", hub.address));
    let mut state = hub.state.lock().unwrap();
    assert_eq!(
        state.created,
        json!({ "type": "model", "organization": "me", "name": "dogs", "private": true })
    );
    let weights = std::fs::read(place.path("runs/dogs/adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(state.storage.values().collect::<Vec<_>>(), [&weights]);
    let oid = state.storage.keys().next().unwrap().clone();
    let large = state.commit.iter().find(|line| line["key"] == "lfsFile").unwrap();
    let expected =
        json!({ "path": "adapter_model.safetensors", "algo": "sha256", "oid": oid, "size": weights.len() });
    assert_eq!(large["value"], expected);
    let paths: BTreeSet<&str> =
        state.commit.iter().filter_map(|line| line["value"]["path"].as_str()).collect();
    assert_eq!(paths, ["README.md", "adapter_config.json", "adapter_model.safetensors", "task.json"].into());

    let card = committed(&state.commit, "README.md");
    for part in [
        "base_model: \"org/base\"", "base_model_relation: adapter", "library_name: peft", "- prompt-tuning",
        "license: \"other\"", "license_name: \"base-1\"", "/org/base/blob/main/LICENSE\"", "model-index:",
        "type: accuracy", "6 rows of test.csv", "| accuracy, generated |",
    ] {
        assert!(card.contains(part), "expected {part:?} in: {card}");
    }
    assert!(!card.contains("shiny dog") && !card.contains("train.csv"), "no data: {card}");
    let config: Value = serde_json::from_str(&committed(&state.commit, "adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "org/base");
    // The token is for the hub, and the storage of this hub is at its address.
    assert!(state.log[0].ends_with(" Bearer hf_x"), "{:?}", state.log);

    state.log.clear();
    drop(state);
    hub.push(&place, &args).success();
    let log = hub.state.lock().unwrap().log.join("\n");
    assert!(!log.contains("PUT") && log.contains("/commit/main"), "{log}");
}

#[test]
fn a_push_that_cant_be_made_is_refused() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let hub = UploadHub::serve();
    let refused = |args: &[&str], code: i32, parts: &[&str]| {
        let (stdout, stderr) = texts(&hub.push(&place, args).code(code));
        assert_eq!(stdout, "");
        for part in parts {
            assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
        }
    };
    // The base model is a folder of this machine.
    refused(&["--adapter", "runs/dogs"], 2, &["--model", "id on the hub", "model"]);
    refused(&["--adapter", "runs/dogs", "--bake"], 2, &["--push", "--bake"]);
    refused(
        &["--adapter", "runs/dogs", "--adapter", "a", "--model", "org/base"],
        2,
        &["expected one with --push"],
    );
    for repo in ["dogs", "me/-dogs", "me/dogs@v1", "me/a--b"] {
        let push = ["export", "--adapter", "runs/dogs", "--push", repo, "--model", "org/base"];
        place.refuses(push, &["--push", "ORG/NAME", "letters"]);
    }
    place.refuses(["export", "--adapter", "runs/dogs", "--bake"], &["--out"]);
    let push = ["export", "--adapter", "runs/dogs", "--push", "me/dogs", "--model", "org/base"];
    let (_, stderr) = texts(&place.gneiss(push).code(1));
    assert!(stderr.contains("HF_HUB_OFFLINE"), "{stderr}");
    assert_eq!(hub.state.lock().unwrap().log, [""; 0], "nothing was asked");
    hub.state.lock().unwrap().refuses = true;
    refused(
        &["--adapter", "runs/dogs", "--model", "org/base"],
        1,
        &["403", "the rights", "write access", "no evaluation", "no license", "org/base states none"],
    );
}

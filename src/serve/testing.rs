//! A server whose worker is a script: what it is asked is looked at, what it answers is invented.

use super::adapters::Served;
use super::app::{App, Options};
use super::chat_template::ChatTemplate;
use super::client::{Client, Command, Limits, Shared};
use crate::adapter::PromptTask;
use crate::config::Task;
use crate::data::Template;
use crate::generate::{Event, Request, StopReason, Token};
use crate::model::TextTokenizer;
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::time::SystemTime;
use tokio::sync::mpsc::UnboundedSender;

pub const BASE: &str = "org/base";
pub const END: u32 = 256;
pub const BEGIN: u32 = 257;
pub const START: u32 = 258;
pub const KEY: &str = "the-key";

/// A byte-level vocabulary: the id of a byte is the byte. So a character of several bytes is several tokens.
pub fn byte_level() -> TextTokenizer {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255).filter(|byte| !itself(*byte)).collect();
    let letter = |byte: u8| match others.iter().position(|other| *other == byte) {
        Some(place) => char::from_u32(0x100 + place as u32).unwrap(),
        None => char::from(byte),
    };
    let vocabulary: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(END, "<|end|>"), special(BEGIN, "<|begin|>"), special(START, "<|start|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let tokenizer = json.to_string().parse().unwrap();
    TextTokenizer {
        tokenizer,
        eos_token_id: END,
        stop_token_ids: vec![END],
        vocab_size: usize::MAX,
        warnings: Vec::new(),
    }
}

/// A sentencepiece vocabulary with byte fallback, which strips the space before a text.
pub fn byte_fallback() -> TextTokenizer {
    let mut vocabulary: serde_json::Map<String, Value> =
        (0..=255).map(|byte| (format!("<0x{byte:02X}>"), json!(byte))).collect();
    let letters = ["</s>", "<unk>", "\u{2581}", "a", "b", "\u{e9}", "\u{20ac}", "\u{2581}a", "ab"];
    vocabulary.extend(letters.iter().zip(256..).map(|(letter, id)| ((*letter).to_owned(), json!(id))));
    let json = json!({
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocabulary,
                  "merges": [["\u{2581}", "a"], ["a", "b"]]},
    });
    TextTokenizer {
        tokenizer: json.to_string().parse().unwrap(),
        eos_token_id: 256,
        stop_token_ids: vec![256],
        vocab_size: usize::MAX,
        warnings: Vec::new(),
    }
}

/// A conversation as `<|begin|><|start|>role: content<|end|>`, with what the test asks for at its front.
pub fn template() -> ChatTemplate {
    let template = "{{ bos_token }}{{ greeting }}{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>\
                    {% endfor %}{% if add_generation_prompt %}<|start|>assistant: {% endif %}";
    let special_tokens = [("bos_token".to_owned(), "<|begin|>".to_owned())].into();
    ChatTemplate { template: template.to_owned(), special_tokens }
}

pub fn task() -> PromptTask {
    PromptTask {
        task: Task::Classification,
        verbalizer: "classify {{input}} Label:".to_owned(),
        labels: vec!["0".to_owned(), "1".to_owned()],
        hard_prompt: "Say 0 or 1.".to_owned(),
        max_output_tokens: 2,
        examples: Vec::new(),
    }
}

/// The base, and the tuned prompts `dogs` with a task and `plain` without.
pub fn models() -> Arc<[Arc<Served>]> {
    let served = |name: &str, virtual_tokens: usize, task: Option<PromptTask>| {
        Arc::new(Served {
            name: name.to_owned(),
            folder: (virtual_tokens > 0).then(|| name.into()),
            virtual_tokens,
            template: task.as_ref().map(|task| Template::parse(&task.verbalizer).unwrap()),
            task,
            loaded: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000),
        })
    };
    Arc::from([served(BASE, 0, None), served("dogs", 10, Some(task())), served("plain", 4, None)])
}

/// Requests that reached the worker, with their models' names.
pub type Seen = Arc<Mutex<Vec<(String, Request)>>>;

/// A server behind which `script` answers. A script gives whether the request had its first step.
pub struct Fake {
    pub app: App,
    pub seen: Seen,
}

pub const LIMITS: Limits = Limits { queue: 8, sequence_tokens: 200, cache_rows: 4096, step_rows: 512 };

impl Fake {
    pub fn new(script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static) -> Self {
        Self::with(Options::default(), Some(template()), script)
    }

    pub fn with(
        options: Options,
        chat_template: Option<ChatTemplate>,
        script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static,
    ) -> Self {
        Self::over(byte_level(), options, chat_template, script)
    }

    /// As [`Fake::with`], of another tokenizer.
    pub fn over(
        tokenizer: TextTokenizer,
        options: Options,
        chat_template: Option<ChatTemplate>,
        mut script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static,
    ) -> Self {
        let (commands, receiver) = mpsc::channel();
        let shared = Shared {
            limits: LIMITS,
            vocab_size: usize::MAX,
            hidden_size: 3,
            waiting: AtomicUsize::new(0),
            models: RwLock::new(models()),
            serving: true.into(),
        };
        let client = Client { commands, shared: Arc::new(shared) };
        let (seen, waiting) = (Seen::default(), client.shared.clone());
        let of_thread = seen.clone();
        std::thread::spawn(move || {
            for command in receiver {
                let (model, request, events) = match command {
                    Command::Submit { model, request, events } => (model, request, events),
                    // What else a worker is told is nothing to a script.
                    _ => continue,
                };
                of_thread.lock().unwrap().push((model, request.clone()));
                if script(&request, events) {
                    waiting.waiting.fetch_sub(1, Ordering::Relaxed);
                }
            }
        });
        let app = App::new(client, tokenizer, chat_template, BASE.to_owned(), options).unwrap();
        Self { app, seen }
    }

    /// A server that answers every request with this text.
    pub fn saying(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        Self::new(move |request, events| say(&bytes, request, &events))
    }

    /// The one request that reached the worker.
    pub fn request(&self) -> (String, Request) {
        let seen = self.seen.lock().unwrap();
        assert_eq!(seen.len(), 1);
        seen[0].clone()
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send("POST", path, &[], body.to_string().into_bytes()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], Vec::new()).await
    }

    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        let mut request = axum::http::Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body)).unwrap();
        let response = TowerToHyperService::new(self.app.router()).call(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        Answer { status: parts.status, headers: parts.headers, text }
    }
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {}", self.text))
    }

    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        self.json()
    }

    /// The JSON of a stream's events, without `[DONE]`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        let data = self.text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// A token with the log-probability -id/8 and, of likeliest tokens, as many as asked for: 65, 66, ...
pub fn token(id: u32, request: &Request) -> Token {
    let logprob = |id: u32| -f64::from(id) / 8.0;
    let top = (0..request.logprobs.unwrap_or(0) as u32).map(|i| (65 + i, logprob(65 + i)));
    Token { id, logprob: request.logprobs.map(|_| logprob(id)), top: top.collect() }
}

/// Answers with each byte as a token, as far as the request lets it.
pub fn say(text: &[u8], request: &Request, events: &UnboundedSender<Event>) -> bool {
    let mut all = Vec::new();
    if request.scored > 0 {
        let first = request.tokens.len() - request.scored;
        let scored = request.tokens[first..].iter().enumerate().map(|(i, id)| {
            let token = token(*id, request);
            Token { logprob: token.logprob.or(Some(-1.0)).filter(|_| first + i > 0), ..token }
        });
        all.push(Event::Scored(scored.collect()));
    }
    if !request.score.is_empty() {
        all.push(Event::FirstScores(request.score.iter().map(|id| -f64::from(*id) / 8.0).collect()));
    }
    all.extend(
        text.iter().take(request.max_new_tokens).map(|id| Event::Token(token(u32::from(*id), request))),
    );
    let cut = text.len() >= request.max_new_tokens;
    all.push(Event::Finished(if cut { StopReason::MaxTokens } else { StopReason::StopToken }));
    // A client that has gone is no concern of the script's.
    all.into_iter().for_each(|event| drop(events.send(event)));
    true
}

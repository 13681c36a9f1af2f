//! A server whose worker is a script: tests examine the requests and invent the answers.

use super::client::{Client, Command, WorkerState};
use crate::checkpoint::TextTokenizer;
use crate::checkpoint::chat_template::ChatTemplate;
pub use crate::checkpoint::tokenizer::testing::{BEGIN, END, START, byte_fallback, byte_level};
use crate::config::Task;
use crate::data::Template;
use crate::generate::{Event, Request, StopReason, Token};
use crate::prompt::peft::PromptTask;
use crate::serve::limits::ServerLimits;
use crate::serve::served::Served;
use crate::serve::state::{App, ServerOptions};
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::time::SystemTime;
use tokio::sync::mpsc::UnboundedSender;

pub const BASE: &str = "org/base";
pub const KEY: &str = "the-key";

/// Codes of refusals.
pub const INVALID: &str = "invalid_value";
pub const MISSING: &str = "missing_required_parameter";
pub const UNSUPPORTED: &str = "unsupported_parameter";
pub const UNKNOWN: &str = "unknown_parameter";
pub const TOO_LONG: &str = "context_length_exceeded";

/// `body` with the fields of `more`.
pub fn with_fields(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more} is no object") };
    body.as_object_mut().unwrap().extend(more);
    body
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
        before: None,
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
            deployment_id: None,
            folder: (virtual_tokens > 0).then(|| name.into()),
            virtual_tokens,
            template: task.as_ref().map(|task| Template::parse(&task.verbalizer).unwrap()),
            task,
            loaded: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000),
            members: Vec::new(),
        })
    };
    Arc::from([served(BASE, 0, None), served("dogs", 10, Some(task())), served("plain", 4, None)])
}

/// Requests that reached the worker, with their models' names.
pub type Seen = Arc<Mutex<Vec<(String, Request)>>>;

/// A server whose worker is replaced by `script`. A script returns whether the request had its first step.
pub struct Fake {
    pub app: App,
    pub seen: Seen,
}

pub const LIMITS: ServerLimits =
    ServerLimits { queue: 8, sequence_tokens: 200, cache_rows: 4096, step_rows: 512 };

impl Fake {
    pub fn new(script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static) -> Self {
        Self::with(ServerOptions::default(), Some(template()), script)
    }

    pub fn with(
        options: ServerOptions,
        chat_template: Option<ChatTemplate>,
        script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static,
    ) -> Self {
        Self::over(byte_level(), options, chat_template, script)
    }

    /// As [`Fake::with`], of another tokenizer.
    pub fn over(
        tokenizer: TextTokenizer,
        options: ServerOptions,
        chat_template: Option<ChatTemplate>,
        mut script: impl FnMut(&Request, UnboundedSender<Event>) -> bool + Send + 'static,
    ) -> Self {
        let (commands, receiver) = mpsc::channel();
        let shared = WorkerState {
            limits: LIMITS,
            vocab_size: usize::MAX,
            hidden_size: 3,
            waiting: AtomicUsize::new(0),
            models: RwLock::new(models()),
            serving: true.into(),
        };
        let client = Client { commands, shared: Arc::new(shared) };
        let (seen, waiting) = (Seen::default(), client.shared.clone());
        let thread_seen = seen.clone();
        std::thread::spawn(move || {
            for command in receiver {
                let (model, request, events) = match command {
                    Command::Submit { model, request, events } => (model, request, events),
                    // A script ignores other commands.
                    _ => continue,
                };
                thread_seen.lock().unwrap().push((model, request.clone()));
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

    /// The same server with a base model of another name, and one tuned prompt.
    pub fn renamed(self, base: &str, tuned: &str) -> Self {
        let renamed = |served: &Arc<Served>, name: &str| {
            Arc::new(Served { name: name.to_owned(), ..(**served).clone() })
        };
        let old = models();
        let new = Arc::from([renamed(&old[0], base), renamed(&old[1], tuned)]);
        *self.app.0.client.shared.models.write().unwrap() = new;
        self
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
        let response =
            TowerToHyperService::new(super::router::router(&self.app.0)).call(request).await.unwrap();
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

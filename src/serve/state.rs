//! What all requests share: the options, the models, the tokenizer, and the handle on the thread that owns the model.

use super::api_error::ApiError;
use super::auth::Auth;
use super::body::{self, BodyLimits};
use super::client::Client;
use super::cors;
use super::metrics::Metrics;
use super::platform::Platform;
use super::served::Served;
use super::tls::Tls;
use crate::checkpoint::TextTokenizer;
use crate::checkpoint::chat_template::{ChatTemplate, Renderer};
use crate::{Error, Result};
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower_http::cors::CorsLayer;

/// Options of a server.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerOptions {
    /// The key that requests must have as `Authorization: Bearer KEY`, `api-key` or `x-api-key`; none.
    pub api_key: Option<String>,
    /// Most bytes of a request's body, compressed and decompressed; 4 MiB.
    pub max_body_bytes: usize,
    /// Most tokens of a chat's answer if the request does not say, if there is room for them; 512.
    pub max_new_tokens: usize,
    /// Most seconds from a request to the end of its text; 300.
    pub request_seconds: f64,
    /// Most seconds for a request's head, and between two requests of a connection; 30.
    pub header_seconds: f64,
    /// Most seconds for a request's body; 30.
    pub body_seconds: f64,
    /// Most seconds that requests in progress get when the server ends; 30.
    pub grace_seconds: f64,
    /// Most connections at a time. More wait to be accepted; 1024.
    pub max_connections: usize,
    /// Whether requests may have embeddings instead of text. Only for clients that are trusted with tensors; no.
    pub prompt_embeds: bool,
    /// The certificate and key for HTTPS, which IBM's SDK requires; none.
    pub tls: Option<Tls>,
    /// Signs the tokens of clients; random by default. Servers with the same secret accept each other's tokens.
    pub token_secret: [u8; 32],
    /// Other names that requests may use for the base model; none.
    pub base_aliases: Vec<String>,
    /// Origins of web pages that may use the server, as browsers send them, or `*` for every page; none.
    pub cors_origins: Vec<String>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_key: None,
            max_body_bytes: 4 << 20,
            max_new_tokens: 512,
            request_seconds: 300.0,
            header_seconds: 30.0,
            body_seconds: 30.0,
            grace_seconds: 30.0,
            max_connections: 1024,
            prompt_embeds: false,
            tls: None,
            token_secret: rand::random(),
            base_aliases: Vec::new(),
            cors_origins: Vec::new(),
        }
    }
}

/// The server without its connections.
#[derive(Clone)]
pub struct App(pub(crate) Arc<AppState>);

/// The state that all requests share.
pub(crate) struct AppState {
    pub client: Client,
    pub tokenizer: TextTokenizer,
    /// The chat template, or why it cannot be used; `None` if the checkpoint has none.
    pub chat: Option<std::result::Result<Renderer, String>>,
    /// The base model's name.
    pub model_id: String,
    pub options: ServerOptions,
    pub auth: Auth,
    pub metrics: Arc<Metrics>,
    pub started: SystemTime,
    /// All token ids are below this.
    pub vocabulary: u32,
    /// Length of the longest token in bytes.
    pub longest_token: usize,
    /// Limits the number of large texts that are tokenized at a time.
    pub tokenizing: Arc<Semaphore>,
    pub tls: Option<TlsAcceptor>,
    pub cors: Option<CorsLayer>,
    /// What manages models and deployments in place of the routes that describe them.
    pub platform: Option<Platform>,
    /// The states of the server's other models.
    pub others: Vec<Arc<AppState>>,
    ending: AtomicBool,
}

impl App {
    /// A server of the models of `client`. `model_id` is the base model's name, `chat_template` the checkpoint's own
    /// template (see [`find_chat_template`](crate::checkpoint::find_chat_template)).
    ///
    /// # Errors
    /// Returns an error if no request could have the API key, a time is not a number of seconds over 0, the certificate
    /// or key cannot be used, or an origin is invalid.
    pub fn new(
        client: Client,
        tokenizer: TextTokenizer,
        chat_template: Option<ChatTemplate>,
        model_id: String,
        options: ServerOptions,
    ) -> Result<Self> {
        let times =
            [options.request_seconds, options.header_seconds, options.body_seconds, options.grace_seconds];
        for seconds in times {
            if !(seconds > 0.0 && seconds < 1e9) {
                return Err(Error::Invalid(format!(
                    "a time limit of the server: expected seconds over 0, found {seconds}"
                )));
            }
        }
        let vocabulary = tokenizer.tokenizer.get_vocab(true);
        let largest = vocabulary.values().max().map_or(0, |id| id + 1);
        // Requests cannot use a token without a row of the embedding.
        let largest = largest.min(u32::try_from(tokenizer.vocab_size).unwrap_or(u32::MAX));
        let longest_token = vocabulary.keys().map(String::len).max().unwrap_or(1);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self(Arc::new(AppState {
            client,
            chat: chat_template.map(|template| Renderer::new(&template)),
            tokenizer,
            model_id,
            auth: Auth::new(options.api_key.clone(), &options.token_secret)?,
            tls: options.tls.as_ref().map(Tls::acceptor).transpose()?,
            cors: cors::layer(&options.cors_origins)?,
            platform: None,
            others: Vec::new(),
            options,
            metrics: Arc::default(),
            started: SystemTime::now(),
            vocabulary: largest,
            longest_token,
            tokenizing: Arc::new(Semaphore::new(threads)),
            ending: AtomicBool::new(false),
        })))
    }

    /// Counts into `metrics`, which the worker's thread uses too.
    #[must_use]
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Self {
        self.changed(|state| state.metrics = metrics)
    }

    /// Adds the routes of `platform`, which manages models and deployments.
    #[must_use]
    pub fn with_platform(self, platform: Platform) -> Self {
        self.changed(|state| state.platform = Some(platform))
    }

    /// Serves the models of `others` too. A request goes to the one that it names.
    #[must_use]
    pub fn with_others(self, others: Vec<App>) -> Self {
        self.changed(|state| state.others = others.into_iter().map(|other| other.0).collect())
    }

    fn changed(self, change: impl FnOnce(&mut AppState)) -> Self {
        let mut state = Arc::into_inner(self.0).expect("an app that was just made has one owner");
        change(&mut state);
        Self(Arc::new(state))
    }

    /// Whether the checkpoint has a chat template that can be used.
    pub fn chats(&self) -> bool {
        self.0.chats()
    }

    /// Why the checkpoint's chat template cannot be used, if so. Requests to `/v1/chat/completions` are then refused
    /// with this message.
    pub fn chat_problem(&self) -> Option<&str> {
        self.0.chat.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// Refuses requests from now on, because the server is ending.
    pub(super) fn end(&self) {
        self.0.all().for_each(|one| one.ending.store(true, Ordering::Relaxed));
    }
}

impl AppState {
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Whether the checkpoint has a chat template that can be used.
    pub fn chats(&self) -> bool {
        matches!(self.chat, Some(Ok(_)))
    }

    /// The deadline of a request that arrives now, `seconds` being its own limit.
    pub fn deadline(&self, seconds: f64) -> Option<Instant> {
        Instant::now().checked_add(Duration::from_secs_f64(self.options.request_seconds.min(seconds)))
    }

    /// This state and those of the server's other models.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.others.iter().map(|other| &**other))
    }

    /// Numbers of waiting requests and of models, of the whole server.
    pub fn counts(&self) -> (usize, usize) {
        let counts = self.all().map(|one| (one.client.waiting(), one.client.models().len()));
        counts.fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
    }

    /// The model of this name among those of this state.
    pub fn own_model(&self, name: &str) -> Option<Arc<Served>> {
        let name_of_base = self.options.base_aliases.iter().any(|alias| alias == name);
        let is_named = |served: &&Arc<Served>| served.name == name || (name_of_base && served.is_base());
        self.client.models().iter().find(is_named).cloned()
    }

    /// The model of this name.
    ///
    /// # Errors
    /// Returns 404 if there is none.
    pub fn model(&self, name: &str) -> std::result::Result<Arc<Served>, ApiError> {
        self.own_model(name).ok_or_else(|| {
            let of_one = |one: &Self| {
                let served: Vec<String> =
                    one.client.models().iter().map(|served| served.name.clone()).collect();
                served.into_iter().chain(one.options.base_aliases.iter().cloned()).collect::<Vec<_>>()
            };
            ApiError::model_not_found(name, &self.all().flat_map(of_one).collect::<Vec<_>>())
        })
    }

    /// The server's address as the client of a request with `headers` wrote it.
    pub fn origin(&self, headers: &HeaderMap) -> Option<String> {
        let host = headers.get(header::HOST)?.to_str().ok()?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Some(format!("{scheme}://{host}"))
    }

    /// The limits of a request's body.
    pub fn body_limits(&self) -> BodyLimits {
        BodyLimits { bytes: self.options.max_body_bytes, seconds: self.options.body_seconds }
    }

    /// Reads the body of a request.
    ///
    /// # Errors
    /// Returns the errors of [`body::read`] and [`body::object`].
    pub async fn read(&self, request: Request) -> std::result::Result<RequestBody, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = body::read(self.body_limits(), &parts.headers, body).await?;
        let object = body::object(&bytes)?;
        let label = parts.extensions.get::<ModelLabel>().cloned().unwrap_or_default();
        Ok(RequestBody { object, bytes, label })
    }
}

/// A request's JSON object, its bytes, and the place for the name of its model.
pub(crate) struct RequestBody {
    pub object: Map<String, Value>,
    pub bytes: Bytes,
    pub label: ModelLabel,
}

/// The name of the model that a request is for, set by the request's handler for the metrics.
#[derive(Clone, Default)]
pub(crate) struct ModelLabel(Arc<OnceLock<String>>);

impl ModelLabel {
    pub fn set(&self, model: &Served) {
        // A request is for one model: the first name stays.
        let _ = self.0.set(model.name.clone());
    }

    /// The name; empty if the request named no model of this server.
    pub fn get(&self) -> &str {
        self.0.get().map(String::as_str).unwrap_or_default()
    }
}

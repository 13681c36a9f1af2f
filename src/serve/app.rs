//! The routes, and what every request gets: the key's check, an answer whatever happens, its form, a count.

use super::adapters::Served;
use super::auth::Auth;
use super::client::Client;
use super::failure::Failure;
use super::metrics::Metrics;
use super::paths::{self, cleaned};
use super::tls::Tls;
use super::{body, classify, cors, openai, watsonx};
use crate::Result;
use crate::checkpoint::TextTokenizer;
use crate::checkpoint::chat_template::{ChatTemplate, Renderer};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower_http::cors::CorsLayer;

/// What a server keeps for its clients.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The key that requests have to show as `Authorization: Bearer KEY`, `api-key` or `x-api-key`; none.
    pub api_key: Option<String>,
    /// Most bytes of a request's body, packed and unpacked; 4 MiB.
    pub max_body_bytes: usize,
    /// Tokens of a chat's answer where the request does not say, as far as there is room for them; 512.
    pub max_new_tokens: usize,
    /// Most seconds from a request to the end of its text; 300.
    pub request_seconds: f64,
    /// Most seconds for a request's head, and between two requests of a connection; 30.
    pub header_seconds: f64,
    /// Most seconds for a request's body; 30.
    pub body_seconds: f64,
    /// Most seconds that requests under way get when the server ends; 30.
    pub grace_seconds: f64,
    /// Most connections at a time; more wait to be accepted; 1024.
    pub max_connections: usize,
    /// Whether requests may bring embeddings in the place of text: only from clients that are trusted with tensors; no.
    pub prompt_embeds: bool,
    /// With these the server speaks HTTPS, which IBM's SDK insists on; none.
    pub tls: Option<Tls>,
    /// Origins of pages that may use the server, as browsers send them, or `*` for every page; none.
    pub cors_origins: Vec<String>,
}

impl Default for Options {
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
            cors_origins: Vec::new(),
        }
    }
}

/// The server, but for its connections.
#[derive(Clone)]
pub struct App(pub(super) Arc<Shared>);

/// What all requests share.
pub(super) struct Shared {
    pub client: Client,
    pub tokenizer: TextTokenizer,
    /// The chat template, or why it can't be used; none where the checkpoint has none.
    pub chat: Option<std::result::Result<Renderer, String>>,
    /// The base model's name.
    pub model_id: String,
    pub options: Options,
    pub auth: Auth,
    pub metrics: Arc<Metrics>,
    pub started: SystemTime,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// Bytes of the longest token.
    pub longest_token: usize,
    /// Large texts that are tokenized at a time.
    pub tokenizing: Arc<Semaphore>,
    pub tls: Option<TlsAcceptor>,
    cors: Option<CorsLayer>,
    ending: AtomicBool,
}

impl App {
    /// A server of what `client` reaches. `model_id` is the base model's name, `chat_template` the checkpoint's own
    /// (see [`find_chat_template`](crate::checkpoint::find_chat_template)).
    ///
    /// # Errors
    /// An API key that no request could show; a time that is no number of seconds over 0; a certificate or key that
    /// can't be used; what is no origin.
    pub fn new(
        client: Client,
        tokenizer: TextTokenizer,
        chat_template: Option<ChatTemplate>,
        model_id: String,
        options: Options,
    ) -> Result<Self> {
        let times =
            [options.request_seconds, options.header_seconds, options.body_seconds, options.grace_seconds];
        for seconds in times {
            if !(seconds > 0.0 && seconds < 1e9) {
                return Err(crate::Error::Invalid(format!(
                    "a time limit of the server: expected seconds over 0, found {seconds}"
                )));
            }
        }
        let vocabulary = tokenizer.tokenizer.get_vocab(true);
        let largest = vocabulary.values().max().map_or(0, |id| id + 1);
        // A token without a row of the embedding can't be asked for.
        let largest = largest.min(u32::try_from(tokenizer.vocab_size).unwrap_or(u32::MAX));
        let longest_token = vocabulary.keys().map(String::len).max().unwrap_or(1);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self(Arc::new(Shared {
            client,
            chat: chat_template.map(|template| Renderer::new(&template)),
            tokenizer,
            model_id,
            auth: Auth::new(options.api_key.clone())?,
            tls: options.tls.as_ref().map(Tls::acceptor).transpose()?,
            cors: cors::layer(&options.cors_origins)?,
            options,
            metrics: Arc::default(),
            started: SystemTime::now(),
            vocabulary: largest,
            longest_token,
            tokenizing: Arc::new(Semaphore::new(threads)),
            ending: AtomicBool::new(false),
        })))
    }

    /// Counts into `metrics`, which the worker's thread has too.
    #[must_use]
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Self {
        let shared = Arc::into_inner(self.0).expect("an app that was just made has one owner");
        Self(Arc::new(Shared { metrics, ..shared }))
    }

    /// Why the checkpoint's chat template can't be used, where that is so: requests to `/v1/chat/completions` are
    /// refused with this.
    pub fn chat_problem(&self) -> Option<&str> {
        self.0.chat.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// From now on requests are refused: the server is ending.
    pub(super) fn end(&self) {
        self.0.ending.store(true, Ordering::Relaxed);
    }

    /// All routes. A path that is none of them is looked for once more with its slashes in order.
    pub(super) fn router(&self) -> Router {
        let routes = Router::new()
            .route("/", get(page))
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .merge(openai::routes())
            .merge(watsonx::routes())
            .merge(classify::routes())
            .fallback(no_route)
            .method_not_allowed_fallback(wrong_method)
            .with_state(self.0.clone());
        let service = TowerToHyperService::new(routes.clone());
        let again = move |mut request: Request| {
            *request.uri_mut() = with_clean_path(request.uri());
            service.call(request)
        };
        let routes = routes.fallback(again).layer(from_fn_with_state(self.0.clone(), around));
        match &self.0.cors {
            Some(layer) => cors::allow(routes, layer.clone()),
            None => routes,
        }
    }
}

/// The address with its path [`cleaned`].
fn with_clean_path(uri: &Uri) -> Uri {
    let mut clean = cleaned(uri.path());
    if let Some(query) = uri.query() {
        clean = format!("{clean}?{query}");
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(clean).ok().or(parts.path_and_query);
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

impl Shared {
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Whether the checkpoint has a chat template that can be used.
    pub fn chats(&self) -> bool {
        matches!(self.chat, Some(Ok(_)))
    }

    /// The latest end of a request that comes now, `seconds` being its own limit.
    pub fn deadline(&self, seconds: f64) -> Option<Instant> {
        Instant::now().checked_add(Duration::from_secs_f64(self.options.request_seconds.min(seconds)))
    }

    /// The model of that name.
    ///
    /// # Errors
    /// 404.
    pub fn model(&self, name: &str) -> std::result::Result<Arc<Served>, Failure> {
        let models = self.client.models();
        match models.iter().find(|served| served.name == name) {
            Some(served) => Ok(served.clone()),
            None => {
                let names: Vec<String> = models.iter().map(|served| served.name.clone()).collect();
                Err(Failure::model_not_found(name, &names))
            }
        }
    }

    /// The body of a request: its JSON object and its bytes; and where to put the model's name.
    ///
    /// # Errors
    /// See [`body::read`] and [`body::object`].
    pub async fn read(&self, request: Request) -> std::result::Result<Asked, Failure> {
        let (parts, body) = request.into_parts();
        let bytes = body::read(&self.options, &parts.headers, body).await?;
        let object = body::object(&bytes)?;
        let label = parts.extensions.get::<Label>().cloned().unwrap_or_default();
        Ok(Asked { object, bytes, label })
    }
}

/// A request's body.
pub(super) struct Asked {
    pub object: Map<String, Value>,
    pub bytes: Bytes,
    pub label: Label,
}

/// The name of the model that a request turned out to be for.
#[derive(Clone, Default)]
pub(super) struct Label(Arc<OnceLock<String>>);

impl Label {
    pub fn set(&self, model: &Served) {
        // A request is for one model; the first is it.
        let _ = self.0.set(model.name.clone());
    }
}

/// Whether a path is one of watsonx's API, whose errors have its form.
pub(super) fn is_watsonx(path: &str) -> bool {
    ["/ml/", "/icp4d-api/", "/v2/"].iter().any(|prefix| path.starts_with(prefix))
}

/// Paths that need no key: a page without data, whether the server lives, and what clients ask before they have a token.
const OPEN: [&str; 4] = ["/", "/health", watsonx::AUTHORIZE, watsonx::VERSION];

/// What every request gets.
async fn around(State(app): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let path = cleaned(request.uri().path());
    let label = Label::default();
    request.extensions_mut().insert(label.clone());
    let open = OPEN.contains(&path.as_str());
    let response = if app.is_ending() && !matches!(path.as_str(), "/health" | "/metrics") {
        Failure::ending().into_response()
    } else if let Err(failure) = if open { Ok(()) } else { app.auth.check(request.headers()) } {
        failure.into_response()
    } else {
        let answer = unwinding(next.run(request)).await;
        answer.unwrap_or_else(|| {
            Failure::internal("the server failed at this request; its log says how").into_response()
        })
    };
    let response = match response.extensions().get::<Failure>() {
        Some(failure) => failure.render(&path),
        // The router's own refusal, of a path whose letters it can't take.
        None if response.status().is_client_error() => {
            let message = format!("expected a path that is UTF-8 once it is decoded, found {path}");
            Failure::new(response.status(), "invalid_path", message).render(&path)
        }
        None => response,
    };
    let api = match path.as_str() {
        path if is_watsonx(path) => "watsonx",
        "/v1/classify" | "/v1/tasks" => "gneiss",
        path if path.starts_with("/v1/") => "openai",
        _ => "server",
    };
    let model = label.0.get().map(String::as_str).unwrap_or_default();
    app.metrics.answered(api, model, response.status().as_u16());
    response
}

/// What a future comes to; `None` where it panicked.
async fn unwinding<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    // Nothing of the future is used again behind a panic; what requests share keeps no half-done work under its locks.
    std::future::poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        polled.map_or(Poll::Ready(None), |poll| poll.map(Some))
    })
    .await
}

/// The page to try the server with: nothing of it comes from elsewhere.
async fn page() -> Response {
    const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                          connect-src 'self'; img-src data:";
    let mut response = Html(include_str!("page.html")).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn health(State(app): State<Arc<Shared>>) -> Response {
    let (status, word) = match (app.is_ending(), app.client.is_serving()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "ending"),
        (_, false) => (StatusCode::SERVICE_UNAVAILABLE, "the model's thread has ended"),
        _ => (StatusCode::OK, "ok"),
    };
    let waiting = app.client.waiting();
    let models = app.client.models().len();
    (status, axum::Json(json!({"status": word, "models": models, "waiting": waiting}))).into_response()
}

async fn metrics(State(app): State<Arc<Shared>>) -> Response {
    let text = app.metrics.text(app.client.waiting(), app.client.models().len());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn no_route(State(app): State<Arc<Shared>>, request: Request) -> Failure {
    let (method, path) = (request.method(), request.uri().path());
    let origin = origin(&app, request.headers());
    let message = format!("there is nothing at {method} {path}{}", paths::hint(path, origin.as_deref()));
    Failure::new(StatusCode::NOT_FOUND, "not_found", message)
}

/// The server's address as a client wrote it.
pub(super) fn origin(app: &Shared, headers: &HeaderMap) -> Option<String> {
    let host = headers.get(header::HOST)?.to_str().ok()?;
    let scheme = if app.tls.is_some() { "https" } else { "http" };
    Some(format!("{scheme}://{host}"))
}

/// `OPTIONS` asks which methods there are, which the router says in `Allow`; a browser asks so for a page's script.
async fn wrong_method(request: Request) -> std::result::Result<StatusCode, Failure> {
    let (method, path) = (request.method(), request.uri().path());
    let preflight = request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if method == Method::OPTIONS && !preflight {
        return Ok(StatusCode::NO_CONTENT);
    }
    let hint = match *method {
        _ if preflight => {
            ": this server answers no page of another origin unless its operator allows it (gneiss serve --cors-origin)"
        }
        // What can't be read is written, and the other way round.
        Method::GET | Method::HEAD => "; it takes POST",
        Method::POST => "; it takes GET",
        _ => "",
    };
    let message = format!("{path} is not for {method}{hint}");
    Err(Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message))
}

#[cfg(test)]
mod tests;

//! The routes of all APIs, and what every request goes through: the check of the key, the form of errors, the metrics.

use super::api::{self, Api};
use super::api_error::ApiError;
use super::cors;
use super::dispatch;
use super::page;
use super::paths::{self, cleaned};
use super::state::{AppState, ModelLabel};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use std::any::Any;
use std::sync::Arc;
use tower_http::catch_panic::CatchPanicLayer;

/// All routes, and those of the other models of the server.
pub(super) fn router(state: &Arc<AppState>) -> Router {
    let routes = dispatch::by_model(routes_of_one(state), state);
    match &state.cors {
        Some(layer) => cors::allow(routes, layer.clone()),
        None => routes,
    }
}

/// All routes of one state. A path that matches none of them is tried once more after [`cleaned`] has put its slashes in order.
pub(super) fn routes_of_one(state: &Arc<AppState>) -> Router {
    let routes = Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .merge(api::routes())
        .merge(state.platform.as_ref().map_or_else(fixed_routes, |platform| platform.routes.clone()))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(state.clone());
    let service = TowerToHyperService::new(routes.clone());
    let retry = move |mut request: Request| {
        *request.uri_mut() = with_clean_path(request.uri());
        service.call(request)
    };
    with_layers(routes.fallback(retry), state)
}

/// The routes that a [`super::Platform`] replaces.
fn fixed_routes() -> Router<Arc<AppState>> {
    api::fixed_routes().route("/", get(page::show_try_page))
}

/// Adds what every request goes through.
fn with_layers(routes: Router, state: &Arc<AppState>) -> Router {
    routes.layer(CatchPanicLayer::custom(panicked)).layer(from_fn_with_state(state.clone(), check_and_count))
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

/// Checks the key, gives errors the form of the request's API, and counts the answer.
async fn check_and_count(State(state): State<Arc<AppState>>, mut request: Request, next: Next) -> Response {
    let path = cleaned(request.uri().path());
    let api = Api::for_path(&path);
    let label = ModelLabel::default();
    request.extensions_mut().insert(label.clone());
    let response = match refusal(&state, &request, &path) {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    };
    let response = match response.extensions().get::<ApiError>() {
        Some(error) => error.with_body((api.error_body)(error)),
        // axum refuses a path whose encoded bytes are not UTF-8.
        None if response.status().is_client_error() => {
            let message = format!("expected a path that is UTF-8 once it is decoded, found {path}");
            let error = ApiError::new(response.status(), "invalid_path", message);
            error.with_body((api.error_body)(&error))
        }
        None => response,
    };
    state.metrics.count_answer(api.name, label.get(), response.status().as_u16());
    response
}

/// Why a request to a [`cleaned`] path is refused before anyone looks at it.
pub(super) fn refusal(state: &AppState, request: &Request, path: &str) -> Option<ApiError> {
    if state.is_ending() && !matches!(path, "/health" | "/metrics") {
        return Some(ApiError::ending());
    }
    if is_from_another_page(state, request) {
        let message = "this server takes no requests of pages of another origin";
        return Some(ApiError::new(StatusCode::FORBIDDEN, "other_origin", message));
    }
    let has_permission =
        state.platform.as_ref().is_some_and(|platform| (platform.needs_no_key)(request.method(), path));
    let needs_key = !has_permission && !api::WITHOUT_KEY.contains(&path);
    if needs_key { state.auth.check(request.headers()).err() } else { None }
}

/// Whether a page of another origin sends a request to a server that keeps what clients create.
fn is_from_another_page(state: &AppState, request: &Request) -> bool {
    let own = state.origin(request.headers());
    state.platform.is_some()
        && cors::is_from_another_page(request.method(), request.headers(), own.as_deref())
}

/// The answer to a request whose handler panicked.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal("the server failed at this request; its log says how").into_response()
}

async fn health(State(state): State<Arc<AppState>>) -> Response {
    let is_serving = state.all().all(|one| one.client.is_serving());
    let (status, word) = match (state.is_ending(), is_serving) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "ending"),
        (_, false) => (StatusCode::SERVICE_UNAVAILABLE, "the model's thread has ended"),
        _ => (StatusCode::OK, "ok"),
    };
    let (waiting, models) = state.counts();
    (status, axum::Json(json!({"status": word, "models": models, "waiting": waiting}))).into_response()
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let (waiting, models) = state.counts();
    let text = state.metrics.text(waiting, models);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn unknown_path(State(state): State<Arc<AppState>>, request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let origin = state.origin(request.headers());
    let message = format!("there is nothing at {method} {path}{}", paths::hint(path, origin.as_deref()));
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

/// `OPTIONS` asks which methods there are, which the router says in `Allow`; a browser asks so for a page's script.
async fn wrong_method(request: Request) -> Result<StatusCode, ApiError> {
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
    Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message))
}

#[cfg(test)]
mod tests;

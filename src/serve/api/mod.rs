//! The server's APIs. Each has routes, parameters, and a form of its errors.

pub mod gneiss;
pub mod openai;
pub mod watsonx;

use super::api_error::ApiError;
use super::state::AppState;
use axum::Router;
use serde_json::Value;
use std::sync::Arc;

/// What the router knows of an API.
pub(super) struct Api {
    /// Its name in the metrics.
    pub name: &'static str,
    /// The JSON body of an error.
    pub error_body: fn(&ApiError) -> Value,
}

/// The page, the health check, the metrics, and paths that belong to no API.
const SERVER: Api = Api { name: "server", error_body: openai::error_body };

impl Api {
    /// The API that a [cleaned](super::paths::cleaned) path belongs to.
    pub fn for_path(path: &str) -> &'static Self {
        if watsonx::PREFIXES.iter().any(|prefix| path.starts_with(prefix)) {
            &watsonx::API
        } else if gneiss::PATHS.contains(&path) {
            &gneiss::API
        } else if path.starts_with(openai::PREFIX) {
            &openai::API
        } else {
            &SERVER
        }
    }
}

/// Paths that need no key: a page without data, the health check, and what watsonx's clients request before they have a
/// token.
pub(super) const WITHOUT_KEY: [&str; 4] = ["/", "/health", watsonx::AUTHORIZE, watsonx::VERSION];

/// The routes of all APIs, except those that describe the models in watsonx's API.
pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new().merge(openai::routes()).merge(watsonx::routes()).merge(gneiss::routes())
}

/// Routes that describe the models in watsonx's API, for a server without a [`Platform`](super::platform::Platform).
pub(super) fn fixed_routes() -> Router<Arc<AppState>> {
    watsonx::fixed_routes()
}

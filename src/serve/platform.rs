//! Routes of another folder, which manage models and deployments in place of the fixed ones of `gneiss serve`.

use super::state::AppState;
use axum::Router;
use axum::http::Method;
use std::sync::Arc;

/// A part of watsonx's API that a server may replace: projects, models to tune, deployments.
pub struct Platform {
    /// The routes.
    pub(crate) routes: Router<Arc<AppState>>,
    /// Whether requests to a path, without needless slashes, need no key, because they have a permission of their own.
    pub(crate) needs_no_key: fn(&Method, &str) -> bool,
}

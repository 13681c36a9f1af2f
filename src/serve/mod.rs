//! A server of the base model and of tuned prompts, over HTTP.
//!
//! ```text
//! state.rs        what all requests share           worker.rs   the one thread that owns the model; client.rs: its handle
//! served.rs       base and tuned prompts, by name   watch.rs    a folder of adapters that is loaded as it changes
//! ensemble.rs     prompts that answer together      label_scores.rs    likelihoods of labels after a text
//! api/openai/     /v1/completions, /v1/chat/completions, /v1/responses, /v1/models
//! api/watsonx/    /ml/v1/.../text/generation and chat, and what IBM's SDK requests first
//! api/gneiss/     /v1/classify, /v1/tasks
//! fields.rs       which fields of a request have an effect, have none, or are refused, by route
//! router.rs       all routes; key, errors, metrics  paths.rs    paths that clients get wrong
//! server.rs       connections, shutdown             cors.rs     pages of other origins
//! turns.rs        who uses the device               platform.rs routes that manage models and deployments
//! page.rs         the page to try prompts         dispatch.rs several models in one server
//! ```
//!
//! A request's way: body → parameters → token ids → [`client::Client::submit`] → events → text → JSON.

mod api;
pub(crate) mod api_error;
pub(crate) mod auth;
pub(crate) mod body;
mod choices;
pub mod client;
mod content_encoding;
mod cors;
mod dispatch;
mod embeds;
mod ensemble;
pub(crate) mod fields;
mod generation;
mod label_scores;
mod limits;
mod metrics;
pub(crate) mod page;
pub(crate) mod params;
mod paths;
mod platform;
mod prompt;
mod router;
mod schema;
pub mod served;
mod server;
mod sse;
pub(crate) mod state;
#[cfg(test)]
pub(crate) mod testing;
mod tls;
pub mod turns;
pub mod watch;
pub mod worker;

pub use limits::{ServerLimits, serving_limits};
pub use metrics::Metrics;
pub use platform::Platform;
pub use server::serve;
pub use state::{App, ServerOptions};
pub use tls::Tls;

//! A server of the base model and of tuned prompts, over HTTP.
//!
//! ```text
//! server.rs   connections, shutdown          worker.rs    the one thread that owns the model; client.rs: its handle
//! app.rs      routes, what all requests get  adapters.rs  base and tuned prompts, by name
//! openai/     /v1/completions, /v1/chat/completions, /v1/responses, /v1/models
//! watsonx/    /ml/v1/.../text/generation and chat, and what IBM's SDK asks before it
//! cors.rs     pages of other origins         paths.rs     paths that clients get wrong
//! classify.rs /v1/classify, /v1/tasks: gneiss's own
//! fields.rs   which fields of a request are obeyed, make no difference or are refused, by route
//! ```
//!
//! A request's way: body → parameters → token ids → [`client::Client::submit`] → events → text → JSON.

pub mod adapters;
mod app;
mod auth;
mod body;
mod choices;
mod classify;
pub mod client;
mod content_encoding;
mod cors;
mod embeds;
mod failure;
mod fields;
mod generation;
mod limits;
mod metrics;
mod openai;
mod params;
mod paths;
mod prompt;
mod schema;
mod server;
mod sse;
#[cfg(test)]
mod testing;
mod tls;
mod watsonx;
pub mod worker;

pub use app::{App, Options};
pub use limits::{Limits, serving_limits};
pub use metrics::Metrics;
pub use server::serve;
pub use tls::Tls;

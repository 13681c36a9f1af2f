//! The server: the thread that owns the model, the folder of adapters, and clients over HTTP.

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod worker;

//! The server: the thread that owns the model, the folder of adapters, clients over HTTP, and IBM's
//! notebook.

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod watsonx;
mod worker;

//! The server: the thread that owns the model, the folder of adapters, and clients over HTTP.

mod clients;
#[path = "../common/python.rs"]
mod python;
mod worker;

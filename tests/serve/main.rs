//! The server: the thread that owns the model, the folder of adapters, and clients over HTTP.

mod worker;

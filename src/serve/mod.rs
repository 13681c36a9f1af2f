//! A server of the base model and of tuned prompts, over HTTP.

pub mod adapters;
pub mod worker;

//! What several test crates use. Each of them uses a part only.
#![allow(dead_code)]

pub mod close;
pub mod python;
pub mod server;
pub mod smollm2;
pub mod word_level;

//! The report of a run: what its page holds, its pictures, and how a browser takes it.

mod browser;
mod command;
#[path = "../common/mod.rs"]
mod common;
mod odd;
mod page;
mod pictures;
mod runs;
mod sweep;

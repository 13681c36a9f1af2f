//! The report of a run: what its page holds, its pictures, and how a browser takes it.

mod browser;
mod command;
mod odd;
mod page;
mod pictures;
#[path = "../common/python.rs"]
mod python;
mod runs;

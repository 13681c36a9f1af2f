//! Tuned prompts in other engines' formats, against transformers, PEFT, torch, the gguf package and llama.cpp.

mod after_head;
mod bake;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod embeds;
mod engines;
mod errors;
mod fixtures;
mod gguf;

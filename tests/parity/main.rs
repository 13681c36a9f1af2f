//! gneiss against transformers and PEFT, by the fixtures that `tests/golden/generate.py` makes.

mod after_head;
mod bf16;
mod cases;
mod checkpoints;
mod choices;
#[path = "../common/mod.rs"]
mod common;
mod distillation;
mod finite_differences;
mod fixtures;
mod generation;
mod gguf;
mod peft;
mod peft_kinds;
mod prefixes;
mod smollm2;
mod training;

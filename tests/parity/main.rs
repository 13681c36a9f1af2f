//! gneiss against transformers and PEFT, by the fixtures that `tests/golden/generate.py` makes.

mod bf16;
mod cases;
mod checkpoints;
mod choices;
mod finite_differences;
mod fixtures;
mod generation;
#[path = "../common/smollm2.rs"]
mod model_file;
mod peft;
#[path = "../common/python.rs"]
mod python;
mod smollm2;
mod training;

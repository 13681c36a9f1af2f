//! What the ops run on: the CPU in f32 and f64 ([`cpu`]), the CPU's products of bf16 ([`bf16`]), and GPUs ([`gpu`]).

pub(crate) mod bf16;
pub(crate) mod cpu;
pub(crate) mod gpu;

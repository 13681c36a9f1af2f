//! The model: the shapes under `configs/models`. `memory.rs` and `loading.rs` are test crates of their own, because they count
//! what the allocator gives out.

mod shapes;

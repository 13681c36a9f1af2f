//! Throughput of tuning: time and memory of a step, and the fraction of the device's peak that it reaches.
//!
//! ```text
//! examples (made, of a file, of a dataset)
//!    └─ Case: batch_size x accumulate_steps, num_virtual_tokens
//!          └─ Trainer: warm-up steps, counted steps, the device idle at the end of each, a CPU's canary between them
//!                └─ Measured: time, rates, useful FLOPs, peak memory ── and, in a run of its own, time per op
//! ```

pub mod canary;
pub mod data_sheet;
pub mod examples;
pub mod launches;
pub mod matmul;
pub mod measure;
pub mod measured;
pub mod products;
mod sustained;

pub use canary::Canary;
pub use examples::Lengths;

pub use launches::Launches;
pub use matmul::MatmulPeak;
pub use measure::{Bench, Case, ExampleSource};
pub use measured::{AllSteps, Figures, Measured, OpShare, Profile, Spread};
pub use products::{LayerProduct, StepProducts};

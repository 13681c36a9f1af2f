//! A frozen checkpoint: where it comes from, what its configuration says, its weights, and the
//! forward and backward pass over a packed batch.

pub mod granite;
mod infer;
pub mod kv_cache;
pub mod memory;
pub mod pass;
mod prepare;
pub mod random;
pub mod tape;

pub use granite::{Dtypes, Granite};
pub use kv_cache::{KvCache, Next};
pub use memory::{Parameters, TuningMemory};
pub use tape::Tape;

//! The frozen decoder: its weights, and the forward and backward pass over a packed batch.

mod backward;
mod decoder;
mod decoding;
pub mod flops;
mod forward;
mod head;
mod keys_values;
mod kv_cache;
mod layer;
mod load;
pub mod memory;
mod prepare;
mod random;
mod tape;

pub use backward::{Backward, Prefixes};
pub use decoder::{Decoder, Dtypes};
pub(crate) use decoding::{Decoding, StepLogits};
pub use flops::Flops;
pub(crate) use forward::GPU_FULL_ROWS;
pub use forward::PrefixPass;
pub use head::HeadLoss;
pub(crate) use keys_values::{join, split};
pub use keys_values::{keys_values_gradient, keys_values_width};
pub use kv_cache::{Continuation, KvCache};
pub use layer::{PrefixGradient, PrefixState};
pub use memory::{Parameters, TuningMemory};
pub use tape::Tape;

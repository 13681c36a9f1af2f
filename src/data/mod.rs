//! From files to packed batches: dataset → template → token ids → [packed batch](pack).

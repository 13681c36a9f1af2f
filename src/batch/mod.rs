//! The packed batch: every row of every prefix and sequence in one matrix, without padding.
//!
//! ```text
//! row   0 ...... P0 ...... P0+P1 ......                                          T
//!       ┌ prefix 0 ┐┌ prefix 1 ┐┌ seq 0 of 0 ┐┌ seq 1 of 0 ┐┌ seq 0 of 1 ┐ ...
//!       p p p h h h  p p h h     i i i i t     i i t t       i i i t
//! pos   0 1 2 3 4 5  0 1 2 3     6 7 8 9 10    6 7 8 9       4 5 6 7
//!
//! p  a virtual token                     t  a target token; the last one predicts nothing and has no row
//! h  a token that all inputs of the group begin with        i  the rest of an input
//! ```
//!
//! A row that predicts a target token is a *target row*: the last input row of a sequence and its t rows.
//!
//! If a model rotates the positions of long sequences by other frequencies ([`crate::ops::rope::Rope::long_above`]), a group
//! with sequences of both kinds has two prefixes, one for each. So no sequence changes what another one gives. A
//! sequence's length is that of its prefix, input and target, the target's end included, as transformers counts it.

mod groups;
mod packed;
mod passes;

pub use groups::{Example, PrefixGroup, Sequence, common_head};
pub use packed::PackedBatch;
pub use passes::{GivenPrompts, JoinedPrefix, Packing, Passes};

#[cfg(test)]
mod tests;

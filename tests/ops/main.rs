//! The ops: their kernels as other compilers see them, and the set of their names.

mod kernels;
mod set;

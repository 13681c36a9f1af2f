//! The only rank there is.

use super::Ranks;
use crate::Result;

/// One process without others. Nothing is sent.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![message])
    }

    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>> {
        Ok(message)
    }

    fn abort(&self, _code: i32) {}
}

//! Row numbers, ids and positions of a batch: made on the host, uploaded once for all blocks of the model.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::ops::{Deref, Range};
use std::sync::OnceLock;

/// A list of indices, and its copy on the device that asked for it first.
#[derive(Debug, Clone, Default)]
pub struct Indices {
    host: Vec<u32>,
    device: OnceLock<Tensor>,
}

/// A part of [`Indices`].
#[derive(Debug, Clone, Copy)]
pub struct IndexView<'a> {
    all: &'a Indices,
    start: usize,
    len: usize,
}

impl Indices {
    /// A part of the list.
    ///
    /// # Panics
    /// A range beyond the list.
    pub fn view(&self, range: Range<usize>) -> IndexView<'_> {
        assert!(
            range.start <= range.end && range.end <= self.host.len(),
            "{range:?} of {} indices",
            self.len()
        );
        IndexView { all: self, start: range.start, len: range.len() }
    }

    /// The list as a tensor of u32 on `device`; uploaded at the first call.
    ///
    /// # Errors
    /// The device's.
    pub fn on(&self, device: &Device) -> Result<Tensor> {
        if let Some(tensor) = self.device.get()
            && tensor.device().same_device(device)
        {
            return Ok(tensor.clone());
        }
        let tensor = match self.host.as_slice() {
            [] => Tensor::zeros(1, DType::U32, device)?.narrow(0, 0, 0)?,
            list => Tensor::new(list, device)?,
        };
        // Another thread, or another device, may have been first; either way this copy is right.
        let _ = self.device.set(tensor.clone());
        Ok(tensor)
    }
}

impl<'a> IndexView<'a> {
    /// The indices on the host.
    pub fn host(self) -> &'a [u32] {
        &self.all.host[self.start..self.start + self.len]
    }

    /// The indices as a tensor on `device`.
    ///
    /// # Errors
    /// The device's.
    pub fn on(self, device: &Device) -> Result<Tensor> {
        Ok(self.all.on(device)?.narrow(0, self.start, self.len)?)
    }

    /// The first `n` of them.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn head(self, n: usize) -> Self {
        assert!(n <= self.len, "{n} of {} indices", self.len);
        Self { len: n, ..self }
    }
}

impl<'a> From<&'a Indices> for IndexView<'a> {
    fn from(all: &'a Indices) -> Self {
        Self { all, start: 0, len: all.host.len() }
    }
}

impl From<Vec<u32>> for Indices {
    fn from(host: Vec<u32>) -> Self {
        Self { host, device: OnceLock::new() }
    }
}

impl Extend<u32> for Indices {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, more: I) {
        self.host.extend(more);
        self.device = OnceLock::new();
    }
}

impl Deref for Indices {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        &self.host
    }
}

impl PartialEq for Indices {
    fn eq(&self, other: &Self) -> bool {
        self.host == other.host
    }
}

impl Eq for Indices {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_follows_the_list() -> Result<()> {
        let mut indices = Indices::from(vec![3, 1, 4]);
        assert_eq!(indices.on(&Device::Cpu)?.to_vec1::<u32>()?, [3, 1, 4]);
        indices.extend([1, 5]);
        let view = indices.view(2..5);
        assert_eq!((view.host(), view.head(2).host()), (&[4, 1, 5][..], &[4, 1][..]));
        assert_eq!(view.on(&Device::Cpu)?.to_vec1::<u32>()?, [4, 1, 5]);
        Ok(())
    }
}

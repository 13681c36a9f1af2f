//! Row numbers, ids and positions of a batch: made on the host, uploaded once for all layers of the model.

use super::gpu;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::{Deref, Range};
use std::sync::OnceLock;

/// A list of indices, and its copy on the first device for which it was uploaded.
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
    /// Panics if the range is not inside the list.
    pub fn view(&self, range: Range<usize>) -> IndexView<'_> {
        assert!(
            range.start <= range.end && range.end <= self.host.len(),
            "{range:?} of {} indices",
            self.len()
        );
        IndexView { all: self, start: range.start, len: range.len() }
    }

    /// The list as a tensor of u32 on `device`; the first call uploads it.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if let Some(tensor) = self.device.get()
            && tensor.device().same_device(device)
        {
            return Ok(tensor.clone());
        }
        let tensor = match self.host.as_slice() {
            [] => Tensor::zeros(1, DType::U32, device)?.narrow(0, 0, 0)?,
            list => gpu::upload(list, device)?,
        };
        // Another thread may have been first, or the list may have a copy on another device; this copy is equal.
        let _ = self.device.set(tensor.clone());
        Ok(tensor)
    }

    /// Uploads the lists that have no copy yet to `device` in one copy, for later calls of [`Indices::to_device`].
    ///
    /// ```text
    /// 0           ids          position_ids     labels
    /// ├───────────┬────┬───────┬────────────────┬──────┤     each begins at a multiple of 16 bytes
    /// ```
    pub(crate) fn upload_together<'a>(
        lists: impl IntoIterator<Item = &'a Self>,
        device: &Device,
    ) -> Result<()> {
        let (all, placed) = Self::join(lists);
        if placed.is_empty() {
            return Ok(());
        }
        let uploaded = gpu::upload(&all, device)?;
        for (list, start) in placed {
            let _ = list.device.set(uploaded.narrow(0, start, list.host.len())?);
        }
        Ok(())
    }

    /// The same into `buffer`, for lists of the same lengths each time. The first call makes it.
    ///
    /// # Errors
    /// Returns an error if the lists do not fill the buffer, or a device operation fails.
    pub(crate) fn write_together<'a>(
        lists: impl IntoIterator<Item = &'a Self>,
        buffer: &mut Option<Tensor>,
        device: &Device,
    ) -> Result<()> {
        let (all, placed) = Self::join(lists);
        let buffer = match buffer {
            None => buffer.insert(gpu::upload(&all, device)?),
            Some(buffer) if buffer.elem_count() == all.len() => {
                gpu::write(buffer, &all)?;
                buffer
            }
            Some(buffer) => {
                let found = format!("{}", all.len());
                return Err(Error::shape("indices", format!("{} numbers", buffer.elem_count()), found));
            }
        };
        for (list, start) in placed {
            let _ = list.device.set(buffer.narrow(0, start, list.host.len())?);
        }
        Ok(())
    }

    /// Lists that have no copy yet, in one list, and where each begins.
    fn join<'a>(lists: impl IntoIterator<Item = &'a Self>) -> (Vec<u32>, Vec<(&'a Self, usize)>) {
        let (mut all, mut placed): (Vec<u32>, Vec<(&Self, usize)>) = (Vec::new(), Vec::new());
        for list in lists {
            let is_placed =
                list.device.get().is_some() || placed.iter().any(|(other, _)| std::ptr::eq(*other, list));
            if is_placed || list.host.is_empty() {
                continue;
            }
            all.resize(all.len().next_multiple_of(4), 0);
            placed.push((list, all.len()));
            all.extend_from_slice(&list.host);
        }
        (all, placed)
    }
}

impl<'a> IndexView<'a> {
    /// The indices on the host.
    pub fn host(self) -> &'a [u32] {
        &self.all.host[self.start..self.start + self.len]
    }

    /// The indices as a tensor of u32 on `device`.
    pub fn to_device(self, device: &Device) -> Result<Tensor> {
        Ok(self.all.to_device(device)?.narrow(0, self.start, self.len)?)
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
    fn upload_together_uploads_each_list_once() -> Result<()> {
        let lists = [vec![3, 1, 4, 1, 5], Vec::new(), vec![9], vec![2, 6]].map(Indices::from);
        let before = gpu::uploads();
        lists[2].to_device(&Device::Cpu)?;
        let all = || lists.iter().chain(&lists[..1]);
        Indices::upload_together(all(), &Device::Cpu)?;
        Indices::upload_together(all(), &Device::Cpu)?;
        assert_eq!(gpu::uploads() - before, 2, "one for the list that had a copy, and one for the others");
        for list in &lists {
            let tensor = list.to_device(&Device::Cpu)?;
            assert!(tensor.is_contiguous() && tensor.to_vec1::<u32>()? == list.host);
        }
        // The last list begins after the five indices of the first and three of padding.
        assert_eq!(lists[3].to_device(&Device::Cpu)?.layout().start_offset(), 8);
        assert_eq!(gpu::uploads() - before, 2);
        Ok(())
    }

    #[test]
    fn to_device_uploads_an_extended_list_again() -> Result<()> {
        let mut indices = Indices::from(vec![3, 1, 4]);
        assert_eq!(indices.to_device(&Device::Cpu)?.to_vec1::<u32>()?, [3, 1, 4]);
        indices.extend([1, 5]);
        let view = indices.view(2..5);
        assert_eq!(view.host(), [4, 1, 5]);
        assert_eq!(view.to_device(&Device::Cpu)?.to_vec1::<u32>()?, [4, 1, 5]);
        Ok(())
    }
}

//! Row numbers, ids and positions of a batch: made on the host, uploaded once for all blocks of the model.

use super::gpu;
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
            list => gpu::upload(list, device)?,
        };
        // Another thread, or another device, may have been first; either way this copy is right.
        let _ = self.device.set(tensor.clone());
        Ok(tensor)
    }

    /// Uploads the lists that are not there yet to `device` in one copy: [`Indices::on`] then finds them.
    ///
    /// ```text
    /// 0           ids          position_ids     labels
    /// ├───────────┬────┬───────┬────────────────┬──────┤     each begins at a multiple of 16 bytes
    /// ```
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn upload_together<'a>(
        lists: impl IntoIterator<Item = &'a Self>,
        device: &Device,
    ) -> Result<()> {
        let (mut all, mut placed): (Vec<u32>, Vec<(&Self, usize)>) = (Vec::new(), Vec::new());
        for list in lists {
            let there =
                list.device.get().is_some() || placed.iter().any(|(other, _)| std::ptr::eq(*other, list));
            if there || list.host.is_empty() {
                continue;
            }
            all.resize(all.len().next_multiple_of(4), 0);
            placed.push((list, all.len()));
            all.extend_from_slice(&list.host);
        }
        if placed.is_empty() {
            return Ok(());
        }
        let uploaded = gpu::upload(&all, device)?;
        for (list, start) in placed {
            let _ = list.device.set(uploaded.narrow(0, start, list.host.len())?);
        }
        Ok(())
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
    fn lists_are_uploaded_together_once() -> Result<()> {
        let lists = [vec![3, 1, 4, 1, 5], Vec::new(), vec![9], vec![2, 6]].map(Indices::from);
        let before = gpu::uploads();
        lists[2].on(&Device::Cpu)?;
        let all = || lists.iter().chain(&lists[..1]);
        Indices::upload_together(all(), &Device::Cpu)?;
        Indices::upload_together(all(), &Device::Cpu)?;
        assert_eq!(gpu::uploads() - before, 2, "one that was there, and one for the others");
        for list in &lists {
            let tensor = list.on(&Device::Cpu)?;
            assert!(tensor.is_contiguous() && tensor.to_vec1::<u32>()? == list.host);
        }
        // The last begins behind the first's five and three of no use.
        assert_eq!(lists[3].on(&Device::Cpu)?.layout().start_offset(), 8);
        assert_eq!(gpu::uploads() - before, 2);
        Ok(())
    }

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

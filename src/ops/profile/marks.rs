//! Marks on a device's queue, two a scope, whose times are read later: nothing waits for the device while ops are enqueued.

use crate::Result;
use std::collections::VecDeque;

/// The most scopes whose marks have not been read. A step has about 700.
const MOST: usize = 2048;

/// A place in a device's queue.
pub(super) trait QueueMark {
    /// Seconds from this mark to `end`; waits until the device has reached `end`.
    fn seconds_to(&self, end: &Self) -> Result<f64>;
}

/// Scopes in the order in which they ended, with the marks of their beginning and end.
pub(super) struct Unread<M> {
    scopes: VecDeque<(&'static str, M, M)>,
}

impl<M: QueueMark> Unread<M> {
    pub(super) const fn new() -> Self {
        Self { scopes: VecDeque::new() }
    }

    /// Stores a scope's marks. If there are too many, the oldest half is read: the device has most likely reached them already,
    /// so that there is no wait.
    pub(super) fn push(
        &mut self,
        op: &'static str,
        (begin, end): (M, M),
        count: &mut dyn FnMut(&'static str, f64),
    ) -> Result<()> {
        self.scopes.push_back((op, begin, end));
        if self.scopes.len() > MOST { self.read(MOST / 2, count) } else { Ok(()) }
    }

    /// Reads all marks that are left; discards the remaining ones at an error.
    pub(super) fn finish(&mut self, count: &mut dyn FnMut(&'static str, f64)) -> Result<()> {
        let result = self.read(self.scopes.len(), count);
        self.scopes.clear();
        result
    }

    fn read(&mut self, scopes: usize, count: &mut dyn FnMut(&'static str, f64)) -> Result<()> {
        for (op, begin, end) in self.scopes.drain(..scopes) {
            count(op, begin.seconds_to(&end)?);
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
pub(super) mod cuda {
    use super::QueueMark;
    use crate::Result;
    use candle_core::CudaDevice;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};

    /// An event on the stream that all work of a device goes through.
    pub(in crate::ops::profile) struct CudaMark(CudaEvent);

    impl CudaMark {
        /// A mark after all work that was enqueued on the stream.
        pub(in crate::ops::profile) fn record(device: &CudaDevice) -> Result<Self> {
            let stream = device.cuda_stream();
            let event = stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).w()?;
            event.record(&stream).w()?;
            Ok(Self(event))
        }
    }

    impl QueueMark for CudaMark {
        fn seconds_to(&self, end: &Self) -> Result<f64> {
            Ok(f64::from(self.0.elapsed_ms(&end.0).w()?) / 1e3)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    /// A time, and how many of them are alive.
    struct FakeMark(f64, Rc<Cell<usize>>);

    impl FakeMark {
        fn new(time: f64, alive: &Rc<Cell<usize>>) -> Self {
            alive.set(alive.get() + 1);
            Self(time, alive.clone())
        }
    }

    impl Drop for FakeMark {
        fn drop(&mut self) {
            self.1.set(self.1.get() - 1);
        }
    }

    impl QueueMark for FakeMark {
        fn seconds_to(&self, end: &Self) -> Result<f64> {
            if end.0.is_nan() { Err(crate::Error::Invalid("lost".into())) } else { Ok(end.0 - self.0) }
        }
    }

    #[test]
    fn unread_marks_are_bounded_and_each_scope_counts_once() {
        let (alive, mut unread) = (Rc::new(Cell::new(0)), Unread::new());
        let (mut times, mut most) = (Vec::new(), 0);
        for i in 0..3 * MOST {
            let marks =
                (FakeMark::new(i as f64, &alive), FakeMark::new(i as f64 + 0.5 + i as f64 / 1e6, &alive));
            let op = if i % 2 == 0 { "even" } else { "odd" };
            unread.push(op, marks, &mut |op, seconds| times.push((op, seconds))).unwrap();
            most = most.max(alive.get());
        }
        assert!(most <= 2 * MOST && times.len() >= MOST, "{most} marks, {} read", times.len());
        unread.finish(&mut |op, seconds| times.push((op, seconds))).unwrap();
        assert_eq!((times.len(), alive.get()), (3 * MOST, 0));
        for (i, (op, seconds)) in times.into_iter().enumerate() {
            assert_eq!(op, if i % 2 == 0 { "even" } else { "odd" });
            assert!((seconds - 0.5 - i as f64 / 1e6).abs() < 1e-9, "{i}: {seconds}");
        }
    }

    #[test]
    fn a_mark_that_can_t_be_read_is_an_error_and_leaves_none() {
        let (alive, mut unread) = (Rc::new(Cell::new(0)), Unread::new());
        for end in [1.0, f64::NAN, 1.0] {
            unread
                .push("op", (FakeMark::new(0.0, &alive), FakeMark::new(end, &alive)), &mut |_, _| ())
                .unwrap();
        }
        assert_eq!(unread.finish(&mut |_, _| ()).unwrap_err().to_string(), "lost");
        assert_eq!(alive.get(), 0);
    }
}

//! Time per op, for the process. It is off until [`start`] is called, and then costs one atomic load an op.
//!
//! ```text
//! let _scope = profile::scope("rms_norm", x.device());     at the top of an op's forward and backward
//! ```
//!
//! On CUDA a scope records an event on the stream at its beginning and one at its end. Their times are read later, so that a
//! profiled step runs like any other step, and an op's time is the device's. It includes the device's wait for the host if the
//! host launches more slowly than the device computes.
//!
//! On other devices every scope waits for the device at its beginning and at its end, so that the time between is the op's own.
//! Then host and device do not overlap: on Metal a profiled step is slower than others, and only the ops' shares of it are
//! meaningful. If scopes are nested on one thread, only the outermost counts.

#[cfg(any(test, feature = "cuda"))]
mod marks;

use crate::{Error, Result};
use candle_core::Device;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

static ON: AtomicBool = AtomicBool::new(false);
static TABLE: Mutex<BTreeMap<&'static str, OpTotal>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// Whether this thread is inside a scope.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Time of one op since [`start`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpTime {
    /// The op's name.
    pub op: &'static str,
    /// Time of all its calls, s: the device's on CUDA, wall time elsewhere.
    pub seconds: f64,
    /// Calls.
    pub calls: u64,
}

#[derive(Default)]
struct OpTotal {
    seconds: f64,
    calls: u64,
}

/// The first error of the device's clock.
static FAILED: Mutex<Option<Error>> = Mutex::new(None);

#[cfg(feature = "cuda")]
static UNREAD: Mutex<marks::Unread<marks::cuda::CudaMark>> = Mutex::new(marks::Unread::new());

/// Counts the time from its creation until it is dropped.
#[must_use = "the time ends where this is dropped; bind it to a name"]
pub struct Scope {
    op: &'static str,
    device: Device,
    start: ScopeStart,
    /// A scope ends on the thread on which it began.
    not_send: PhantomData<*const ()>,
}

/// When a scope began.
enum ScopeStart {
    /// On the host's clock, with an idle device.
    Host(Instant),
    /// On the device's clock.
    #[cfg(feature = "cuda")]
    Cuda(marks::cuda::CudaMark),
}

/// Begins to count the time of `op` on `device`; `None` if the profiler is off or another scope of this thread counts already.
#[inline]
pub fn scope(op: &'static str, device: &Device) -> Option<Scope> {
    if ON.load(Ordering::Relaxed) { begin(op, device) } else { None }
}

#[cold]
fn begin(op: &'static str, device: &Device) -> Option<Scope> {
    if INSIDE.replace(true) {
        return None;
    }
    let start = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => match marks::cuda::CudaMark::record(cuda) {
            Ok(event) => ScopeStart::Cuda(event),
            Err(error) => {
                INSIDE.set(false);
                fail(error);
                return None;
            }
        },
        _ => {
            wait(device);
            ScopeStart::Host(Instant::now())
        }
    };
    Some(Scope { op, device: device.clone(), start, not_send: PhantomData })
}

impl Drop for Scope {
    fn drop(&mut self) {
        INSIDE.set(false);
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let now = marks::cuda::CudaMark::record(cuda);
                let ScopeStart::Cuda(begun) =
                    std::mem::replace(&mut self.start, ScopeStart::Host(Instant::now()))
                else {
                    unreachable!("a scope on CUDA begins with an event")
                };
                let recorded = now.and_then(|now| lock(&UNREAD).push(self.op, (begun, now), &mut count));
                recorded.unwrap_or_else(fail);
            }
            device => {
                wait(device);
                #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
                if let ScopeStart::Host(begun) = &self.start {
                    count(self.op, begun.elapsed().as_secs_f64());
                }
            }
        }
    }
}

fn count(op: &'static str, seconds: f64) {
    let mut table = lock(&TABLE);
    let entry = table.entry(op).or_default();
    entry.seconds += seconds;
    entry.calls += 1;
}

/// Stores the first error for [`finish`].
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn fail(error: Error) {
    lock(&FAILED).get_or_insert(error);
}

/// Whether the profiler counts.
pub(crate) fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Discards earlier counts and starts to count.
pub fn start() {
    #[cfg(feature = "cuda")]
    {
        *lock(&UNREAD) = marks::Unread::new();
    }
    lock(&TABLE).clear();
    *lock(&FAILED) = None;
    ON.store(true, Ordering::Relaxed);
}

/// Stops counting and returns the ops with their times, the longest first.
///
/// # Errors
/// Returns an error if a device's clock could not be read.
pub fn finish() -> Result<Vec<OpTime>> {
    ON.store(false, Ordering::Relaxed);
    #[cfg(feature = "cuda")]
    lock(&UNREAD).finish(&mut count)?;
    if let Some(error) = lock(&FAILED).take() {
        return Err(error);
    }
    let totals = std::mem::take(&mut *lock(&TABLE));
    let time = |(op, OpTotal { seconds, calls })| OpTime { op, seconds, calls };
    let mut times: Vec<OpTime> = totals.into_iter().map(time).collect();
    times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(times)
}

/// Waits for the device. An error is not lost: the next operation on the device returns it.
fn wait(device: &Device) {
    drop(device.synchronize());
}

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;
    use std::time::Duration;

    const PAUSE: Duration = Duration::from_millis(5);

    fn timed(op: &'static str) {
        let _scope = scope(op, &Device::Cpu);
        sleep(PAUSE);
    }

    /// One test: the profiler is the process's. Other tests' ops may be counted beside these.
    #[test]
    fn counts_the_outermost_scope_while_on() {
        let time_of = |times: &[OpTime], op: &str| times.iter().find(|t| t.op == op).copied();
        timed("test, before");
        assert!(scope("test, before", &Device::Cpu).is_none());
        start();
        timed("test, short");
        {
            let _outer = scope("test, outer", &Device::Cpu);
            timed("test, inner");
            timed("test, inner");
        }
        timed("test, short");
        let times = finish().unwrap();
        timed("test, after");

        let (outer, short) =
            (time_of(&times, "test, outer").unwrap(), time_of(&times, "test, short").unwrap());
        assert_eq!((outer.calls, short.calls), (1, 2));
        for time in [outer, short] {
            assert!(time.seconds >= 2.0 * PAUSE.as_secs_f64(), "{time:?}");
        }
        for op in ["test, before", "test, inner", "test, after"] {
            assert_eq!(time_of(&times, op), None);
        }
        assert!(times.is_sorted_by(|a, b| a.seconds >= b.seconds), "{times:?}");
        start();
        assert_eq!(time_of(&finish().unwrap(), "test, outer"), None, "an earlier count was kept");
        start();
        fail(Error::Invalid("the first".into()));
        fail(Error::Invalid("the second".into()));
        assert_eq!(finish().unwrap_err().to_string(), "the first");
        start();
        assert!(finish().is_ok(), "an earlier error was kept");
    }
}

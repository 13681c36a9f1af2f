//! Time per op, for the whole process; off unless [`start`]ed, and then at the cost of one atomic load an op.
//!
//! ```text
//! let _scope = profile::scope("rms_norm", x.device());     at the top of an op's forward and backward
//! ```
//!
//! On CUDA a scope puts an event on the stream at its beginning and one at its end; their times are read later, so that
//! a profiled step runs as another one does, and an op's time is the device's. It includes the device's wait for the
//! host where the host is slower to launch than the device is to compute.
//!
//! On other devices every scope waits for the device at its beginning and at its end, so that the time between is the
//! op's own. That forbids the overlap of host and device: on Metal a profiled step is slower than another one, and only
//! the ops' shares of it mean something. Of scopes inside each other on one thread the outermost counts.

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
static TABLE: Mutex<BTreeMap<&'static str, Entry>> = Mutex::new(BTreeMap::new());

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
struct Entry {
    seconds: f64,
    calls: u64,
}

/// The first error of the device's clock.
static FAILED: Mutex<Option<Error>> = Mutex::new(None);

#[cfg(feature = "cuda")]
static UNREAD: Mutex<marks::Unread<marks::cuda::Event>> = Mutex::new(marks::Unread::new());

/// Counts the time until it is dropped.
#[must_use = "the time ends where this is dropped; bind it to a name"]
pub struct Scope {
    op: &'static str,
    device: Device,
    begun: Begun,
    /// A scope ends on the thread on which it began.
    not_send: PhantomData<*const ()>,
}

/// When a scope began.
enum Begun {
    /// By the host's clock, the device idle.
    Host(Instant),
    /// By the device's.
    #[cfg(feature = "cuda")]
    Cuda(marks::cuda::Event),
}

/// Begins to count the time of `op` on `device`; `None` where the profiler is off or another scope of this
/// thread counts already.
#[inline]
pub fn scope(op: &'static str, device: &Device) -> Option<Scope> {
    if ON.load(Ordering::Relaxed) { begin(op, device) } else { None }
}

#[cold]
fn begin(op: &'static str, device: &Device) -> Option<Scope> {
    if INSIDE.replace(true) {
        return None;
    }
    let begun = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => match marks::cuda::Event::record(cuda) {
            Ok(event) => Begun::Cuda(event),
            Err(error) => {
                INSIDE.set(false);
                fail(error);
                return None;
            }
        },
        _ => {
            wait(device);
            Begun::Host(Instant::now())
        }
    };
    Some(Scope { op, device: device.clone(), begun, not_send: PhantomData })
}

impl Drop for Scope {
    fn drop(&mut self) {
        INSIDE.set(false);
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let now = marks::cuda::Event::record(cuda);
                let Begun::Cuda(begun) = std::mem::replace(&mut self.begun, Begun::Host(Instant::now()))
                else {
                    unreachable!("a scope on CUDA begins with an event")
                };
                let kept = now.and_then(|now| lock(&UNREAD).push(self.op, (begun, now), &mut count));
                kept.unwrap_or_else(fail);
            }
            device => {
                wait(device);
                #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
                if let Begun::Host(begun) = &self.begun {
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

/// Keeps the first error for [`finish`].
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn fail(error: Error) {
    lock(&FAILED).get_or_insert(error);
}

/// Forgets what was counted, and counts from now on.
pub fn start() {
    #[cfg(feature = "cuda")]
    {
        *lock(&UNREAD) = marks::Unread::new();
    }
    lock(&TABLE).clear();
    *lock(&FAILED) = None;
    ON.store(true, Ordering::Relaxed);
}

/// Stops counting; the ops with their times, the longest first.
///
/// # Errors
/// That of a device whose clock could not be read.
pub fn finish() -> Result<Vec<OpTime>> {
    ON.store(false, Ordering::Relaxed);
    #[cfg(feature = "cuda")]
    lock(&UNREAD).finish(&mut count)?;
    if let Some(error) = lock(&FAILED).take() {
        return Err(error);
    }
    let found = std::mem::take(&mut *lock(&TABLE));
    let time = |(op, Entry { seconds, calls })| OpTime { op, seconds, calls };
    let mut times: Vec<OpTime> = found.into_iter().map(time).collect();
    times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(times)
}

/// Waits for the device. An error of its is not lost: whatever is done on the device next returns it.
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
        let of = |times: &[OpTime], op: &str| times.iter().find(|t| t.op == op).copied();
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

        let (outer, short) = (of(&times, "test, outer").unwrap(), of(&times, "test, short").unwrap());
        assert_eq!((outer.calls, short.calls), (1, 2));
        for time in [outer, short] {
            assert!(time.seconds >= 2.0 * PAUSE.as_secs_f64(), "{time:?}");
        }
        for op in ["test, before", "test, inner", "test, after"] {
            assert_eq!(of(&times, op), None);
        }
        assert!(times.is_sorted_by(|a, b| a.seconds >= b.seconds), "{times:?}");
        start();
        assert_eq!(of(&finish().unwrap(), "test, outer"), None, "an earlier count was kept");
        start();
        fail(Error::Invalid("the first".into()));
        fail(Error::Invalid("the second".into()));
        assert_eq!(finish().unwrap_err().to_string(), "the first");
        start();
        assert!(finish().is_ok(), "an earlier error was kept");
    }
}

//! Time per op, for the whole process; off unless [`start`]ed, and then at the cost of one atomic load an op.
//!
//! ```text
//! let _scope = profile::scope("rms_norm", x.device());     at the top of an op's forward and backward
//! ```
//!
//! While it is on, every scope waits for the device at its beginning and at its end, so that the time between
//! is the op's own. That forbids the overlap of host and device: a profiled step is slower than another one,
//! and only the ops' shares of it mean something. Of scopes inside each other on one thread the outermost
//! counts.

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
    /// Wall time in all its calls, s.
    pub seconds: f64,
    /// Calls.
    pub calls: u64,
}

#[derive(Default)]
struct Entry {
    seconds: f64,
    calls: u64,
}

/// Counts the time until it is dropped.
#[must_use = "the time ends where this is dropped; bind it to a name"]
pub struct Scope {
    op: &'static str,
    device: Device,
    started: Instant,
    /// A scope ends on the thread on which it began.
    not_send: PhantomData<*const ()>,
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
    wait(device);
    Some(Scope { op, device: device.clone(), started: Instant::now(), not_send: PhantomData })
}

impl Drop for Scope {
    fn drop(&mut self) {
        wait(&self.device);
        let seconds = self.started.elapsed().as_secs_f64();
        INSIDE.set(false);
        let mut table = table();
        let entry = table.entry(self.op).or_default();
        entry.seconds += seconds;
        entry.calls += 1;
    }
}

/// Forgets what was counted, and counts from now on.
pub fn start() {
    table().clear();
    ON.store(true, Ordering::Relaxed);
}

/// Stops counting; the ops with their times, the longest first.
pub fn finish() -> Vec<OpTime> {
    ON.store(false, Ordering::Relaxed);
    let found = std::mem::take(&mut *table());
    let time = |(op, Entry { seconds, calls })| OpTime { op, seconds, calls };
    let mut times: Vec<OpTime> = found.into_iter().map(time).collect();
    times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    times
}

/// Waits for the device. An error of its is not lost: whatever is done on the device next returns it.
fn wait(device: &Device) {
    drop(device.synchronize());
}

fn table() -> MutexGuard<'static, BTreeMap<&'static str, Entry>> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
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
        let times = finish();
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
        assert_eq!(of(&finish(), "test, outer"), None, "an earlier count was kept");
    }
}

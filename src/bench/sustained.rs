//! The rate that a device sustains: in its first milliseconds a GPU has not reached its power limit, which matters for
//! a step of seconds.

use crate::Result;
use candle_core::Device;
use std::time::Instant;

/// Time of the work that is queued before waiting for the device, s: long compared with the waits, and short enough to
/// limit the queue's memory.
const QUEUED_SECONDS: f64 = 0.05;

/// Seconds of one call of `queue`, which puts work on `device`, repeated for at least `seconds`.
///
/// # Errors
/// Returns an error if `queue` or the device fails.
pub(super) fn seconds_per_call(
    device: &Device,
    seconds: f64,
    queue: &mut dyn FnMut() -> Result<()>,
) -> Result<f64> {
    let mut timed = |calls: usize| -> Result<f64> {
        let started = Instant::now();
        for _ in 0..calls {
            queue()?;
        }
        device.synchronize()?;
        Ok(started.elapsed().as_secs_f64())
    };
    // The first call is the warm-up; the second shows how long one takes.
    timed(1)?;
    let one = timed(1)?.max(1e-7);
    let calls = (QUEUED_SECONDS / one).ceil().max(1.0) as usize;
    let (mut spent, mut made) = (0.0, 0);
    while made == 0 || spent < seconds {
        spent += timed(calls)?;
        made += calls;
    }
    Ok(spent / made as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn seconds_per_call_repeats_for_as_long_as_it_is_told() {
        let mut calls = 0;
        let begun = Instant::now();
        let mut sleep = || {
            calls += 1;
            std::thread::sleep(Duration::from_millis(10));
            Ok(())
        };
        let found = seconds_per_call(&Device::Cpu, 0.2, &mut sleep).unwrap();
        assert!(found >= 0.01, "{found}");
        assert!(begun.elapsed().as_secs_f64() >= 0.2 && calls >= 7, "{calls}");
        let failing = seconds_per_call(&Device::Cpu, 0.2, &mut || Err(crate::Error::Invalid("no".into())));
        assert_eq!(failing.unwrap_err().to_string(), "no");
    }
}

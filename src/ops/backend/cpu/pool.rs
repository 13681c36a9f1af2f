//! The thread pool during a pass, which consists of hundreds of short parallel loops.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Polls after which an idle thread begins to offer its core to other threads of the machine at each poll.
const POLLS: usize = 200;

/// If a thread that offered its core gets it back later than this, other threads need the core more.
const CONTENDED: Duration = Duration::from_micros(100);

/// Pause hints to the CPU between two polls, so that idle threads do not keep taking cache lines from busy ones.
const PAUSES: usize = 16;

/// Number of the pass whose threads stay awake, odd while there is one. Only one pass at a time keeps threads awake: a thread
/// that waits inside its own pass may start to work for this one, and two passes that did so would wait for each other.
static PASS: AtomicUsize = AtomicUsize::new(0);

/// Runs `f` on a thread of the pool, where a parallel loop begins at once, and keeps the other threads awake meanwhile. A loop
/// that begins on another thread wakes a thread of the pool and sleeps. A thread without work sleeps after some microseconds,
/// and needs up to a hundred to wake up in a virtual machine. A step has 500 loops: on 2 cores of an AMD EPYC they waited for
/// an eighth of the time (LOG.md, 2026-11-29).
pub(crate) fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| {
        let _awake = Awake::begin();
        f()
    })
}

/// Ends its pass when it is dropped.
struct Awake {
    pass: usize,
}

impl Awake {
    /// Called on a thread of the pool; `None` if another pass keeps the threads awake.
    fn begin() -> Option<Self> {
        let this = rayon::current_thread_index()?;
        let before = PASS.load(Ordering::Relaxed);
        let pass = before.wrapping_add(1);
        if before % 2 == 1
            || PASS.compare_exchange(before, pass, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return None;
        }
        // This thread gets the job too, at the latest when it waits for others. It must return at once, because it ends the pass.
        rayon::spawn_broadcast(move |thread| {
            if thread.index() != this {
                work_until_end(pass);
            }
        });
        Some(Self { pass })
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        PASS.store(self.pass.wrapping_add(1), Ordering::Relaxed);
    }
}

/// Does the pool's work until the pass ends, or until other threads of the machine need the core: then this thread sleeps
/// between loops, as rayon's threads do. A thread starts this job before any job of the pass, because it was queued first; so
/// no job of the pass waits for its end.
fn work_until_end(pass: usize) {
    let mut polls = 0;
    while PASS.load(Ordering::Relaxed) == pass {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => polls = 0,
            _ if polls < POLLS => {
                polls += 1;
                (0..PAUSES).for_each(|_| std::hint::spin_loop());
            }
            _ => {
                let offered = Instant::now();
                std::thread::yield_now();
                if offered.elapsed() > CONTENDED {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    /// Passes of several threads at once, each of many loops, some inside of others, all end with their results.
    #[test]
    fn on_pool_runs_passes_side_by_side() {
        let sum = |n: u64| -> u64 {
            on_pool(|| {
                (0..200)
                    .map(|_| {
                        (0..n).into_par_iter().map(|i| (0..i % 7).into_par_iter().sum::<u64>()).sum::<u64>()
                    })
                    .sum()
            })
        };
        let expected = |n: u64| 200 * (0..n).map(|i| (0..i % 7).sum::<u64>()).sum::<u64>();
        std::thread::scope(|scope| {
            let all: Vec<_> = (1..9).map(|n| scope.spawn(move || (sum(n * 10), expected(n * 10)))).collect();
            for thread in all {
                let (found, expected) = thread.join().unwrap();
                assert_eq!(found, expected);
            }
        });
    }

    #[test]
    fn on_pool_ends_its_pass_when_it_panics() {
        let result = std::panic::catch_unwind(|| on_pool(|| panic!("a fault")));
        assert!(result.is_err());
        assert_eq!(on_pool(|| (0..1000).into_par_iter().sum::<u64>()), 499_500);
    }
}

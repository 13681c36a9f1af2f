//! The thread pool in the course of a pass, which is hundreds of short parallel loops.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Polls after which an idle thread offers its core to other threads of the machine each time.
const POLLS: usize = 200;

/// A thread that offered its core and got it back later than this has others beside it, which need it more.
const CONTENDED: Duration = Duration::from_micros(100);

/// Hints to the CPU between two polls, so that idle threads do not take the busy ones' cache lines all the time.
const PAUSES: usize = 16;

/// Number of the pass whose threads stay awake, odd while there is one. Only one pass at a time keeps threads awake: a thread
/// that waits inside its own pass may start to work for this one, and two passes that did so would wait for each other.
static PASS: AtomicUsize = AtomicUsize::new(0);

/// Runs `f` on a thread of the pool, where a parallel loop begins at once, and keeps the other threads awake meanwhile. A
/// loop that begins elsewhere wakes a thread of the pool and sleeps; and a thread that finds no work sleeps after some
/// microseconds, and needs up to a hundred to wake up in a virtual machine. A step has 500 loops: on 2 cores of an AMD
/// EPYC they stood still for an eighth of the time (LOG.md, 2026-11-29).
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
        // This thread too gets the job, at the latest when it waits for others: it must not stay in it, as it ends the pass.
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

/// Does the pool's work as it comes until the pass ends, or until other threads of the machine want the core: then this one
/// sleeps between loops, as rayon has it. A thread takes this job before any job of the pass, as it was there
/// first; so no job of the pass waits for its end.
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

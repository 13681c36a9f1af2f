//! Whether the machine was disturbed during a measurement on its CPU.
//!
//! On a shared machine another guest may run on the second hardware thread of a core. It takes up to half of the core's
//! arithmetic for seconds, and no counter of the system shows it. A short, fixed piece of work does: the *canary*,
//! which runs on every thread of the pool at once before and after each measured step.
//!
//! ```text
//! reading 0 | step 1 | reading 1 | step 2 | reading 2 ...
//!
//! reading       on each thread: products of matrices in the first-level cache, and their rate
//! fastest       the highest rate of a thread in this process, in a reading whose threads ran about equally fast
//! quiet step    every thread reached 0.8 of the fastest rate before and after it, and hardly waited for a core during it
//! figures       of the quiet steps; of all steps, with a warning, if too few are quiet
//! ```

mod machine;

use candle_core::DType;
use machine::CanaryMachine;
use serde::Serialize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Fraction of the fastest rate that every thread reaches on a quiet machine. On 2 cores of a Sapphire Rapids class CPU
/// a loop of loads and AMX products reached 2,230 GFLOP/s per core, and 550 to 1,000 next to a busy neighbour. On 2
/// cores of a Zen 4 the f32 product ran at 0.98 to 1 of its fastest rate, or at 0.6 to 0.7 next to a neighbour: 0.8
/// lies between.
pub const QUIET_SHARE: f64 = 0.8;

/// Fraction of a step's time that a thread may wait for a core on a quiet machine. On 2 cores of a Zen 4 a thread of a
/// step of SmolLM2 waited for 0.01 to 0.04 if nothing else could take its core (it must be woken, and the program has
/// more threads than the pool), and for 0.3 to 0.8 next to compilers.
pub const WAITING_SHARE: f64 = 0.1;

/// Least number of quiet steps for figures.
const FEWEST_STEPS: usize = 3;

/// One in this many steps must be quiet.
const FEWEST_PART: usize = 3;

/// Time for which readings are taken at the start, to know the fastest rate.
const CALIBRATION: Duration = Duration::from_millis(50);

/// Least number of readings at the start.
const CALIBRATION_READINGS: usize = 5;

/// A measurement of the canary on the threads of the pool.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reading {
    /// The rate on each thread, floating-point operations per second. All are 0 if the threads did not run at the same
    /// time.
    pub rates: Vec<f64>,
    /// Time that each thread was ready to run and waited for a core since it began, s, in the same order; empty if the
    /// system does not report it.
    pub waited: Vec<f64>,
}

/// The source of readings: the machine, or a list in a test.
pub trait RateSource: Send {
    /// Takes a reading.
    fn read(&mut self) -> Reading;
}

/// Tells quiet steps from those during which the machine was disturbed.
///
/// ```
/// use candle_core::DType;
/// use gneiss::bench::Canary;
/// use std::time::Instant;
///
/// let canary = Canary::new(DType::F32);
/// let before = canary.read();
/// let started = Instant::now();
/// // What is measured.
/// let seconds = started.elapsed().as_secs_f64();
/// let after = canary.read();
/// println!("{seconds} s, quiet: {}", canary.is_quiet(&before, &after, seconds));
/// ```
pub struct Canary {
    state: Mutex<CanaryState>,
    work: &'static str,
}

struct CanaryState {
    source: Box<dyn RateSource>,
    fastest: Fastest,
}

/// The fastest rate so far.
#[derive(Debug, Clone, Copy, Default)]
struct Fastest {
    /// In readings whose threads ran about equally fast. A thread whose neighbour on the same core was stopped for a
    /// moment runs faster than it can next to it, and does not count.
    even: f64,
    /// In all readings.
    any: f64,
}

/// The canary's work and rate, for a report.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CanaryRate {
    /// The canary's work: the CPU feature that bf16 products use, or `gemm` for f32 products.
    pub work: &'static str,
    /// Number of threads on which it runs.
    pub threads: usize,
    /// The fastest rate of a thread, floating-point operations per second.
    pub flops_per_second: f64,
    /// [`QUIET_SHARE`].
    pub quiet_share: f64,
}

/// The canary's readings during a case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CanarySeen {
    /// The lowest rate of a thread, as a fraction of the fastest.
    pub lowest: f64,
    /// The rate of a reading's slowest thread as a fraction of the fastest, median over the readings.
    pub median: f64,
    /// Fraction of the steps' time that a thread waited for a core, for the thread that waited longest; `None` if the
    /// system does not report it.
    pub waiting: Option<f64>,
}

/// The steps from which figures are computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Whether each step is used.
    pub used: Vec<bool>,
    /// Steps during which the machine was disturbed.
    pub disturbed: usize,
}

impl Reading {
    fn slowest(&self) -> f64 {
        self.rates.iter().copied().reduce(f64::min).unwrap_or(0.0)
    }

    fn fastest(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// The longest time that a thread waited for a core between `self` and `later`, s; `None` if the system does not
    /// report it.
    fn longest_wait(&self, later: &Self) -> Option<f64> {
        self.waited.iter().zip(&later.waited).map(|(before, after)| after - before).reduce(f64::max)
    }
}

impl Fastest {
    fn add(&mut self, reading: &Reading) {
        self.any = self.any.max(reading.fastest());
        if reading.slowest() >= QUIET_SHARE * reading.fastest() {
            self.even = self.even.max(reading.fastest());
        }
    }

    /// If the threads never ran equally fast, every reading has a thread below [`QUIET_SHARE`] of this rate.
    fn rate(self) -> f64 {
        if self.even > 0.0 { self.even } else { self.any }
    }
}

impl Canary {
    /// For measurements on the CPU with products in `dtype`; takes readings for 50 ms.
    pub fn new(dtype: DType) -> Self {
        let machine = CanaryMachine::new(dtype);
        let canary = Self { work: machine.work(), ..Self::from_source(Box::new(machine)) };
        let started = Instant::now();
        for i in 0.. {
            if i >= CALIBRATION_READINGS && started.elapsed() >= CALIBRATION {
                break;
            }
            canary.read();
        }
        canary
    }

    /// With the readings of `source`.
    pub fn from_source(source: Box<dyn RateSource>) -> Self {
        Self { state: Mutex::new(CanaryState { source, fastest: Fastest::default() }), work: "given rates" }
    }

    /// Runs the canary on every thread of the pool, for about 0.1 ms.
    pub fn read(&self) -> Reading {
        let mut state = self.state();
        let reading = state.source.read();
        state.fastest.add(&reading);
        reading
    }

    /// The canary's work and its fastest rate.
    pub fn rate(&self) -> CanaryRate {
        CanaryRate {
            work: self.work,
            threads: rayon::current_num_threads(),
            flops_per_second: self.state().fastest.rate(),
            quiet_share: QUIET_SHARE,
        }
    }

    /// Whether all threads ran about equally fast in some reading. If they never do, the cores may have two speeds, and
    /// no step is quiet.
    pub fn was_even(&self) -> bool {
        self.state().fastest.even > 0.0
    }

    /// Whether the machine was quiet in the `seconds` between two readings, by the fastest rate up to now.
    pub fn is_quiet(&self, before: &Reading, after: &Reading, seconds: f64) -> bool {
        let least = QUIET_SHARE * self.state().fastest.rate();
        let fast =
            [before, after].iter().all(|reading| reading.slowest() > 0.0 && reading.slowest() >= least);
        fast && before.longest_wait(after).is_none_or(|waited| waited <= WAITING_SHARE * seconds)
    }

    /// The steps from which figures are computed: step `i` took `seconds[i]` and lies between `readings[i]` and
    /// `readings[i + 1]`.
    pub fn select(&self, readings: &[Reading], seconds: &[f64]) -> Selection {
        let around = readings.windows(2).zip(seconds);
        Selection::from_quiet(
            around.map(|(pair, seconds)| self.is_quiet(&pair[0], &pair[1], *seconds)).collect(),
        )
    }

    /// A summary of the same readings and steps; `None` if there are no readings.
    pub fn seen(&self, readings: &[Reading], seconds: &[f64]) -> Option<CanarySeen> {
        let fastest = self.state().fastest.rate();
        let share = |reading: &Reading| if fastest > 0.0 { reading.slowest() / fastest } else { 0.0 };
        let mut shares: Vec<f64> = readings.iter().map(share).collect();
        shares.sort_by(f64::total_cmp);
        let waited = readings.first()?.longest_wait(readings.last()?);
        Some(CanarySeen {
            lowest: shares[0],
            median: (shares[(shares.len() - 1) / 2] + shares[shares.len() / 2]) / 2.0,
            waiting: waited.map(|waited| waited / seconds.iter().sum::<f64>()),
        })
    }

    fn state(&self) -> MutexGuard<'_, CanaryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Selection {
    /// The quiet steps; all steps if fewer than three or fewer than a third are quiet.
    pub fn from_quiet(quiet: Vec<bool>) -> Self {
        let steps = quiet.len();
        let count = quiet.iter().filter(|quiet| **quiet).count();
        let enough = count >= FEWEST_STEPS && FEWEST_PART * count >= steps;
        Self { used: if enough { quiet } else { vec![true; steps] }, disturbed: steps - count }
    }
}

#[cfg(test)]
mod tests;

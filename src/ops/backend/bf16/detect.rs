//! Which of the instructions this CPU has, and which of them are the fastest here.

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::Kind;
#[cfg(target_arch = "x86_64")]
use super::kernel;
use std::sync::OnceLock;
#[cfg(target_arch = "x86_64")]
use std::time::{Duration, Instant};

impl Isa {
    /// The fastest that there is; `None` where nothing here makes products of bf16.
    pub(crate) fn best() -> Option<Self> {
        Self::all().last().copied()
    }

    /// Whether the CPU has instructions for bf16, be they the fastest or not.
    pub(crate) fn has_bf16() -> bool {
        Self::all().iter().any(|isa| match isa.kind() {
            #[cfg(target_arch = "x86_64")]
            Kind::Fma => false,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Amx => true,
        })
    }

    /// All that there are, the fastest last.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Isa>> = OnceLock::new();
        ALL.get_or_init(detect)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
        return Vec::new();
    }
    let mut all = vec![Kind::Fma];
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has the instructions.
        let faster = unsafe { is_faster_than_f32() };
        all.insert(usize::from(faster), Kind::Avx512);
        if kernel::amx_is_granted() {
            all.push(Kind::Amx);
        }
    }
    // SAFETY: each was detected.
    all.into_iter().map(|kind| unsafe { Isa::new(kind) }).collect()
}

/// Whether `vdpbf16ps`, which makes twice the products of `vfmadd231ps`, is worth it. AMD's Zen 4 takes the same time for
/// both; Intel's Emerald Rapids takes four times as long, and 1.7 times in the first 20 microseconds, before a core comes to
/// its speed with vectors of 512 bits (LOG.md). The bound lies between, so that a CPU always gives the same answer.
///
/// # Safety
/// The CPU has `avx512f` and `avx512bf16`.
#[cfg(target_arch = "x86_64")]
unsafe fn is_faster_than_f32() -> bool {
    const ROUNDS: usize = 9;
    const TIMES: usize = 2000;
    let time = |run: unsafe fn(usize) -> f32| {
        let begun = Instant::now();
        // SAFETY: the caller's promise.
        std::hint::black_box(unsafe { run(TIMES) });
        begun.elapsed()
    };
    let rounds = (0..ROUNDS).map(|_| (time(kernel::of_registers_bf16), time(kernel::of_registers_f32)));
    let (bf16, f32) = rounds.fold((Duration::MAX, Duration::MAX), |(a, b), (x, y)| (a.min(x), b.min(y)));
    2 * bf16 < 3 * f32
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    Vec::new()
}

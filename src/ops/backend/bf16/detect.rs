//! Which instruction sets this CPU has, and which of them is the fastest.

#[cfg(target_arch = "x86_64")]
use super::isa::InstructionSet;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::kernel;
use std::sync::OnceLock;
#[cfg(target_arch = "x86_64")]
use std::time::{Duration, Instant};

impl Isa {
    /// The fastest instruction set; `None` if the CPU has none.
    pub(crate) fn best() -> Option<Self> {
        Self::all().last().copied()
    }

    /// Whether the CPU has instructions for bf16, whether they are the fastest or not.
    pub(crate) fn has_bf16() -> bool {
        Self::all().iter().any(|isa| match isa.kind() {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Fma => false,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 | InstructionSet::Amx => true,
        })
    }

    /// All instruction sets of this CPU, the fastest last.
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
    let mut all = vec![InstructionSet::Fma];
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has the instructions.
        let faster = is_amd() || unsafe { is_faster_than_f32() };
        all.insert(usize::from(faster), InstructionSet::Avx512);
        if kernel::amx_is_granted() {
            all.push(InstructionSet::Amx);
        }
    }
    // SAFETY: each was detected.
    all.into_iter().map(|kind| unsafe { Isa::new(kind) }).collect()
}

/// Whether AMD made the CPU. Since Zen 4, AMD's first CPU with `vdpbf16ps`, it takes the time of `vfmadd231ps`.
///
/// A measurement could say otherwise while the host of a virtual machine is busy, and the next process would use other
/// instructions: a resumed run would end with other last digits.
#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

/// Whether `vdpbf16ps`, which makes twice the products of `vfmadd231ps`, is faster per product. On Intel's Emerald Rapids it takes
/// four times as long, and 1.7 times in the first 20 microseconds, before a core reaches its speed with vectors of 512 bits
/// (LOG.md). The bound lies below these ratios.
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
    let rounds = (0..ROUNDS).map(|_| (time(kernel::repeat_dpbf16), time(kernel::repeat_fma)));
    let (bf16, f32) = rounds.fold((Duration::MAX, Duration::MAX), |(a, b), (x, y)| (a.min(x), b.min(y)));
    2 * bf16 < 3 * f32
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    Vec::new()
}

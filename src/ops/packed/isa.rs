//! Which instructions make products of bf16 here.

#[cfg(target_arch = "x86_64")]
use super::kernel;
use std::sync::OnceLock;
#[cfg(target_arch = "x86_64")]
use std::time::{Duration, Instant};

/// Instructions that make products of bf16 with sums in f32. A value is proof that this CPU and its operating system have
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// AVX-512's f32: values are widened, which is exact, and multiplied by `vfmadd231ps`.
    #[cfg(target_arch = "x86_64")]
    Fma,
    /// AVX-512 with BF16: `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX's tiles, `tdpbf16ps`; what surrounds the product is AVX-512's.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// What a task of some rows and panels costs beside its products, in products of a row and a panel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Costs {
    /// The most panels of a task, an even number.
    pub(super) panels: usize,
    /// Copying a row of the left operand, in panels.
    pub(super) copy: f64,
    /// Turning or widening a panel, in rows.
    pub(super) turn: f64,
}

impl Isa {
    /// The fastest that there is; `None` where nothing here makes products of bf16.
    pub(crate) fn best() -> Option<Self> {
        Self::all().last().copied()
    }

    /// Whether the CPU has instructions for bf16, be they the fastest or not.
    pub(crate) fn has_bf16() -> bool {
        Self::all().iter().any(|isa| match isa.0 {
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

    /// The instructions' name, as the system gives it to the CPU's feature.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Fma => "avx512f",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx_bf16",
        }
    }

    /// What a task costs beside its products, by the instructions that each takes: a line is turned in 5 cycles, and
    /// widened in 4; `vdpbf16ps` reads the left operand where it lies. `None` for AMX, which cuts its products otherwise.
    pub(super) fn costs(self) -> Option<Costs> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Fma => Some(Costs { panels: 24, copy: 0.4, turn: 9.0 }),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Some(Costs { panels: 4, copy: 0.0, turn: 5.0 }),
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => None,
        }
    }

    /// Whether products with the transpose of a weight are faster if it is packed too ([`super::Panels::pack_transpose`]):
    /// with AMX, whose products are so fast that packing it on the way shows.
    pub(crate) fn reads_packed_transposes(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Fma | Kind::Avx512 => false,
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => true,
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
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
    all.into_iter().map(Isa).collect()
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

//! Which instructions multiply bf16 here.

use std::sync::OnceLock;

/// Instructions that multiply bf16 with sums in f32. A value is proof that this CPU and its operating system have
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// AVX-512 with BF16: `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX's tiles, `tdpbf16ps`; what surrounds the product is AVX-512's.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// The fastest that there is; `None` where products in f32 are faster.
    pub(crate) fn best() -> Option<Self> {
        Self::all().last().copied()
    }

    /// All that there are, the fastest last.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Isa>> = OnceLock::new();
        ALL.get_or_init(detect)
    }

    /// The instruction's name.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx_bf16",
        }
    }

    /// How many panels a task may take side by side, the most first, at least two at a time. AMX copies the left operand
    /// into tiles once a task, which wide tasks pay for.
    pub(super) fn panels(self) -> &'static [usize] {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => &[4, 2],
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => &[16, 8, 4, 2],
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    let mut all = Vec::new();
    if avx512 {
        all.push(Isa(Kind::Avx512));
        if super::kernel::amx_is_granted() {
            all.push(Isa(Kind::Amx));
        }
    }
    all
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    Vec::new()
}

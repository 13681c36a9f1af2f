//! Instructions that make products of bf16.

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
    /// # Safety
    /// This CPU and its operating system have the instructions.
    pub(super) unsafe fn new(kind: Kind) -> Self {
        Self(kind)
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

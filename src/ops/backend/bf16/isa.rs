//! Instruction sets for products of bf16.

/// An instruction set for products of bf16 with sums in f32. A value is proof that this CPU and its operating system have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(InstructionSet);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InstructionSet {
    /// AVX-512's f32: values are widened, which is exact, and multiplied by `vfmadd231ps`.
    #[cfg(target_arch = "x86_64")]
    Fma,
    /// AVX-512 with BF16: `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX's tiles, `tdpbf16ps`; the code around the product is AVX-512's.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// Costs of a task of some rows and panels besides its products, in units of a product of one row and one panel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Costs {
    /// The most panels of a task, an even number.
    pub(super) panels: usize,
    /// Copying a row of the left operand, in panels.
    pub(super) copy: f64,
    /// Transposing or widening a panel, in rows.
    pub(super) transpose: f64,
}

impl Isa {
    /// # Safety
    /// This CPU and its operating system have the instructions.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn new(kind: InstructionSet) -> Self {
        Self(kind)
    }

    /// The operating system's name of the CPU feature.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Fma => "avx512f",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => "amx_bf16",
        }
    }

    /// Costs of a task besides its products, by the instructions of each: a panel row is transposed in 5 cycles, and widened in
    /// 4; `vdpbf16ps` reads the left operand in place. `None` for AMX, whose products are cut in another way.
    pub(super) fn costs(self) -> Option<Costs> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Fma => Some(Costs { panels: 24, copy: 0.4, transpose: 9.0 }),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => Some(Costs { panels: 4, copy: 0.0, transpose: 5.0 }),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => None,
        }
    }

    /// Whether products with the transpose of a weight are faster if the transpose is packed too
    /// ([`super::PackedWeight::pack_transpose`]). This holds for AMX, whose products are so fast that packing during a product
    /// is a measurable part of it.
    pub(crate) fn reads_packed_transposes(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Fma | InstructionSet::Avx512 => false,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => true,
        }
    }

    pub(super) fn kind(self) -> InstructionSet {
        self.0
    }
}

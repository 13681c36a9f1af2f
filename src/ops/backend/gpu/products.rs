//! The choice among the algorithms that a library of matrix products offers for a product (cuBLASLt).
//!
//! Which algorithm is fastest depends on the sizes. The first time a product is computed each algorithm is timed once; the choice
//! then holds for all products of its [`ProductClass`]. Another algorithm sums in another order, so choices belong to the state
//! of a run: a resumed run uses those with which it began.

// Without CUDA there is no choice; the choices of a state are still read and written.
#![cfg_attr(not(feature = "cuda"), allow(dead_code, unused_variables))]

use crate::{Error, Result};
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The fewest rows of a product that is timed. A product of fewer rows takes little more time than reading the weight, whatever
/// the algorithm is, and steps of generation have every number of rows up to this.
const LEAST_ROWS: usize = 256;

/// The most classes that are timed. A model has about 16 products forward and backward, and a run few row counts.
const MOST_CLASSES: usize = 256;

/// A later algorithm is chosen if it takes less than this share of the time of those before it, which the library ranks better:
/// smaller differences are noise.
const CLEARLY_LESS: f32 = 0.98;

/// dtype of a product's operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProductDtype {
    /// 32 bits.
    F32,
    /// 16 bits, 8 of them the fraction's.
    Bf16,
    /// 16 bits, 11 of them the fraction's.
    F16,
}

impl ProductDtype {
    /// # Errors
    /// Returns an error if a GPU has no products of this dtype.
    pub(crate) fn new(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::BF16 => Ok(Self::Bf16),
            DType::F16 => Ok(Self::F16),
            other => Err(Error::Invalid(format!("linear: expected f32, bf16 or f16, found {other:?}"))),
        }
    }
}

/// Products [m, n] = [m, k] [k, n] that one algorithm serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProductClass {
    /// m, rounded up to a power of two: batches have similar numbers of rows, and seldom equal ones.
    pub rows: usize,
    /// n.
    pub n: usize,
    /// k.
    pub k: usize,
    /// Whether the second operand is stored as [n, k].
    pub transposed: bool,
    /// Of operands and product.
    pub element: ProductDtype,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether a matrix [m, n] is added.
    pub add: bool,
    /// Bytes of which all operands' addresses are multiples, at most 256.
    pub alignment: u32,
}

impl ProductClass {
    /// The rows of the class of products of `m` rows.
    pub(crate) fn rows_for(m: usize) -> usize {
        m.next_power_of_two()
    }

    /// The alignment of operands at these addresses.
    pub(crate) fn common_alignment(addresses: impl IntoIterator<Item = u64>) -> u32 {
        1 << addresses.into_iter().fold(256, |all, address| all | address).trailing_zeros()
    }
}

/// An algorithm in the library's own encoding (`cublasLtMatmulAlgo_t`).
pub type Algorithm = [u64; 8];

/// The algorithm that was chosen for a class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductChoice {
    /// The products.
    pub class: ProductClass,
    /// The algorithm; `None` for the library's first proposal for each product.
    pub algorithm: Option<Algorithm>,
}

/// The choices of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductChoices {
    /// The device and the library for which they hold; others have no such algorithms.
    #[serde(rename = "of")]
    pub library: String,
    /// In the order of their classes.
    pub choices: Vec<ProductChoice>,
}

/// The choices on a device.
#[derive(Debug, Default)]
pub(crate) struct ChoiceTable {
    /// Whether products that are computed for the first time are timed.
    pub(crate) timing: bool,
    chosen: BTreeMap<ProductClass, Option<Algorithm>>,
}

impl ChoiceTable {
    /// The choice for `class`, if there is one; the inner `None` is the library's first proposal.
    pub(crate) fn get(&self, class: &ProductClass) -> Option<Option<Algorithm>> {
        self.chosen.get(class).copied()
    }

    /// Whether the algorithms of `class` are to be timed.
    pub(crate) fn is_to_time(&self, class: &ProductClass) -> bool {
        self.timing
            && class.rows >= LEAST_ROWS
            && self.chosen.len() < MOST_CLASSES
            && !self.chosen.contains_key(class)
    }

    /// Keeps a choice.
    pub(crate) fn choose(&mut self, class: ProductClass, algorithm: Option<Algorithm>) {
        self.chosen.insert(class, algorithm);
    }

    /// All choices, for the device and library called `library`; `None` if there are none.
    pub(crate) fn export(&self, library: &str) -> Option<ProductChoices> {
        let choice = |(class, algorithm): (&ProductClass, &Option<Algorithm>)| ProductChoice {
            class: *class,
            algorithm: *algorithm,
        };
        let choices: Vec<_> = self.chosen.iter().map(choice).collect();
        (!choices.is_empty()).then(|| ProductChoices { library: library.to_owned(), choices })
    }

    /// Imports the choices of a run. Returns a warning, and imports nothing, if they are for another device or library than
    /// `library`.
    pub(crate) fn import(&mut self, choices: &ProductChoices, library: &str) -> Option<String> {
        if choices.library != library {
            return Some(format!(
                "expected the device and library that the run began with ({}), found {library}: the algorithms of its matrix \
                 products are chosen anew, and the run goes on with sums of another order, that is, other last digits",
                choices.library
            ));
        }
        self.chosen.extend(choices.choices.iter().map(|choice| (choice.class, choice.algorithm)));
        None
    }
}

/// The fastest of `candidates`, which are in the library's order: an earlier one unless a later one is clearly faster. `time`
/// returns seconds, or `None` for an algorithm that does not run.
pub(crate) fn fastest<A: Copy>(
    candidates: &[A],
    mut time: impl FnMut(A) -> Result<Option<f32>>,
) -> Result<Option<A>> {
    let mut best: Option<(A, f32)> = None;
    for candidate in candidates {
        if let Some(seconds) = time(*candidate)?
            && best.is_none_or(|(_, least)| seconds < CLEARLY_LESS * least)
        {
            best = Some((*candidate, seconds));
        }
    }
    Ok(best.map(|(candidate, _)| candidate))
}

/// Turns the timing of products on `device` on or off, if its library offers several algorithms.
pub(crate) fn set_timing(device: &Device, timing: bool) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::blas::set_timing(device, timing),
        _ => Ok(()),
    }
}

/// The choices on `device`, for a run that is resumed later; `None` if there are none.
pub(crate) fn export(device: &Device) -> Result<Option<ProductChoices>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::blas::export(device),
        _ => Ok(None),
    }
}

/// Imports the choices of a run; returns a warning if they are not for this device.
pub(crate) fn import(device: &Device, choices: &ProductChoices) -> Result<Option<String>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::blas::import(device, choices),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(m: usize) -> ProductClass {
        ProductClass {
            rows: ProductClass::rows_for(m),
            n: 4096,
            k: 1024,
            transposed: true,
            element: ProductDtype::Bf16,
            bias: false,
            add: true,
            alignment: 256,
        }
    }

    #[test]
    fn a_class_holds_row_counts_up_to_a_power_of_two() {
        assert_eq!(class(4097), class(8192));
        assert_ne!(class(4096), class(4097));
        assert_eq!(class(1).rows, 1);
    }

    #[test]
    fn the_alignment_is_that_of_the_worst_address() {
        for (addresses, expected) in [
            (vec![], 256),
            (vec![0x7f00, 0x200], 256),
            (vec![0x100, 0x210, 0x400], 16),
            (vec![0x100, 0x102], 2),
        ] {
            assert_eq!(ProductClass::common_alignment(addresses.clone()), expected, "{addresses:x?}");
        }
    }

    #[test]
    fn products_of_many_rows_are_timed_once_each_and_not_without_end() {
        let mut table = ChoiceTable::default();
        assert!(!table.is_to_time(&class(512)), "timing is off until a run turns it on");
        table.timing = true;
        assert!(!table.is_to_time(&class(128)));
        assert!(table.is_to_time(&class(200)) && table.is_to_time(&class(512)));
        table.choose(class(512), Some([7; 8]));
        assert!(!table.is_to_time(&class(512)) && !table.is_to_time(&class(300)));
        assert_eq!(table.get(&class(512)), Some(Some([7; 8])));
        assert_eq!(table.get(&class(8192)), None);
        for n in 0..MOST_CLASSES {
            table.choose(ProductClass { n, ..class(512) }, None);
        }
        assert!(!table.is_to_time(&class(8192)));
    }

    #[test]
    fn choices_survive_a_file_and_bind_to_their_device() {
        let mut table = ChoiceTable::default();
        assert_eq!(table.export("H100"), None);
        table.choose(class(8000), Some([u64::MAX, 1, 2, 3, 4, 5, 6, 1 << 63]));
        table.choose(class(500), None);
        let exported = table.export("H100").expect("there are choices");
        let text = serde_json::to_string(&exported).expect("plain data");
        let read: ProductChoices = serde_json::from_str(&text).expect("what was written");
        assert_eq!(read, exported);
        let mut resumed = ChoiceTable::default();
        assert_eq!(resumed.import(&read, "H100"), None);
        assert_eq!(resumed.get(&class(5000)), Some(Some([u64::MAX, 1, 2, 3, 4, 5, 6, 1 << 63])));
        assert_eq!(resumed.get(&class(500)), Some(None));
        let mut other = ChoiceTable::default();
        let warning = other.import(&read, "A100").expect("another device");
        assert!(warning.contains("H100") && warning.contains("A100"), "{warning}");
        assert_eq!(other.export("A100"), None);
    }

    #[test]
    fn the_fastest_is_the_first_unless_another_is_clearly_faster() {
        let chosen = |times: &[Option<f32>]| {
            let candidates: Vec<usize> = (0..times.len()).collect();
            fastest(&candidates, |i| Ok(times[i])).expect("no errors here")
        };
        assert_eq!(chosen(&[Some(1.0), Some(0.99), Some(0.97)]), Some(2));
        assert_eq!(chosen(&[Some(1.0), Some(0.99), Some(1.2)]), Some(0));
        assert_eq!(chosen(&[None, Some(2.0), Some(1.0)]), Some(2), "one that does not run is left out");
        assert_eq!(chosen(&[None, None]), None);
        assert_eq!(chosen(&[]), None);
        let failed = fastest(&[1], |_| Err(Error::Invalid("broken".into())));
        assert!(failed.is_err());
    }
}

//! Peak rates of cards by their data sheets.

use candle_core::DType;

/// Words in a card's name, and TFLOP/s of its dense products in bf16 (and f16) with sums in f32. The first entry with
/// all words in the name counts.
///
/// Data sheets give most of these with 2:4 sparsity, at twice the dense rate; the figures here are dense:
///
/// * H100, H200: "NVIDIA H100 Tensor Core GPU" (2023) with 1,979, 1,513 (PCIe) and 1,671 (NVL), "NVIDIA H200 Tensor Core
///   GPU" (2024) with 1,979 and 1,671 (NVL), "NVIDIA GH200 Grace Hopper Superchip" (2023) with 1,979.
/// * A100, A40, A10: "NVIDIA A100 Tensor Core GPU" (2021) with 312 dense, "NVIDIA A40" (2021) with 149.7, "NVIDIA A10"
///   (2021) with 125.
/// * B200: "NVIDIA HGX B200" (2024) with 36 PFLOPS of 8 cards, GB200: "NVIDIA GB200 NVL72" (2024) with 360 PFLOPS of 72.
/// * L40S, L4: "NVIDIA L40S" (2023) with 362.05 dense, "NVIDIA L4" (2023) with 242.
/// * GeForce: the white papers of GA102 (2021, table 9), Ada (2022, appendix A) and RTX Blackwell (2025, appendix A): 71,
///   165.2 and 209.5, "peak BF16 tensor TFLOPS with FP32 accumulate", dense.
const TFLOPS: [(&[&str], f64); 16] = [
    (&["H100", "PCIe"], 756.5),
    (&["H100", "NVL"], 835.5),
    (&["H100", "HBM3"], 989.5),
    (&["H200", "NVL"], 835.5),
    (&["H200"], 989.5),
    (&["GH200"], 989.5),
    (&["A100"], 312.0),
    (&["A40"], 149.7),
    (&["A10"], 125.0),
    (&["B200"], 2250.0),
    (&["GB200"], 2500.0),
    (&["L40S"], 362.0),
    (&["L4"], 121.0),
    (&["GeForce", "RTX", "3090"], 71.0),
    (&["GeForce", "RTX", "4090"], 165.2),
    (&["GeForce", "RTX", "5090"], 209.5),
];

/// Words in the names of cards that are a part of a card, or another card with the same number.
const OTHER: [&str; 4] = ["MIG", "Laptop", "D", "Ti"];

/// FLOP/s of dense products in `dtype` by the data sheet of the card with the driver's name `device_name`; `None` for
/// an unknown card, a part of a card (MIG), and f32.
pub fn flops_per_second(device_name: &str, dtype: DType) -> Option<f64> {
    if !matches!(dtype, DType::BF16 | DType::F16) {
        return None;
    }
    let words: Vec<&str> = device_name.split([' ', '-', '_']).collect();
    if words.iter().any(|word| OTHER.contains(word)) {
        return None;
    }
    let known = TFLOPS.iter().find(|(all, _)| all.iter().all(|word| words.contains(word)));
    known.map(|(_, tflops)| tflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_the_driver_s_names() {
        // Names as nvidia-smi prints them.
        for (name, expected) in [
            ("NVIDIA H100 80GB HBM3", Some(989.5)),
            ("NVIDIA H100 PCIe", Some(756.5)),
            ("NVIDIA H100 NVL", Some(835.5)),
            ("NVIDIA H200", Some(989.5)),
            ("NVIDIA H200 NVL", Some(835.5)),
            ("NVIDIA GH200 480GB", Some(989.5)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA A100 80GB PCIe", Some(312.0)),
            ("NVIDIA B200", Some(2250.0)),
            ("NVIDIA L4", Some(121.0)),
            ("NVIDIA GeForce RTX 4090", Some(165.2)),
            ("NVIDIA GeForce RTX 5090", Some(209.5)),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
            ("NVIDIA GeForce RTX 4090 D", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
            ("NVIDIA H20", None),
            ("NVIDIA A1000", None),
            ("NVIDIA GPU", None),
        ] {
            let tflops = |dtype| flops_per_second(name, dtype).map(|f| f / 1e12);
            assert_eq!(tflops(DType::BF16), expected, "{name}");
            assert_eq!((tflops(DType::F16), tflops(DType::F32)), (expected, None), "{name}");
        }
    }
}

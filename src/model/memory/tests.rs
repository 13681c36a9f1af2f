use super::*;
use crate::checkpoint::Checkpoint;
use crate::model::Decoder;
use candle_core::{DType, Device};
use std::path::Path;

const F32: Dtypes = Dtypes { weights: DType::F32, activations: DType::F32 };
const BF16: Dtypes = Dtypes { weights: DType::BF16, activations: DType::F32 };

const GOLDEN: [&str; 8] = [
    "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts",
    "mamba_groups",
];

/// A model of tests/golden, and its tensors' values.
fn golden(name: &str, dtypes: Dtypes) -> (ModelConfig, Decoder) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| {}).unwrap();
    (bare.config, model)
}

#[test]
fn weights_are_those_of_a_loaded_model() {
    for name in GOLDEN {
        for dtypes in [F32, BF16] {
            let (config, model) = golden(name, dtypes);
            let parameters = Parameters::new(&config);
            let loaded = model.weight_bytes();
            let memory = TuningMemory::new(&config, dtypes, DeviceLocation::Cpu);
            if dtypes.packed_for(DeviceLocation::Cpu).is_none() {
                let matrices = parameters.matrices * dtypes.weights.size_in_bytes();
                assert_eq!(memory.weights, matrices + 4 * parameters.vectors);
            }
            // A loaded model counts its biases as weights, and leaves out its norms and Mamba2's vectors.
            let vectors = all_layers(&config)
                .iter()
                .flat_map(LayerTensors::vectors)
                .map(LayerVector::values)
                .sum::<usize>();
            let norms = 4 * (config.hidden_size * (2 * config.num_hidden_layers + 1) + vectors);
            assert_eq!(memory.weights - norms, loaded, "{name} in {dtypes:?}");
        }
    }
}

#[test]
fn transposes_are_those_of_a_loaded_model() {
    for name in GOLDEN {
        let (config, model) = golden(name, BF16);
        let (isa, before) = (BF16.packed_for(DeviceLocation::Cpu), model.weight_bytes());
        model.pack_transposes();
        let packed = isa.map_or(0, |_| transposed_bytes(&config));
        assert_eq!(model.weight_bytes() - before, packed, "{name}");
        assert_eq!(model.has_transposes(), isa.is_some());
        let planned = TuningMemory::new(&config, BF16, DeviceLocation::Cpu).transposes;
        assert_eq!(planned > 0, isa.is_some_and(|isa| isa.name() == "amx_bf16"));
        let gpu = TuningMemory::new(&config, BF16, DeviceLocation::Cuda { gpu_id: 0 });
        assert_eq!((gpu.transposes, TuningMemory::new(&config, F32, DeviceLocation::Cpu).transposes), (0, 0));
    }
}

#[test]
fn parameters_are_the_checkpoints() {
    for name in GOLDEN {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let config = ModelConfig::from_json(&path.join("config.json")).unwrap();
        let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let stored = file.tensors().iter().map(|(_, t)| t.shape().iter().product::<usize>()).sum::<usize>();
        assert_eq!(Parameters::new(&config).total(), stored, "{name}");
    }
}

/// 8b in bf16 on a GPU, the numbers worked out by hand.
#[test]
fn the_shape_of_8b() {
    let config = granite_8b();
    let dtypes = Dtypes { weights: DType::BF16, activations: DType::BF16 };
    let memory = TuningMemory::new(&config, dtypes, DeviceLocation::Cuda { gpu_id: 0 });
    let (c, f, q, kv) = (4096, 12800, 4096, 2048);
    let block = (q + kv) * c + c * q + 3 * f * c;
    assert_eq!(memory.weights, 2 * (100_352 * c + 40 * block + 81 * c));
    let layer = memory.inner_layers[0].tape;
    assert_eq!(layer, 2 * (2 * c + q + kv + q + 2 * f) + 4 * 34);
    assert_eq!(memory.tape_per_row(0), 39 * layer + 2 * (c + kv) + 4);
    assert_eq!(memory.tape_per_row(39), 39 * 2 * c + 2 * (c + kv) + 4);
    assert_eq!(memory.tape_per_row(1000), memory.tape_per_row(39));
    assert_eq!(memory.head, 512 * 100_352 * 2);
    assert_eq!(memory.workspace_per_row, 2 * (2 * c + 3 * f));
    // With a whole block left, a recomputed one takes the place of that; without, some of it comes on top.
    let last = 2 * (c + kv) + 4;
    assert_eq!(memory.workspace(2048, 0, 0), 2048 * (memory.workspace_per_row - last));
    assert_eq!(memory.workspace(2048, 0, 38), memory.workspace(2048, 0, 0));
    let again = memory.workspace_per_row + layer - 2 * c - last;
    assert_eq!(memory.workspace(2048, 0, 39), 2048 * again);
    assert_eq!(memory.workspace(0, 0, 0), memory.head);
    // Matrices of 8,166 rows are those of 8,192.
    for targets in [0, 512, 3000] {
        assert_eq!(memory.tape(8166, targets, 7), memory.tape(8192, targets, 7));
        assert_eq!(memory.workspace(8166, targets, 39), memory.workspace(8192, targets, 39));
    }
    assert_eq!(memory.tape(0, 2900, 0), memory.tape(0, 3072, 0));
    assert_eq!(memory.tapes([2100, 8166], 0, 3), memory.tape(2304, 0, 3) + memory.tape(8192, 0, 3));
    assert_eq!(memory.reserve(1_000_000), (1 << 30) + 100_000);
}

/// Granite 3's vocabulary on a GPU, and the CPU, which pads nothing.
#[test]
fn a_padded_vocabulary_is_counted() {
    let dtypes = Dtypes { weights: DType::BF16, activations: DType::BF16 };
    for (vocab, padded) in [(49_155, 49_216), (49_159, 49_216), (49_216, 49_216)] {
        for tied in [true, false] {
            let config = ModelConfig { vocab_size: vocab, tie_word_embeddings: tied, ..granite_8b() };
            let memory = TuningMemory::new(&config, dtypes, DeviceLocation::Cuda { gpu_id: 0 });
            let parameters = Parameters::new(&config);
            assert_eq!(memory.weights, 2 * (parameters.total() + (padded - vocab) * 4096));
            assert_eq!(memory.head, 512 * padded * 2);
            let cpu = TuningMemory::new(&config, F32, DeviceLocation::Cpu);
            assert_eq!((cpu.weights, cpu.head), (4 * parameters.total(), 64 * vocab * 4));
        }
    }
}

#[test]
fn a_pass_of_prefixes_keeps_keys_and_values() {
    let (config, _) = golden("granite", F32);
    let memory = TuningMemory::new(&config, F32, DeviceLocation::Cpu);
    assert_eq!(memory.prefix_keys_values(7, 0), 0);
    assert_eq!(memory.prefix_keys_values(7, 2), 7 * 2 * 2 * 8 * 4);
    assert_eq!(memory.prefix_keys_values(7, 9), memory.prefix_keys_values(7, 2), "the last block is kept");
}

#[test]
fn the_prompt_has_two_moments() {
    let (config, _) = golden("granite", F32);
    let memory = TuningMemory::new(&config, F32, DeviceLocation::Cpu);
    assert_eq!(memory.prompt_per_token, 3 * 40 * 4);
}

/// The shape of Granite 4.1 8b.
pub(crate) fn granite_8b() -> ModelConfig {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/config.json");
    let small = ModelConfig::from_json(&path).expect("the fixture is valid");
    ModelConfig {
        num_hidden_layers: 40,
        hidden_size: 4096,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        intermediate_size: 12800,
        vocab_size: 100_352,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        ..small
    }
}

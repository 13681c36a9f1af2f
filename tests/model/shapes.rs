//! The shapes under `configs/models`: all of them are read, and have as many parameters as transformers says.

use gneiss::checkpoint::{MixerKind, ModelConfig, ModelType};
use gneiss::model::Parameters;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Parameters of the model that transformers 5.23.0 builds of each file (`AutoModelForCausalLM.from_config`,
/// a tied head counted once), and the size that the model's name gives.
const MODELS: [(&str, usize, f64); 29] = [
    ("granite-3.0-1b-a400m", 1_334_628_352, 1e9),
    ("granite-3.0-2b", 2_533_531_648, 2e9),
    ("granite-3.0-3b-a800m", 3_298_793_472, 3e9),
    ("granite-3.0-8b", 8_170_848_256, 8e9),
    ("granite-3.1-1b-a400m", 1_334_628_352, 1e9),
    ("granite-3.1-2b", 2_533_531_648, 2e9),
    ("granite-3.1-3b-a800m", 3_298_793_472, 3e9),
    ("granite-3.1-8b", 8_170_848_256, 8e9),
    ("granite-3.2-2b", 2_533_531_648, 2e9),
    ("granite-3.2-8b", 8_170_848_256, 8e9),
    ("granite-3.3-2b", 2_533_531_648, 2e9),
    ("granite-3.3-8b", 8_170_848_256, 8e9),
    ("granite-3b-code-base-2k", 3_482_503_680, 3e9),
    ("granite-4.0-1b", 1_631_750_144, 1e9),
    ("granite-4.0-350m", 352_379_904, 350e6),
    ("granite-4.0-h-1b", 1_461_538_368, 1e9),
    ("granite-4.0-h-350m", 340_332_224, 350e6),
    ("granite-4.0-h-micro", 3_191_396_096, 3e9),
    ("granite-4.0-h-small", 32_207_337_984, 32e9),
    ("granite-4.0-h-tiny", 6_939_037_248, 7e9),
    ("granite-4.0-micro", 3_402_836_480, 3e9),
    ("granite-4.1-30b", 28_865_728_512, 30e9),
    ("granite-4.1-3b", 3_402_836_480, 3e9),
    ("granite-4.1-8b", 8_380_551_168, 8e9),
    ("granite-4.2-30b", 28_865_728_512, 30e9),
    ("granite-4.2-3b", 3_402_836_480, 3e9),
    ("granite-4.2-8b", 8_380_551_168, 8e9),
    ("granite-7b-base", 6_738_481_152, 7e9),
    ("granite-8b-code-base-4k", 8_054_910_976, 8e9),
];

fn files() -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
        .collect()
}

#[test]
fn every_shape_has_as_many_parameters_as_transformers_says() {
    let files = files();
    assert_eq!(files.keys().map(String::as_str).collect::<Vec<_>>(), MODELS.map(|(name, _, _)| name));
    for (name, parameters, size) in MODELS {
        let config = ModelConfig::from_json(&files[name]).unwrap();
        assert_eq!(Parameters::new(&config).total(), parameters, "{name}");
        // Names round as they like: "1b" is 1.6, "2b" is 2.5.
        assert!((0.9..1.7).contains(&(parameters as f64 / size)), "{name}");
    }
}

#[test]
fn multipliers_follow_the_family() {
    for (name, path) in files() {
        let config = ModelConfig::from_json(&path).unwrap();
        let is_hybrid = config.layers_with(MixerKind::Mamba2) > 0;
        assert_eq!(config.rope.is_none(), is_hybrid, "{name}");
        let with_experts_alone = config.model_type == ModelType::GraniteMoe;
        assert_eq!(config.rms_norm_eps, if with_experts_alone { 1e-6 } else { 1e-5 }, "{name}");
        let head_dim = config.hidden_size / config.num_attention_heads;
        assert_eq!(config.head_dim, head_dim, "{name}");
        if config.model_type == ModelType::Llama {
            continue;
        }
        // Granite's are those of muP: 1 / D, C / 256. The two sizes with experts alone have the logits' divisor of the larger.
        assert_eq!(config.attention_multiplier, 1.0 / head_dim as f64, "{name}");
        let width = if with_experts_alone { 1536 } else { config.hidden_size };
        assert_eq!(config.logits_scaling, width as f64 / 256.0, "{name}");
        assert_eq!(config.embedding_multiplier, 12.0, "{name}");
        assert!((0.17..0.27).contains(&config.residual_multiplier), "{name}");
    }
}

/// The layers of the hybrids, and the parameters that one token's way through the model multiplies.
#[test]
fn hybrids_and_experts() {
    let files = files();
    for (name, attention, experts, active) in [
        ("granite-3.1-1b-a400m", 24, Some((32, 8)), 0.429),
        ("granite-3.1-3b-a800m", 32, Some((40, 8)), 0.883),
        ("granite-4.0-h-350m", 4, None, 0.340),
        ("granite-4.0-h-1b", 4, None, 1.462),
        ("granite-4.0-h-micro", 4, None, 3.191),
        ("granite-4.0-h-tiny", 4, Some((64, 6)), 1.465),
        ("granite-4.0-h-small", 4, Some((72, 10)), 8.803),
    ] {
        let config = ModelConfig::from_json(&files[name]).unwrap();
        assert_eq!(config.layers_with(MixerKind::Attention), attention, "{name}");
        assert_eq!(config.experts.map(|experts| (experts.count, experts.per_token)), experts, "{name}");
        let error = Parameters::active(&config) as f64 / 1e9 - active;
        assert!(error.abs() < 6e-4, "{name}");
        let Some(mamba) = &config.mamba else { continue };
        assert_eq!(mamba.inner(), 2 * config.hidden_size, "{name}");
        assert_eq!(
            (mamba.state, mamba.groups, mamba.taps, mamba.dt_limit),
            (128, 1, 4, (0.0, f64::INFINITY))
        );
    }
}

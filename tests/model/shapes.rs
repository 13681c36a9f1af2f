//! The shapes under `configs/models`: all of them are read, and have as many parameters as transformers says.

use gneiss::checkpoint::{ModelConfig, ModelType};
use gneiss::model::Parameters;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Parameters of the model that transformers 5.23.0 builds of each file (`AutoModelForCausalLM.from_config`,
/// a tied head counted once), and the size that the model's name gives.
const MODELS: [(&str, usize, f64); 20] = [
    ("granite-3.0-2b", 2_533_531_648, 2e9),
    ("granite-3.0-8b", 8_170_848_256, 8e9),
    ("granite-3.1-2b", 2_533_531_648, 2e9),
    ("granite-3.1-8b", 8_170_848_256, 8e9),
    ("granite-3.2-2b", 2_533_531_648, 2e9),
    ("granite-3.2-8b", 8_170_848_256, 8e9),
    ("granite-3.3-2b", 2_533_531_648, 2e9),
    ("granite-3.3-8b", 8_170_848_256, 8e9),
    ("granite-3b-code-base-2k", 3_482_503_680, 3e9),
    ("granite-4.0-1b", 1_631_750_144, 1e9),
    ("granite-4.0-350m", 352_379_904, 350e6),
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
        assert!(config.rope.is_some(), "{name}");
        assert_eq!(config.rms_norm_eps, 1e-5, "{name}");
        let head_dim = config.hidden_size / config.num_attention_heads;
        assert_eq!(config.head_dim, head_dim, "{name}");
        if config.model_type == ModelType::Llama {
            continue;
        }
        // Granite's are those of muP: 1 / D, C / 256.
        assert_eq!(config.attention_multiplier, 1.0 / head_dim as f64, "{name}");
        assert_eq!(config.logits_scaling, config.hidden_size as f64 / 256.0, "{name}");
        assert_eq!(config.embedding_multiplier, 12.0, "{name}");
        assert!((0.17..0.27).contains(&config.residual_multiplier), "{name}");
    }
}

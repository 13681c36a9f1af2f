//! What loading a model takes beside the model, held against what the allocator gives out. One test a process, so that
//! nothing else allocates meanwhile.

use candle_core::{DType, Device};
use gneiss::model::{Checkpoint, Granite, granite};
use std::path::{Path, PathBuf};

#[path = "common/allocated.rs"]
mod allocated;

/// The real model, which `make model` fetches into models/ (or GNEISS_MODELS names its folder).
fn smollm2() -> PathBuf {
    let folder = std::env::var_os("GNEISS_MODELS").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models"));
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is not there: `make model` gets it", path.display());
    path
}

#[test]
fn a_quantised_file_needs_little_more_memory_than_its_model() {
    let Checkpoint { config, weights, .. } = Checkpoint::open(&smollm2()).unwrap();
    for dtype in [DType::BF16, DType::F32] {
        let dtypes = granite::dtypes(dtype, &Device::Cpu).unwrap();
        let load = || Granite::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
        let (peak, held, model) = allocated::during(load);
        let weights = model.weight_bytes() as f64;
        println!("{dtype:?}: {weights} bytes of weights, {held} held, {peak} at the peak");
        assert!((held as f64) < 1.01 * weights, "{dtype:?}: {held} bytes held for {weights} of weights");
        assert!((peak as f64) < 1.2 * held as f64, "{dtype:?}: {peak} bytes for a model of {held}");
    }
}

//! What loading a model takes beside the model, held against what the allocator gives out. One test a process, so that
//! nothing else allocates meanwhile.

use candle_core::{DType, Device};
use gneiss::checkpoint::Checkpoint;
use gneiss::model::{Decoder, Dtypes};

#[path = "../common/allocated.rs"]
mod allocated;
#[path = "../common/smollm2.rs"]
mod smollm2;

#[test]
fn a_quantised_file_needs_little_more_memory_than_its_model() {
    let Checkpoint { config, weights, .. } = Checkpoint::open(&smollm2::path()).unwrap();
    for dtype in [DType::BF16, DType::F32] {
        let dtypes = Dtypes::for_weights(dtype, &Device::Cpu).unwrap();
        let load = || Decoder::load(&config, &weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
        let (peak, held, model) = allocated::during(load);
        let weights = model.weight_bytes() as f64;
        println!("{dtype:?}: {weights} bytes of weights, {held} held, {peak} at the peak");
        assert!((held as f64) < 1.01 * weights, "{dtype:?}: {held} bytes held for {weights} of weights");
        assert!((peak as f64) < 1.2 * held as f64, "{dtype:?}: {peak} bytes for a model of {held}");
    }
}

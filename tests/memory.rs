//! The tape's size, held against what the allocator gives out. One test a process, so that nothing else
//! allocates meanwhile.

use candle_core::{DType, Device, Tensor};
use gneiss::data::{Example, Passes, PrefixGroup};
use gneiss::model::{Checkpoint, Dtypes, Granite, TuningMemory};
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicIsize, Ordering::SeqCst};

/// Counts the bytes that are given out.
struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: everything is the system allocator's; only a number is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, SeqCst);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, SeqCst);
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_tape_is_as_large_as_estimated() {
    for (name, rows) in [("granite", 300), ("llama_bias", 211), ("hybrid_dense", 120)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
        let dtypes = Dtypes { weights: DType::F32, activations: DType::F32 };
        let model = Granite::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| {}).unwrap();
        let memory = TuningMemory::of(&bare.config, dtypes);
        let prompt = Tensor::ones((5, bare.config.hidden_size), DType::F32, &Device::Cpu).unwrap();
        // Half of the rows predict, so that the two kinds of rows both count.
        let half = rows as u32 / 2;
        let example =
            Example { input: (1..half).map(|i| i % 97).collect(), target: vec![3; half as usize], line: 1 };
        let batch = Passes::new(&[PrefixGroup::new(0..5, [&example])], bare.config.vocab_size, 1000).lead;
        // The first pass makes what stays: the rotary table, the threads, the products' buffers.
        drop(model.forward(&batch, &prompt, None).unwrap());
        let before = LIVE.load(SeqCst);
        let tape = model.forward(&batch, &prompt, None).unwrap();
        let held = (LIVE.load(SeqCst) - before) as f64;
        let expected = memory.tape(batch.ids.len(), batch.target_rows.len()) as f64;
        assert!(batch.target_rows.len() * 2 >= batch.ids.len() - 5, "{name}: few target rows");
        assert!((held / expected - 1.0).abs() < 0.02, "{name}: estimated {expected} bytes, held {held}");
        drop(tape);
    }
}

use super::*;
use crate::checkpoint::Checkpoint;
use crate::model::Dtypes;
use crate::ops::bf16::Isa;
use candle_core::DType;
use std::path::Path;

#[test]
fn warm_up_takes_the_shortest_example_and_minds_no_shortage() {
    use crate::device::{Work, faults};
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
    let example = |n: usize| Example { input: vec![3; n], target: vec![5, 6], line: 1 };
    let train = [example(9), example(4), example(7)];
    let prompt = Prompt::embeddings(&model.embedding().narrow(0, 0, 3).unwrap()).unwrap();
    let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let rows = seen.clone();
    let fails = move |work: Work, n: usize| {
        rows.borrow_mut().push((work, n));
        rows.borrow().len() > 1
    };
    faults::with(fails, || {
        warm_up(&model, &train, &prompt).unwrap();
        warm_up(&model, &train, &prompt).unwrap();
        warm_up(&model, &[], &prompt).unwrap();
    });
    assert_eq!(*seen.borrow(), [(Work::Pass, 3 + 4 + 1); 2], "the second ran out of memory");
}

#[test]
fn copy_weights_makes_the_copy_that_is_planned() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::BF16, &Device::Cpu).unwrap();
    let model = Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap();
    let train = [Example { input: vec![3; 9], target: vec![5, 6], line: 1 }];
    let prompt = Prompt::embeddings(&model.embedding().narrow(0, 0, 3).unwrap()).unwrap();
    let plan = plan_run(&TrainOptions::default(), &model, &train, &prompt, None).unwrap();
    let is_amx = Isa::best().is_some_and(|isa| isa.name() == "amx_bf16");
    assert_eq!(model.has_transposes(), is_amx, "other CPUs have no use for a copy");
    let copied = BackwardWeights::Copied { bytes: 1, is_packed: false };
    copy_weights(&model, &MemoryPlan { backward_weights: BackwardWeights::TransposedEachTime, ..plan });
    assert_eq!(model.has_transposes(), is_amx);
    copy_weights(&model, &MemoryPlan { backward_weights: copied, ..plan });
    assert_eq!(model.has_transposes(), Isa::best().is_some());
    // A model that has the copy is planned with it, and it takes nothing of what is free.
    let again = plan_run(&TrainOptions::default(), &model, &train, &prompt, None).unwrap();
    assert_eq!(again.total(), plan.total() - if is_amx { plan.backward_weights.bytes() } else { 0 });
}

#[test]
fn row_range_exceeds_no_configured_limit() {
    assert_eq!(row_range(0, true), RowRange { full: 512, most: 512 });
    assert_eq!(row_range(0, false), RowRange { full: 2048, most: 10_240 });
    for on_cpu in [true, false] {
        assert_eq!(row_range(8192, on_cpu), RowRange { full: 8192, most: 8192 });
    }
}

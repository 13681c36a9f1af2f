use super::*;
use crate::model::Dtypes;
use crate::model::memory::granite_8b;
use candle_core::{DType, DeviceLocation};

const GIB: usize = 1 << 30;

fn memory() -> TuningMemory {
    let dtypes = Dtypes { weights: DType::BF16, activations: DType::BF16 };
    TuningMemory::new(&granite_8b(), dtypes, DeviceLocation::Cuda { gpu_id: 0 })
}

/// The tutorial's step at accumulation 16: 128 reviews of 40 rows behind 100 virtual tokens.
const WORK: LargestStep = LargestStep {
    kind: PromptKind::Embeddings,
    virtual_tokens: 100,
    prefix_rows: 108,
    sequence_rows: 128 * 40,
    longest: 90,
    sequences: 128,
    targets: 256,
    teacher_rows: 0,
    network_values: 0,
};

fn budget(bytes: usize) -> Budget {
    Budget { bytes: Some(bytes), configured: true, with_weights: true }
}

fn plan(gib: f64, full: usize, most: usize) -> MemoryPlan {
    MemoryPlan::new(&memory(), &WORK, budget((gib * GIB as f64) as usize), RowRange { full, most })
}

#[test]
fn an_8b_model_tunes_in_24_gib_at_2048_rows() {
    let plan = plan(24.0, 2048, 2048);
    assert_eq!(plan.missing(), 0);
    assert_eq!(plan.limits.max_rows, 2048);
    let recompute = plan.limits.recompute;
    assert!((1..20).contains(&recompute), "{recompute} blocks are recomputed");
    let sum = plan.weights + plan.tape + plan.workspace + plan.prompt + plan.reserve;
    assert!(sum == plan.total() && sum <= 24 * GIB);
    assert!(plan.weights > 16 * 1_000_000_000 && plan.reserve > GIB);
    // One block less does not fit.
    let one_less = Limits { recompute: recompute - 1, ..plan.limits };
    assert!(MemoryPlan::with_limits(&memory(), &WORK, plan.budget, one_less).missing() > 0);
}

#[test]
fn rows_go_before_blocks_and_again_behind_them() {
    let limits = |gib| plan(gib, 2048, 8192).limits;
    assert_eq!(limits(80.0), Limits { max_rows: WORK.rows(), recompute: 0 });
    // Room for some rows more than fill the device.
    let fewer = limits(30.0);
    assert!((2048..WORK.rows()).contains(&fewer.max_rows) && fewer.recompute == 0, "{fewer:?}");
    let recomputed = limits(24.0);
    assert!(recomputed.max_rows == 2048 && recomputed.recompute > 0, "{recomputed:?}");
    let small = limits(17.2);
    assert!((90..2048).contains(&small.max_rows) && small.recompute == 39, "{small:?}");
    let plan = plan(17.2, 2048, 8192);
    assert_eq!(plan.missing(), 0);
    let more = Limits { max_rows: small.max_rows + 1, ..small };
    assert!(MemoryPlan::with_limits(&memory(), &WORK, plan.budget, more).missing() > 0);
    // Rows that are asked for stay: blocks are recomputed for them.
    let asked = self::plan(30.0, 8192, 8192).limits;
    assert!(asked.max_rows == WORK.rows() && asked.recompute > 0, "{asked:?}");
}

#[test]
fn what_does_not_fit_gets_the_smallest_plan() {
    let plan = plan(16.0, 2048, 8192);
    assert_eq!(plan.limits, Limits { max_rows: 90, recompute: 39 });
    assert_eq!(plan.missing(), plan.total() - 16 * GIB);
}

#[test]
fn an_unknown_budget_limits_nothing_and_loaded_weights_do_not_count() {
    let rows = RowRange { full: 512, most: 512 };
    let unknown = Budget { bytes: None, configured: false, with_weights: false };
    let plan = MemoryPlan::new(&memory(), &WORK, unknown, rows);
    assert_eq!((plan.limits, plan.missing()), (Limits::rows(512), 0));
    assert_eq!(plan.total(), plan.tape + plan.workspace + plan.prompt + plan.reserve);
    let loaded = Budget { bytes: Some(4 * GIB), ..unknown };
    assert_eq!(MemoryPlan::new(&memory(), &WORK, loaded, rows).limits, Limits::rows(512));
}

#[test]
fn second_copy_of_the_weights_gets_what_is_left() {
    let rows = RowRange { full: 2048, most: 8192 };
    let plan = |memory: &TuningMemory, budget| MemoryPlan::new(memory, &WORK, budget, rows);
    let (without, transposes) = (memory(), 5 * GIB);
    let with = TuningMemory { transposes, ..without.clone() };
    for gib in [16, 20, 30, 80] {
        let needed = plan(&without, budget(gib * GIB)).total();
        // The same rows and blocks as without a copy; a byte less than both take, and there is none.
        for (bytes, expected) in [
            (needed + transposes, BackwardWeights::Copied { bytes: transposes, is_packed: false }),
            (needed + transposes - 1, BackwardWeights::TransposedEachTime),
        ] {
            let (found, other) = (plan(&with, budget(bytes)), plan(&without, budget(bytes)));
            assert_eq!(other.backward_weights, BackwardWeights::Shared);
            assert_eq!(found.limits, other.limits);
            if found.limits == plan(&without, budget(gib * GIB)).limits {
                assert_eq!(found.backward_weights, expected, "{gib} GiB");
            }
            assert_eq!(found.total(), other.total() + found.backward_weights.bytes());
            assert!(found.missing() == 0 || other.missing() > 0);
        }
    }
    // One that is in memory counts with the weights: not in what is free beside them.
    let packed = TuningMemory { has_transposes: true, ..with.clone() };
    for (with_weights, counted) in [(true, transposes), (false, 0)] {
        let budget = Budget { with_weights, ..budget(80 * GIB) };
        let found = plan(&packed, budget);
        assert_eq!(found.backward_weights, BackwardWeights::Copied { bytes: transposes, is_packed: true });
        assert_eq!(found.total(), plan(&without, budget).total() + counted);
    }
}

/// All example orders are held against the bound: the largest step is that of the longest examples.
#[test]
fn the_largest_step_is_counted() {
    let example = |input: usize, target: usize| Example {
        input: [vec![7, 8], vec![input as u32; input - 2]].concat(),
        target: vec![1; target],
        line: 0,
    };
    let train = [example(5, 1), example(9, 2), example(3, 4), example(6, 1)];
    let work = LargestStep::new(&train, PromptKind::Embeddings, 10, 2);
    let expected = LargestStep {
        kind: PromptKind::Embeddings,
        virtual_tokens: 10,
        prefix_rows: 12,
        sequence_rows: 8 + 4,
        longest: 8,
        sequences: 2,
        targets: 6,
        teacher_rows: 0,
        network_values: 0,
    };
    assert_eq!((work, work.rows()), (expected, 24));
    assert_eq!(LargestStep::new(&train, PromptKind::Embeddings, 10, 100).sequences, 4);
}

#[test]
fn a_split_batch_holds_the_prefixes_beside_a_pass() {
    let memory = memory();
    let whole = WORK.pass(&memory, Limits { max_rows: WORK.rows(), recompute: 3 });
    let rows = WORK.rows();
    assert_eq!(whole, (memory.tape(rows, 256, 3), memory.workspace(rows, 256, 3)));
    // The prefix pass takes sequences from 108 rows up to 238, a quarter of what 3,000 rows are above 2,048: the last of
    // them, of 90 rows at most, may begin at 237.
    let split = WORK.pass(&memory, Limits { max_rows: 3000, recompute: 3 });
    let sequences = 237 + 90 - 108;
    assert_eq!(split.0, memory.tapes([108 + sequences, 3000], 256, 3) + memory.prefix_keys_values(108, 3));
    assert_eq!(split.1, memory.workspace(3000, 256, 3) + 108 * memory.split_per_row);
    // In passes of fewer rows it holds the prefixes alone, and so it does on a CPU.
    let alone = |memory: &TuningMemory, rows: usize| {
        let found = WORK.pass(memory, Limits { max_rows: rows, recompute: 3 });
        assert_eq!(found.0, memory.tapes([108, rows], 256, 3) + memory.prefix_keys_values(108, 3));
        assert_eq!(found.1, memory.workspace(rows, 256, 3) + 108 * memory.split_per_row);
    };
    alone(&memory, 2048);
    alone(&TuningMemory { on_gpu: false, ..memory.clone() }, 3000);
    // Never more than twice what it should have.
    let long = LargestStep { longest: 4000, ..WORK };
    let split = long.pass(&memory, Limits { max_rows: 4096, recompute: 0 });
    assert_eq!(split.0, memory.tapes([2 * 512, 4096], 256, 0));
    // A sequence is never cut.
    let tiny = |max_rows| WORK.pass(&memory, Limits { max_rows, recompute: 3 });
    assert_eq!(tiny(1), tiny(90));
    // A single sequence never makes two passes.
    let one = LargestStep { sequences: 1, sequence_rows: 90, ..WORK };
    assert_eq!(one.pass(&memory, Limits::rows(1)), one.pass(&memory, Limits::rows(1000)));
}

#[test]
fn less_ends_at_single_sequences_with_all_recomputed() {
    assert_eq!(Limits::rows(usize::MAX).less(1000, 40), Some(Limits { max_rows: 500, recompute: 20 }));
    let (mut limits, mut tries) = (Limits::rows(8192), 0);
    while let Some(less) = limits.less(3000, 40) {
        assert!(less.max_rows <= limits.max_rows && less.recompute >= limits.recompute && less != limits);
        (limits, tries) = (less, tries + 1);
    }
    assert_eq!((limits, tries), (Limits { max_rows: 1, recompute: 39 }, 11));
    assert_eq!(Limits::rows(1).less(1, 1), None);
}

fn candle(text: &str) -> Error {
    Error::Candle(candle_core::Error::Msg(text.into()))
}

#[test]
fn a_step_is_tried_again_under_less() {
    let (mut tried, mut heard) = (Vec::new(), Vec::new());
    let found = within_memory(
        &Device::Cpu,
        Limits::rows(800),
        |limits| limits.less(1000, 5),
        |limits| {
            tried.push(limits);
            let fits = limits.max_rows <= 200 && limits.recompute >= 3;
            if fits { Ok(limits.max_rows) } else { Err(candle("CUDA_ERROR_OUT_OF_MEMORY")) }
        },
        |limits| {
            heard.push(limits);
            Ok(())
        },
    );
    let steps = [(800, 0), (400, 2), (200, 3)].map(|(max_rows, recompute)| Limits { max_rows, recompute });
    assert_eq!(found.unwrap(), (200, steps[2]));
    assert_eq!((&tried[..], &heard[..]), (&steps[..], &steps[1..]));
}

#[test]
fn a_step_that_never_fits_is_an_error_with_a_hint() {
    let (limits, mut last) = (Limits::rows(64), Limits::rows(64));
    let less = |limits: Limits| limits.less(64, 3);
    let always = |_| Err::<(), _>(candle("CUDA_ERROR_OUT_OF_MEMORY"));
    let told = |limits| {
        last = limits;
        Ok(())
    };
    let error = within_memory(&Device::Cpu, limits, less, always, told).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }) && !error.is_bad_input());
    let text = error.to_string();
    for part in ["CUDA_ERROR_OUT_OF_MEMORY", "single sequence", "max_input_tokens", "model.dtype"] {
        assert!(text.contains(part), "expected {part:?} in {text}");
    }
    assert_eq!(last, Limits { max_rows: 1, recompute: 2 });

    let mut calls = 0;
    let other = |_| {
        calls += 1;
        Err::<(), _>(candle("CUDA_ERROR_ILLEGAL_ADDRESS"))
    };
    let error = within_memory(&Device::Cpu, limits, less, other, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Candle(_)) && calls == 1);
    // Whoever hears of it may end the run.
    let error = within_memory(&Device::Cpu, limits, less, always, |_| Err(Error::Invalid("enough".into())))
        .unwrap_err();
    assert_eq!(error.to_string(), "enough");
}

/// What any step of a run holds in memory at once is no more than the plan counts.
#[test]
fn a_plan_covers_every_split() {
    use crate::batch::{Packing, Passes, PrefixGroup};
    let memory = memory();
    let example = |i: usize| Example {
        input: (0..30 + i * 371 % 800).map(|j| (i + j) as u32).collect(),
        target: vec![1; 1 + i % 4],
        line: 0,
    };
    let (train, mut with_sequences): (Vec<Example>, _) = ((0..40).map(example).collect(), 0);
    for virtual_tokens in [2, 30, 200] {
        let work = LargestStep::new(&train, PromptKind::Embeddings, virtual_tokens, 20);
        for (max_rows, recompute) in (850..work.rows()).step_by(397).flat_map(|rows| [(rows, 0), (rows, 20)])
        {
            let limits = Limits { max_rows, recompute };
            let counted = work.pass(&memory, limits);
            for chunk in train.chunks(20).chain(train.chunks(7)) {
                let groups = [PrefixGroup::new(0..virtual_tokens as u32, chunk)];
                let prefix_pass_rows = memory.prefix_pass_rows(max_rows);
                let packing = Packing { max_rows, prefix_pass_rows, long_above: None };
                let Passes { prefix_pass: lead, example_passes: rest, .. } = Passes::packed(&groups, packing);
                with_sequences += usize::from(lead.examples > 0 && !rest.is_empty());
                let sizes = |b: &crate::batch::PackedBatch| (b.ids.len(), b.target_rows.len());
                let ((rows, targets), own) =
                    (sizes(&lead), memory.workspace(sizes(&lead).0, sizes(&lead).1, recompute));
                let kept = memory.prefix_keys_values(lead.prefix_rows, recompute);
                let prefixes = lead.prefix_rows * memory.split_per_row;
                let found = rest.iter().map(sizes).map(|(r, t)| {
                    memory.tapes([rows, r], targets + t, recompute) + memory.workspace(r, t, recompute)
                });
                let found = match rest.len() {
                    0 => memory.tape(rows, targets, recompute) + own,
                    _ => {
                        found.max().unwrap_or(0).max(memory.tape(rows, targets, recompute) + own)
                            + kept
                            + prefixes
                    }
                };
                assert!(found <= counted.0 + counted.1, "{virtual_tokens} virtual tokens, {limits:?}");
                assert!(rest.iter().all(|b| b.ids.len() <= max_rows.max(work.longest)));
            }
        }
    }
    assert!(with_sequences > 20, "{with_sequences}");
}

#[test]
fn a_step_of_a_quarter_more_rows_is_one_pass_if_it_fits() {
    let work = LargestStep { sequence_rows: 9_500, ..WORK };
    let rows = RowRange { full: 2048, most: 10_240 };
    let limits = |gib: usize| MemoryPlan::new(&memory(), &work, budget(gib * GIB), rows).limits;
    assert_eq!(limits(80), Limits { max_rows: work.rows(), recompute: 0 });
    let fewer = limits(48);
    assert!(fewer.max_rows < work.rows() && fewer.recompute == 0, "{fewer:?}");
    // A limit that the configuration names stays.
    let configured = RowRange { full: 8192, most: 8192 };
    let plan = MemoryPlan::new(&memory(), &work, budget(200 * GIB), configured);
    assert_eq!(plan.limits, Limits::rows(8192));
}

#[test]
fn a_teacher_takes_the_memory_of_its_prefix_and_of_its_logits() {
    let memory = memory();
    let with = WORK.with_teacher(1000).pass(&memory, Limits::rows(usize::MAX));
    let without = WORK.pass(&memory, Limits::rows(usize::MAX));
    let more = 1000 * memory.given_per_token + WORK.targets * memory.input_per_row + memory.head;
    assert_eq!((with.0, with.1), (without.0, without.1 + more));
}

#[test]
fn a_reparameterizations_network_is_part_of_the_prompts_memory() {
    let with_network = LargestStep { network_values: 1000, ..WORK };
    let rows = RowRange { full: 2048, most: 2048 };
    let prompt = |work| MemoryPlan::new(&memory(), work, budget(80 * GIB), rows).prompt;
    assert_eq!(prompt(&with_network) - prompt(&WORK), 12_000);
}

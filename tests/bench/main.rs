//! `gneiss bench` on a checkpoint of 40 columns, and the count of floating-point operations against one by
//! hand.

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use candle_core::{DType, Device};
use gneiss::batch::{Example, Passes, PrefixGroup};
use gneiss::bench::canary::{RateSource, Reading};
use gneiss::bench::examples::whole_steps;
use gneiss::bench::{Bench, Canary, Case, ExampleSource, Lengths, MatmulPeak};
use gneiss::checkpoint::{ModelConfig, ModelType};
use gneiss::config::PromptKind;
use gneiss::device::PeakMemory;
use gneiss::model::{Decoder, Dtypes, Flops};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/config.json")
}

/// Runs `gneiss bench --model-config` on the tiny model, with more arguments.
fn bench(folder: &Path, args: &[&str]) -> Assert {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
    command
        .current_dir(folder)
        .args(["bench", "--device", "cpu", "--dtype", "f32", "--model-config"])
        .arg(tiny());
    command.args(args).assert()
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

const SMALL: [&str; 8] = ["--batch", "2,3", "--virtual-tokens", "5", "--accumulate", "2", "--steps", "2"];

#[test]
fn json_holds_every_figure_and_csv_a_row_a_case() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("bench.csv");
    let args = [&SMALL[..], &["--warmup", "1", "--json", "--profile", "--csv", "bench.csv"]].concat();
    let output = bench(folder.path(), &args).success();
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    for (key, expected) in [
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        ("model", json!("granite")),
        ("weights", json!("random")),
        ("parameters", json!(37560)),
        ("device", json!("cpu")),
        ("dtype", json!("f32")),
        ("steps", json!(2)),
        ("warmup", json!(1)),
    ] {
        assert_eq!(report[key], expected, "{key}");
    }
    let peak = report["matmul_peak"]["flops_per_second"].as_f64().unwrap();
    assert!(peak > 0.0 && report["matmul_peak"]["size"] == 2048);
    // A GPU's alone.
    for key in ["step_products", "launches"] {
        assert_eq!(report[key], Value::Null, "{key}");
    }
    for key in ["sustained_seconds", "data_sheet_flops_per_second"] {
        assert_eq!(report["matmul_peak"][key], Value::Null, "{key}");
    }
    let canary = &report["canary"];
    assert_eq!((&canary["work"], &canary["quiet_share"]), (&json!("gemm"), &json!(0.8)));
    assert!(canary["threads"].as_u64() > Some(0) && canary["flops_per_second"].is_number(), "{canary}");
    assert!(report["matmul_peak"]["quiet"].is_boolean());
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for (case, batch) in cases.iter().zip([2, 3]) {
        check_case(case, batch, peak);
        check_canary(case, &format!("warning    batch {batch}, accumulation 2"), &stderr(&output));
    }

    let first = std::fs::read_to_string(&csv).unwrap();
    bench(folder.path(), &args).success();
    let text = std::fs::read_to_string(&csv).unwrap();
    assert!(text.starts_with(&first), "a second run appends");
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().unwrap().clone();
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 4);
    let of = |row: usize, column: &str| {
        let at = header.iter().position(|name| name == column).unwrap_or_else(|| panic!("no {column}"));
        rows[row][at].to_owned()
    };
    for (row, case) in cases.iter().enumerate() {
        assert_eq!(of(row, "batch_size"), case["batch_size"].to_string());
        assert_eq!(of(row, "model"), "granite");
        let median: f64 = of(row, "step_seconds_p50").parse().unwrap();
        assert_eq!(json!(median), case["step_seconds"]["median"]);
        assert_eq!(of(row, "disturbed_steps"), case["disturbed_steps"].to_string());
        assert_eq!(of(row, "used_steps"), "2");
    }
}

fn check_case(case: &Value, batch: u64, peak: f64) {
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {case}"));
    assert_eq!(case["batch_size"], batch);
    assert_eq!(case["accumulate_steps"], 2);
    assert_eq!(case["num_virtual_tokens"], 5);
    let seconds = &case["step_seconds"];
    let (p10, median, p90) = (number(&seconds["p10"]), number(&seconds["median"]), number(&seconds["p90"]));
    assert!(0.0 < p10 && p10 <= median && median <= p90);
    // Two steps, whose times follow from the percentiles; the median rate is the mean of both.
    let apart = (p90 - p10) / 0.8;
    let (fast, slow) = (p10 - 0.1 * apart, p90 + 0.1 * apart);
    let examples = 2.0 * batch as f64;
    let rate = number(&case["examples_per_second"]["median"]);
    assert!((rate / (examples * (1.0 / fast + 1.0 / slow) / 2.0) - 1.0).abs() < 1e-9, "{case}");
    let (tokens, rows) = (number(&case["tokens_per_step"]), number(&case["rows_per_step"]));
    // An input's template is 10 rows once a step, the prompt 5, and the end-of-text token has no row.
    assert_eq!(rows, tokens - examples * 11.0 + 15.0, "{case}");
    for key in ["tokens_per_second", "rows_per_second", "flops_per_step", "flops_per_second", "first_loss"] {
        assert!(number(&case[key]) > 0.0, "{key}");
    }
    let share = number(&case["share_of_peak"]);
    assert!((share / (number(&case["flops_per_second"]) / peak) - 1.0).abs() < 1e-9, "{share}");
    if cfg!(target_os = "linux") {
        assert!((1e6..1e9).contains(&number(&case["peak_memory_bytes"])), "{case}");
    }
    let ops = case["ops"].as_array().unwrap();
    assert_eq!(ops.last().unwrap()["op"], "outside of ops");
    let shares: f64 = ops.iter().map(|op| number(&op["share"])).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{ops:?}");
}

/// What the canary says of a case of two steps, both of which are used: a machine of tests is disturbed or not, and a
/// disturbed one is warned of.
fn check_canary(case: &Value, warning: &str, stderr: &str) {
    assert_eq!(case["used_steps"], 2, "{case}");
    let canary = &case["canary"];
    let (lowest, median) = (canary["lowest"].as_f64().unwrap(), canary["median"].as_f64().unwrap());
    assert!(0.0 <= lowest && lowest <= median && median <= 1.0, "{canary}");
    // Both steps are used, so that they are all steps.
    for key in ["step_seconds", "examples_per_second"] {
        assert_eq!(case["all_steps"][key], case[key], "{key}");
    }
    assert!(canary["waiting"].is_null() || canary["waiting"].as_f64().unwrap() >= 0.0, "{canary}");
    let warned = |about: &str| stderr.lines().any(|line| line.starts_with(warning) && line.contains(about));
    for (key, about, most) in
        [("disturbed_steps", "of 2 steps", 2), ("disturbed_profiled_steps", "of 3 profiled steps", 3)]
    {
        let disturbed = case[key].as_u64().unwrap_or_else(|| panic!("{key} in {case}"));
        assert!(disturbed <= most, "{key}: {disturbed}");
        assert_eq!(warned(&format!("during {disturbed} {about}")), disturbed > 0, "{stderr}");
    }
}

#[test]
fn a_table_says_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let text =
        stdout(&bench(folder.path(), &[&SMALL[..], &["--warmup", "0", "--tokens", "20"]].concat()).success());
    let first = text.lines().next().unwrap();
    for part in [concat!("gneiss ", env!("CARGO_PKG_VERSION")), "granite", "f32 on cpu"] {
        assert!(first.contains(part), "{first}");
    }
    assert!(text.contains("20.0 tokens on average"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("canary: ") && line.contains("(gemm)")), "{text}");
    for case in ["2 x 2, 5", "3 x 2, 5"] {
        let line = text.lines().find(|line| line.starts_with(case)).unwrap_or_else(|| panic!("{text}"));
        let ends = ["  0 of 2", "  1 of 2, not left out", "  2 of 2, not left out"];
        assert!(ends.iter().any(|end| line.ends_with(end)), "{line}");
    }
}

#[test]
fn examples_of_a_file_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let examples: Vec<Value> = (0..6).map(|i| json!({"input": [7, 8, i, i], "target": [1, 2]})).collect();
    std::fs::write(folder.path().join("e.json"), json!({"examples": examples}).to_string()).unwrap();
    let args = [&SMALL[2..], &["--batch", "3", "--examples", "e.json", "--json"]].concat();
    let report: Value = serde_json::from_str(&stdout(&bench(folder.path(), &args).success())).unwrap();
    let case = &report["cases"][0];
    assert_eq!(case["tokens_per_step"], 36.0);
    // 5 of the prompt, 2 that all share, and of each example 2 of its input and 1 of its target.
    assert_eq!(case["rows_per_step"], 25.0);
    assert!(report["examples"].as_str().unwrap().contains("e.json"));

    for (text, part) in [
        ("{}", "`examples`"),
        (r#"{"examples": []}"#, "at least one"),
        (r#"{"examples": [{"input": [], "target": [1]}]}"#, "`examples[0].input`"),
        (r#"{"examples": [{"input": [1], "target": [131]}]}"#, "vocab_size (131), found 131"),
    ] {
        std::fs::write(folder.path().join("e.json"), text).unwrap();
        refused(&bench(folder.path(), &args), &["--examples", "e.json", part]);
    }
}

#[track_caller]
fn refused(assert: &Assert, parts: &[&str]) {
    assert_eq!(assert.get_output().status.code(), Some(2), "{}", stderr(assert));
    assert_eq!(stdout(assert), "");
    for part in parts {
        assert!(stderr(assert).contains(part), "expected {part:?} in: {}", stderr(assert));
    }
}

#[test]
fn nonsense_is_refused_by_its_flag() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("other.csv"), "a,b\n1,2\n").unwrap();
    for (args, parts) in [
        (&["--batch", "8,0"][..], &["--batch", "'0'"][..]),
        (&["--virtual-tokens", "x"], &["--virtual-tokens", "'x'"]),
        (&["--accumulate=-1"], &["--accumulate", "'-1'"]),
        (&["--steps", "0"], &["--steps", "1 or more"]),
        (&["--tokens", "2"], &["--tokens", "at least 3", "found 2"]),
        (&["--tokens", "9", "--examples", "e.json"], &["--tokens", "--examples"]),
        (&["--data", "other.csv"], &["--data", "--model-config"]),
        (&["--examples", "none.json"], &["--examples", "none.json"]),
        (&["--csv", "other.csv"], &["--csv", "other.csv", "line 1", "found `a,b`"]),
        (&["--virtual-tokens", "250"], &["256 positions", "250 virtual tokens"]),
    ] {
        refused(&bench(folder.path(), args), parts);
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("other.csv")).unwrap(), "a,b\n1,2\n");
}

#[test]
fn the_peak_in_bf16_names_its_instructions() {
    #[cfg(target_arch = "x86_64")]
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    let avx512 = false;
    let of = |dtype| MatmulPeak::measure(&Device::Cpu, dtype, None).unwrap().instructions;
    assert_eq!(of(DType::F32), None);
    match of(DType::BF16) {
        Some(name) => assert!(avx512 && ["avx512f", "avx512_bf16", "amx_bf16"].contains(&name), "{name}"),
        None => assert!(!avx512, "a CPU with AVX-512 has a kernel for bf16"),
    }
}

fn shape(num_hidden_layers: usize) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Granite,
        vocab_size: 5,
        hidden_size: 4,
        intermediate_size: 3,
        num_hidden_layers,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 2,
        ..ModelConfig::from_json(&tiny()).unwrap()
    }
}

fn example(input: &[u32], target: &[u32]) -> Example {
    Example { input: input.to_vec(), target: target.to_vec(), line: 1 }
}

#[test]
fn flops_are_those_counted_by_hand() {
    // Two virtual tokens and a template of one token: P = 3. One sequence of 2 + 1 rows, 2 of them targets,
    // and one of 1 row, a target: T = 7, M = 3.
    let group = PrefixGroup::new(0..2, [&example(&[1, 2, 3], &[4, 0]), &example(&[1, 4], &[0])]);
    // A row of q 32, of k and v 32, of o 32, of gate and up 48, of down 24: 168. Pairs: prefix 6; first
    // sequence 6 + 9, its targets 2 + 3 + 6; second sequence 1 + 3. A product of a pair: 8.
    let flops = Flops::of_step(&shape(3), &Passes::new(std::slice::from_ref(&group), usize::MAX));
    let forward = 2 * 7 * 168 + 7 * 32 + 3 * (32 + 104);
    let backward = 7 * 32 + 3 * (32 + 104) + 7 * 168 + 7 * 104 + 3 * 64;
    assert_eq!(flops.linear, f64::from(forward + backward));
    assert_eq!(flops.head, f64::from(2 * 3 * 40));
    let (all, targets, prefix, to_prefix) = (25, 15, 6, 12);
    let forward = 2 * (2 * all + targets);
    let backward = 5 * targets + 5 * all + 5 * prefix + 4 * to_prefix;
    assert_eq!(flops.attention, f64::from(8 * (forward + backward)));
    assert_eq!(flops.total(), 5712.0 + 240.0 + 3264.0);

    // One block is the first and the last.
    let flops = Flops::of_step(&shape(1), &Passes::new(std::slice::from_ref(&group), usize::MAX));
    assert_eq!(flops.linear, f64::from(7 * 32 + 3 * (32 + 104) + 3 * 104 + 3 * 32));
    assert_eq!(flops.attention, f64::from(8 * (2 * targets + 4 * (3 * 3))));

    // The virtual tokens as keys and values: T = 5, and no gradient goes below the first block's attention.
    let flops =
        Flops::of_step(&shape(3), &Passes::after_given(std::slice::from_ref(&group), usize::MAX, None));
    let forward = 2 * 5 * 168 + 5 * 32 + 3 * (32 + 104);
    let backward = 5 * 32 + 3 * (32 + 104) + 5 * 168 + 5 * 104;
    assert_eq!(flops.linear, f64::from(forward + backward));
    // The head's row sees the two virtual tokens and itself.
    let (all, to_prefix) = (25 - 6 + 3, 12 + 2);
    assert_eq!(flops.attention, f64::from(8 * (2 * all + 4 * to_prefix + 7 * all + 7 * targets)));
}

/// Counts the steps that it is told of.
#[derive(Default)]
struct Told(usize, Vec<usize>);

impl PeakMemory for Told {
    fn forget(&mut self) {
        self.1.push(self.0);
    }
    fn step(&mut self) {
        self.0 += 1;
    }
    fn peak(&self) -> Option<u64> {
        Some(self.0 as u64)
    }
}

const PEAK: MatmulPeak = MatmulPeak {
    size: 1,
    dtype: "f32",
    instructions: None,
    flops_per_second: 1e9,
    sustained_seconds: None,
    data_sheet_flops_per_second: Some(4e9),
    quiet: None,
};

/// Readings of two threads, the second of which is slow in those of the list.
struct Slow {
    read: usize,
    slow: &'static [usize],
}

impl RateSource for Slow {
    fn read(&mut self) -> Reading {
        let second = if self.slow.contains(&self.read) { 0.7 } else { 0.9 };
        self.read += 1;
        Reading { rates: vec![1.0, second], waited: Vec::new() }
    }
}

#[test]
fn steps_of_a_disturbed_machine_are_counted_and_left_out() {
    let config = ModelConfig::from_json(&tiny()).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    let model = Decoder::random(&config, dtypes, &Device::Cpu, 1).unwrap();
    let case = Case {
        batch_size: 1,
        accumulate_steps: 1,
        prompt_kind: PromptKind::Embeddings,
        num_virtual_tokens: 3,
        prompts: 1,
    };
    let measure = |slow: Option<&'static [usize]>| {
        let canary = slow.map(|slow| Canary::from_source(Box::new(Slow { read: 0, slow })));
        let source = ExampleSource::Made(Lengths::uniform(9).unwrap());
        let canary = canary.as_ref();
        let bench = Bench { model: &model, source, max_rows: 64, steps: 5, warmup: 2, peak: PEAK, canary };
        let measured = bench.measure(case, &mut Told::default()).unwrap();
        // A reading before the first step and one after each of the seven; then the profile's, of which the first step
        // does not count.
        let profile = bench.profile(case, 2).unwrap();
        (measured, profile.disturbed_steps)
    };
    // Readings 2 to 7 lie around the counted steps, readings 9 to 11 around the profiled ones.
    for (slow, disturbed, used, profiled) in [
        (&[][..], 0, 5, 0),
        (&[0, 1, 8], 0, 5, 0),
        (&[2, 11], 1, 4, 1),
        (&[4], 2, 3, 0),
        // Only two steps are quiet: all are used.
        (&[3, 5, 10], 4, 5, 2),
        (&[2, 3, 4, 5, 6, 7], 5, 5, 0),
    ] {
        let (measured, found) = measure(Some(slow));
        let expected = (Some(disturbed), used, Some(profiled));
        assert_eq!((measured.disturbed_steps, measured.used_steps, found), expected, "{slow:?}");
        let lowest = if disturbed > 0 { 0.7 } else { 0.9 };
        assert_eq!(measured.canary.unwrap().lowest, lowest, "{slow:?}");
    }
    let (measured, profiled) = measure(None);
    assert_eq!((measured.disturbed_steps, measured.used_steps, measured.canary), (None, 5, None));
    assert_eq!(profiled, None);
}

#[test]
fn a_case_is_a_run_of_the_trainer() {
    let config = ModelConfig::from_json(&tiny()).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    let model = Decoder::random(&config, dtypes, &Device::Cpu, 1).unwrap();
    let given = Lengths::uniform(9).unwrap().examples(5, config.vocab_size);
    let bench = Bench {
        model: &model,
        source: ExampleSource::Given(given.clone()),
        max_rows: 64,
        steps: 5,
        warmup: 2,
        peak: PEAK,
        canary: None,
    };
    let case = Case {
        batch_size: 2,
        accumulate_steps: 1,
        prompt_kind: PromptKind::Embeddings,
        num_virtual_tokens: 3,
        prompts: 1,
    };
    let mut told = Told::default();
    let measured = bench.measure(case, &mut told).unwrap();
    assert_eq!((told.0, told.1), (7, vec![0]), "warm-up and counted steps; forgotten before them");
    assert_eq!(measured.peak_memory_bytes, Some(7));
    assert_eq!(measured.figures.tokens_per_step, 18.0);
    assert!(measured.last_loss.is_finite() && measured.last_loss != measured.first_loss);
    let of = |examples: &[Example]| {
        Flops::of_step(&config, &Passes::new(&[PrefixGroup::new(0..3, examples)], usize::MAX)).total()
    };
    let steps = whole_steps(&given, 2);
    assert_eq!(steps.len(), 4, "the fifth example makes no whole step");
    // Steps 3 to 7: the second half of the examples twice, the first thrice.
    let (first, second) = (of(&steps[..2]), of(&steps[2..]));
    assert!((measured.figures.flops_per_step - (3.0 * first + 2.0 * second) / 5.0).abs() < 1e-3);
    assert!((measured.share_of_peak - measured.figures.flops_per_second / 1e9).abs() < 1e-15);
    let of_data_sheet = measured.share_of_data_sheet.unwrap();
    assert!((of_data_sheet - measured.figures.flops_per_second / 4e9).abs() < 1e-15);
    let again = bench.measure(case, &mut Told::default()).unwrap();
    assert_eq!((again.first_loss, again.last_loss), (measured.first_loss, measured.last_loss));
    // The same prompt three times in a step.
    let mut told = Told::default();
    let several = bench.measure(Case { prompts: 3, ..case }, &mut told).unwrap();
    assert_eq!((told.0, told.1), (7, vec![0]));
    let [one, three] = [&measured, &several].map(|measured| measured.figures);
    assert_eq!(
        (three.tokens_per_step, three.rows_per_step),
        (3.0 * one.tokens_per_step, 3.0 * one.rows_per_step)
    );
    assert!((three.flops_per_step / one.flops_per_step - 3.0).abs() < 1e-9);
    let rate = three.all_steps.examples_per_second.median * three.all_steps.step_seconds.median;
    assert!((rate - 6.0).abs() < 1e-9, "{rate} examples a step");
    assert!((several.last_loss - measured.last_loss).abs() < 1e-4 * measured.last_loss);
}

/// One step of several prompts beside one step after another.
#[test]
fn several_prompts_are_measured_in_one_step_and_by_turns() {
    let folder = tempfile::tempdir().unwrap();
    let args =
        ["--batch", "2", "--accumulate", "1", "--virtual-tokens", "5", "--tokens", "9", "--steps", "2"];
    let args = [&args[..], &["--warmup", "1", "--prompts", "3,2"]].concat();
    let output = bench(folder.path(), &[&args[..], &["--json"]].concat()).success();
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let cases = report["cases"].as_array().unwrap();
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {report}"));
    assert_eq!(cases.iter().map(|case| number(&case["prompts"])).collect::<Vec<_>>(), [1.0, 2.0, 3.0]);
    let one = &cases[0];
    assert_eq!(one["by_turns"], Value::Null);
    for case in &cases[1..] {
        let (prompts, by_turns) = (number(&case["prompts"]), &case["by_turns"]);
        assert_eq!(number(&case["rows_per_step"]), prompts * number(&one["rows_per_step"]));
        let seconds = prompts * number(&one["step_seconds"]["median"]);
        assert!((number(&by_turns["step_seconds"]) / seconds - 1.0).abs() < 1e-9);
        assert_eq!(by_turns["rows_per_second"], one["rows_per_second"]);
        assert_eq!(by_turns["examples_per_second"], one["examples_per_second"]["median"]);
        let speedup =
            number(&case["examples_per_second"]["median"]) / number(&one["examples_per_second"]["median"]);
        assert!((number(&by_turns["speedup"]) / speedup - 1.0).abs() < 1e-9);
    }
    let text = stdout(&bench(folder.path(), &args).success());
    assert!(text.contains("several prompts") && text.contains("2 x 1, 5, 3 prompts"), "{text}");
}

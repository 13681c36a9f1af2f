//! Decoding by graphs: the same tokens in one launch a step, graphs that are recorded again, and what happens if they can't be.

use crate::place::{Place, refused, stderr, succeeded};
use std::process::Output;

/// Its continuation changes from one word to another at the fifth token, after steps that are graphs.
const TEXT: &str = "say word40 dog";

/// What `gneiss generate` prints on the device, and the calls of the driver by kind and name.
struct Generated {
    output: Output,
    calls: std::collections::HashMap<(String, String), u64>,
}

impl Generated {
    /// With these settings of the stand-in, and graphs if `graphs` is "1".
    fn new(place: &Place, (settings, graphs): (&str, &str), dtype: &str, tokens: &str, text: &str) -> Self {
        let args = [
            "generate", "--model", "model", "--device", "cuda", "--dtype", dtype, "--max-new-tokens", tokens,
            text,
        ];
        let output = place.command(settings, args).env("GNEISS_CUDA_GRAPHS", graphs).output().unwrap();
        Self { calls: if output.status.success() { place.calls() } else { Default::default() }, output }
    }

    fn text(&self) -> String {
        succeeded(&self.output)
    }

    fn of(&self, kind: &str, name: &str) -> u64 {
        self.calls.get(&(kind.into(), name.into())).copied().unwrap_or(0)
    }

    /// Calls of some kinds, whatever their names.
    fn all(&self, kinds: &[&str]) -> f64 {
        let calls = self.calls.iter().filter(|((kind, _), _)| kinds.contains(&kind.as_str()));
        calls.map(|(_, calls)| *calls as f64).sum()
    }

    /// Passes that chose a token.
    fn passes(&self) -> u64 {
        self.of("candle's kernel", "fast_argmax_f32") + self.of("candle's kernel", "fast_argmax_bf16")
    }
}

/// Calls of `kinds` of one decoding step: those of an answer of 22 tokens less those of one of 6.
fn of_a_step(short: &Generated, long: &Generated, steps: f64, kinds: &[&str]) -> f64 {
    (long.all(kinds) - short.all(kinds)) / steps
}

#[test]
fn a_decoding_step_is_one_launch_with_the_same_tokens() {
    let place = Place::new();
    for dtype in ["f32", "bf16"] {
        let [(short, long), (short_graph, long_graph)] = ["0", "1"].map(|graphs| {
            let [short, long] = ["6", "22"].map(|n| Generated::new(&place, ("", graphs), dtype, n, TEXT));
            (short, long)
        });
        assert_eq!(short_graph.text(), short.text());
        let long_text = long.text();
        assert_eq!(long_graph.text(), long_text);
        // Not one token again and again, which a graph that never chooses another would give too.
        let words: std::collections::HashSet<_> = long_text.split_whitespace().skip(3).collect();
        assert!(words.len() > 1, "{long_text}");
        assert!(!stderr(&long_graph.output).contains("warning"), "{}", stderr(&long_graph.output));
        let steps = (long.passes() - short.passes()) as f64;
        assert!(steps >= 8.0, "{steps} steps more: {:?}", long.text());
        let launches = ["kernel", "candle's kernel", "product"];
        let without = of_a_step(&short, &long, steps, &launches);
        let with = of_a_step(&short_graph, &long_graph, steps, &launches);
        let graphs = of_a_step(&short_graph, &long_graph, steps, &["graph"]);
        println!("{dtype}: {without} launches of a step without graphs, {graphs} with");
        assert!(without > 25.0 && with == 0.0 && graphs == 1.0, "{without}, {with} and {graphs}");
        // The inputs, and the token; the event after the upload. Nothing is allocated.
        let copies = of_a_step(&short_graph, &long_graph, steps, &["copy"]);
        let others = of_a_step(&short_graph, &long_graph, steps, &["allocation", "free", "fill"]);
        assert!(copies == 2.0 && others == 0.0, "{copies} copies, {others} others");
        // All of the text but its last token is a prefix, so every pass is a decoding step. The first runs as it is, and the second
        // is recorded.
        assert_eq!(long_graph.of("graph", "launched"), long.passes() - 1);
        assert_eq!((long_graph.of("graph", "captured"), long_graph.of("graph", "instantiated")), (1, 1));
    }
}

/// The table of rotary angles grows with the longest sequence, and is another matrix then.
#[test]
fn a_graph_is_recorded_again_when_the_angles_have_moved() {
    let place = Place::new();
    let config = std::fs::read_to_string(place.path("model/config.json")).unwrap();
    let config = config.replace("\"max_position_embeddings\":256", "\"max_position_embeddings\":4096");
    place.write("model/config.json", &config);
    let text = format!("say {} :", ["gentle dog word50", "late dog word60"].repeat(84).join(" "));
    let [without, with] = ["0", "1"].map(|graphs| Generated::new(&place, ("", graphs), "f32", "16", &text));
    assert_eq!(with.text(), without.text());
    let passes = without.passes();
    assert!(passes >= 12, "{passes} passes: {:?}", without.text());
    assert_eq!((with.of("graph", "captured"), with.of("graph", "destroyed")), (2, 2));
    assert_eq!(with.of("graph", "launched"), passes - 1);
}

/// Whatever call breaks the capture: a warning, and the same tokens without graphs.
#[test]
fn a_capture_that_fails_is_given_up_with_a_warning() {
    let place = Place::new();
    let expected = Generated::new(&place, ("", "0"), "f32", "8", TEXT).text();
    for call in [1, 2, 3, 20, 75] {
        let found = Generated::new(&place, (&format!("capture_breaks={call}"), "1"), "f32", "8", TEXT);
        assert_eq!(found.text(), expected, "call {call}");
        let said = stderr(&found.output);
        assert!(
            said.contains("without CUDA graphs") && said.contains("STREAM_CAPTURE"),
            "call {call}: {said}"
        );
        assert_eq!((found.of("graph", "captured"), found.of("graph", "launched")), (1, 0), "call {call}");
    }
}

#[test]
fn products_by_cublas_are_recorded_too() {
    let place = Place::new();
    let [without, with] =
        ["0", "1"].map(|graphs| Generated::new(&place, ("algorithms=0", graphs), "f32", "8", TEXT));
    assert_eq!(with.text(), without.text());
    assert!(with.of("graph", "launched") > 0 && with.of("captured product", "cublasGemmEx") > 0);
}

#[test]
fn where_there_are_no_graphs_that_is_said() {
    let place = Place::new();
    let expected = Generated::new(&place, ("", "0"), "f32", "6", TEXT).text();
    let found = Generated::new(&place, ("pools=0", "1"), "f32", "6", TEXT);
    assert_eq!(found.text(), expected);
    assert!(
        stderr(&found.output).contains("GNEISS_CUDA_GRAPHS=1 has no effect"),
        "{}",
        stderr(&found.output)
    );
    let found = Generated::new(&place, ("", "yes"), "f32", "6", TEXT);
    refused(&found.output, 2, &["GNEISS_CUDA_GRAPHS", "0 or 1", "\"yes\""]);
}

/// A graph's memory comes on top of the pool's. If it does not fit, steps run without graphs, and a device that is too small for
/// them too says so.
#[test]
fn a_graph_that_does_not_fit_is_given_up() {
    let place = Place::new();
    let expected = Generated::new(&place, ("", "0"), "f32", "8", TEXT).text();
    let (mut given_up, mut launched) = (0, 0);
    // cuBLAS has 33.6 MB, the weights 0.9: somewhere between is the least memory that suffices.
    let (mut least, mut most) = (33_600_000, 36_000_000);
    while most - least > 512 {
        let left = (least + most) / 2;
        let settings = format!("memory={},hidden={}", 4u64 << 30, (4u64 << 30) - left);
        let found = Generated::new(&place, (&settings, "1"), "f32", "8", TEXT);
        if !found.output.status.success() {
            refused(&found.output, 1, &["memory"]);
            least = left;
            continue;
        }
        most = left;
        assert_eq!(found.text(), expected);
        let said = stderr(&found.output);
        given_up += u32::from(said.contains("without CUDA graphs") && said.contains("OUT_OF_MEMORY"));
        launched += u32::from(found.of("graph", "launched") > 0);
    }
    assert!(launched > 0 && given_up > 0, "{launched} times a graph was launched, {given_up} times given up");
}

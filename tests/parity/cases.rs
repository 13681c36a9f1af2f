//! Logits, loss and prompt gradient of every case, in one pass and in as many as a small budget makes.

use crate::fixtures::*;
use candle_core::{DType, Tensor};
use gneiss::data::Passes;
use gneiss::tune;

fn cases(name: &str) {
    let (golden, model) = (golden(name), model(name, DType::F32));
    let cases = golden.json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let what = |part: &str| format!("{name}, {}: {part}", case["name"]);
        let (prompts, groups, gradient) = golden.case(case);
        let expected = golden.tensor(&case["logits"]);
        let batch = Passes::new(&groups, model.config().vocab_size, usize::MAX).lead;
        let tape = model.forward(&batch, &prompts, None).unwrap();
        assert_within(&what("logits"), &model.logits(tape.hidden()).unwrap(), expected, 1e-4);
        for max_rows in [usize::MAX, 20, 1] {
            let objective = tune::gradient(&model, &prompts, &groups, max_rows).unwrap();
            let loss = case["loss"].as_f64().unwrap();
            let error = (objective.loss() - loss).abs() / loss;
            assert!(error < 1e-4, "{}: {} against {loss}", what("loss"), objective.loss());
            let ours: Tensor = objective.gradient.unwrap();
            assert_within(&what(&format!("gradient, {max_rows} rows")), &ours, &gradient, 1e-4);
            let evaluated = tune::evaluate(&model, &prompts, &groups, max_rows).unwrap();
            assert_eq!(evaluated.nll, objective.nll, "{}", what("evaluate"));
        }
    }
}

#[test]
fn granite_agrees_with_peft() {
    cases("granite");
}

#[test]
fn llama_with_biases_agrees_with_peft() {
    cases("llama_bias");
}

#[test]
fn dense_granitemoehybrid_agrees_with_peft() {
    cases("hybrid_dense");
}

/// Half-precision weights on the CPU: the weights are rounded, the activations are f32.
#[test]
fn half_precision_weights_stay_near() {
    for name in CHECKPOINTS {
        let golden = golden(name);
        for (dtype, relative) in [(DType::F16, 1e-2), (DType::BF16, 6e-2)] {
            let model = model(name, dtype);
            let (prompts, groups, gradient) = golden.case(&golden.json["cases"][0]);
            let objective = tune::gradient(&model, &prompts, &groups, usize::MAX).unwrap();
            assert_within(&format!("{name} {dtype:?}"), &objective.gradient.unwrap(), &gradient, relative);
        }
    }
}

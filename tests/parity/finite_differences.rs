//! The prompt's gradient against central differences of the loss, in f64.

use crate::fixtures::*;
use candle_core::{DType, Tensor};
use gneiss::batch::{Packing, Passes};
use gneiss::prompt::Prefix;
use gneiss::tune;

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for name in CHECKPOINTS {
        let (golden, model) = (golden(name), model(name, DType::F64));
        let case =
            golden.json["cases"].as_array().unwrap().iter().find(|c| c["name"] == "two_groups").unwrap();
        let (prompts, groups, _) = golden.case(case);
        let prompts = prompts.to_dtype(DType::F64).unwrap();
        let values = prompts.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        // In one pass, in several, and in several of which the prefix pass holds sequences.
        let one = Passes::new(&groups, usize::MAX).prefix_pass;
        let with_sequences = (one.ids.len() - 1, one.prefix_rows + 20);
        for (max_rows, prefix_pass_rows) in [(usize::MAX, 0), (10, 0), with_sequences] {
            let packing = Packing { max_rows, prefix_pass_rows, long_above: None };
            let passes = Passes::packed(&groups, packing);
            assert_eq!(
                passes.prefix_pass.examples > 0 && !passes.example_passes.is_empty(),
                prefix_pass_rows > 0,
                "{name}"
            );
            let gradient =
                tune::gradient_of(&model, &Prefix::Embeddings(prompts.clone()), &passes, 0, tune::Mean::All)
                    .unwrap()
                    .gradient
                    .unwrap();
            let gradient = gradient.values().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let largest = gradient.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for i in (0..values.len()).step_by(values.len() / 12) {
                let loss = |by: f64| {
                    let mut moved = values.clone();
                    moved[i] += by;
                    let moved = Tensor::from_vec(moved, prompts.shape(), prompts.device()).unwrap();
                    tune::evaluate(&model, &Prefix::Embeddings(moved.clone()), &groups, usize::MAX)
                        .unwrap()
                        .loss()
                        .unwrap()
                };
                let slope = (loss(1e-5) - loss(-1e-5)) / 2e-5;
                assert!(
                    (slope - gradient[i]).abs() < 1e-7 * largest.max(1.0),
                    "{name}: element {i} is {}, the slope {slope}",
                    gradient[i]
                );
            }
        }
    }
}

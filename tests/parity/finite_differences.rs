//! The prompt's gradient against central differences of the loss, in f64.

use crate::fixtures::*;
use candle_core::{DType, Tensor};
use gneiss::tune::{self, Limits};

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for name in CHECKPOINTS {
        let (golden, model) = (golden(name), model(name, DType::F64));
        let case =
            golden.json["cases"].as_array().unwrap().iter().find(|c| c["name"] == "two_groups").unwrap();
        let (prompts, groups, _) = golden.case(case);
        let prompts = prompts.to_dtype(DType::F64).unwrap();
        let values = prompts.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for max_rows in [usize::MAX, 10] {
            let gradient =
                tune::gradient(&model, &prompts, &groups, Limits::rows(max_rows)).unwrap().gradient.unwrap();
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let largest = gradient.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for i in (0..values.len()).step_by(values.len() / 12) {
                let loss = |by: f64| {
                    let mut moved = values.clone();
                    moved[i] += by;
                    let moved = Tensor::from_vec(moved, prompts.shape(), prompts.device()).unwrap();
                    tune::evaluate(&model, &moved, &groups, usize::MAX).unwrap().loss().unwrap()
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

use super::*;
use crate::prompt::{Prefix, Prompt};
use candle_core::{DType, Device};
use serde_json::Value;

/// A case of tests/golden/reparameterizations.json, in f64.
struct Golden {
    prompt: Prompt,
    prefix: Vec<f64>,
    prefix_gradient: Prefix,
    gradient: Vec<f64>,
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn golden() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/reparameterizations.json");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    json["cases"].as_array().unwrap().iter().map(case).collect()
}

fn case(case: &Value) -> Golden {
    let size = |value: &Value| value.as_u64().unwrap() as usize;
    let text = |key: &str| case[key].as_str().unwrap();
    let (rows, width) = (size(&case["rows"]), size(&case["width"]));
    let parameters = case["parameters"].as_array().unwrap();
    let kind = text("kind").parse().unwrap();
    let layout = PromptLayout {
        reparameterization: text("reparameterization").parse().unwrap(),
        bottleneck: size(&parameters[1]["shape"][0]),
        input_width: size(&parameters[1]["shape"][1]),
        ..PromptLayout::plain(kind, (rows, width))
    };
    for (part, parameter) in layout.parts().iter().zip(parameters) {
        let shape: Vec<usize> = parameter["shape"].as_array().unwrap().iter().map(size).collect();
        assert_eq!((part.name, &part.shape), (parameter["name"].as_str().unwrap(), &shape));
    }
    let all =
        |key: &str| parameters.iter().flat_map(|parameter| numbers(&parameter[key])).collect::<Vec<_>>();
    let values = Tensor::new(all("values"), &Device::Cpu).unwrap();
    let of_rows = |key: &str| {
        let values = Tensor::from_vec(numbers(&case[key]), (rows, width), &Device::Cpu).unwrap();
        Prefix::new(kind, values)
    };
    let prompt = Prompt::from_values(layout, values, &of_rows("prefix")).unwrap();
    let (prefix, gradient) = (numbers(&case["prefix"]), all("gradient"));
    Golden { prompt, prefix, prefix_gradient: of_rows("prefix_gradient"), gradient }
}

#[track_caller]
fn assert_near(ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len());
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "value {i}: {a}, expected {b}");
    }
}

#[test]
fn rows_and_gradients_are_those_of_torch_and_peft() {
    let cases = golden();
    assert_eq!(cases.len(), 5);
    for Golden { prompt, prefix, prefix_gradient, gradient } in cases {
        assert_near(&flat(prompt.prefix().unwrap().values()), &prefix, 1e-12);
        assert_near(&flat(&prompt.backward(&prefix_gradient).unwrap()), &gradient, 1e-11);
        // As it is trained: in f32.
        let single = prompt.to_device(&Device::Cpu).unwrap();
        let found = single.backward(&prefix_gradient).unwrap();
        assert_eq!(found.dtype(), DType::F32);
        assert_near(&flat(&found.to_dtype(DType::F64).unwrap()), &gradient, 1e-4);
    }
}

#[test]
fn gradients_are_finite_differences() {
    const STEP: f64 = 1e-5;
    for Golden { prompt, prefix_gradient, .. } in golden() {
        let gradient = flat(&prompt.backward(&prefix_gradient).unwrap());
        let (values, weights) = (flat(prompt.values()), flat(prefix_gradient.values()));
        // The sum of the rows, weighted by the gradient.
        let loss = |i: usize, step: f64| {
            let mut moved = values.clone();
            moved[i] += step;
            let moved = prompt.with_values(Tensor::new(moved, &Device::Cpu).unwrap());
            let rows = flat(moved.prefix().unwrap().values());
            rows.iter().zip(&weights).map(|(a, b)| a * b).sum::<f64>()
        };
        let slopes = (0..values.len()).map(|i| (loss(i, STEP) - loss(i, -STEP)) / (2.0 * STEP));
        assert_near(&gradient, &slopes.collect::<Vec<_>>(), 1e-7);
    }
}

/// The LayerNorm starts with zeros: it learns in the first step, and the layers before it from the second on.
#[test]
fn all_parts_of_a_residual_prompt_learn_by_the_second_step() {
    let options = crate::config::PromptOptions {
        reparameterization: Reparameterization::Residual,
        bottleneck: 4,
        ..Default::default()
    };
    let rows: Vec<f32> = (0..18).map(|i| (i as f32 * 1.7).sin()).collect();
    let initial = Prefix::Embeddings(Tensor::from_vec(rows, (3, 6), &Device::Cpu).unwrap());
    let mut prompt = Prompt::with_options(&initial, &options, 6, 42).unwrap();
    let learns = |prompt: &Prompt| {
        let gradient = prompt.backward(&prompt.prefix().unwrap()).unwrap();
        let parts = prompt.layout().split(&gradient).unwrap();
        let learns = parts.iter().map(|part| part.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        (learns.map(|part| part.iter().any(|value| value.abs() > 1e-6)).collect::<Vec<_>>(), gradient)
    };
    let (parts, gradient) = learns(&prompt);
    assert_eq!(parts, [true, false, false, false, false, true, true]);
    prompt = prompt.with_values((prompt.values() - (gradient * 0.01).unwrap()).unwrap());
    assert_eq!(learns(&prompt).0, [true; 7]);
}

//! Distillation against transformers and PEFT, by the fixtures of `tests/golden/distillation.py`.

use crate::common::close::{assert_close, assert_tensors_close};
use crate::fixtures::*;
use crate::training::{Steps, grad_norm_tolerance, options};
use candle_core::{DType, Device};
use gneiss::batch::{Example, Packing, Passes, PrefixGroup};
use gneiss::model::Decoder;
use gneiss::prompt::{Prefix, Prompt};
use gneiss::tune::{self, Limits, Loss, Mean, RunExamples, Task, Teacher, TeacherExamples, Trainer};
use serde_json::Value;

const NAMES: [&str; 3] = ["granite", "mamba", "mamba_groups"];

fn distillation(name: &str) -> Golden {
    let file = |kind: &str| folder("distillation").join(format!("{name}.{kind}"));
    let json = serde_json::from_str(&std::fs::read_to_string(file("json")).unwrap()).unwrap();
    Golden { json, tensors: candle_core::safetensors::load(file("safetensors"), &Device::Cpu).unwrap() }
}

fn examples(value: &Value) -> Vec<Example> {
    value.as_array().unwrap().iter().map(example).collect()
}

/// The examples of all steps, one after the other.
fn laid_out(golden: &Value, examples: &[Example]) -> Vec<Example> {
    let steps = golden["steps"].as_array().unwrap().iter();
    let indices = steps.flat_map(|step| ids(&step["micro_batches"][0]));
    indices.map(|i| examples[i as usize].clone()).collect()
}

fn losses_and_gradient(name: &str, model: &Decoder) {
    let golden = distillation(name);
    let [train, teacher] = ["examples", "teacher"].map(|key| examples(&golden.json[key]));
    let expected: Vec<f64> =
        golden.json["losses"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let largest = expected.iter().fold(0.0, |a: f64, b| a.max(*b));
    let of_teacher = TeacherExamples { train: &teacher, validation: &[] };
    let run = RunExamples { train: &train, validation: &[], teacher: Some(of_teacher) };
    let teacher = Teacher::new(model, of_teacher, run).unwrap();
    assert_eq!(teacher.prefix_rows(), 1 + 83 + 3, "BOS, the text, and what all inputs begin with");
    let prompt = golden.tensor(&golden.json["prompt"]).to_dtype(model.prompt_dtype()).unwrap();
    let groups = [PrefixGroup::new(0..prompt.dims()[0] as u32, &train)];
    let chunk: Vec<usize> = (0..train.len()).collect();
    for (max_rows, prefix_pass_rows) in [(usize::MAX, 0), (60, 0), (60, 30), (1, 0)] {
        let mut passes = Passes::packed(&groups, Packing { max_rows, prefix_pass_rows, long_above: None });
        passes.teacher_passes = teacher.training_passes(&passes, &chunk);
        for recompute in [0, 2] {
            let loss = Loss { mean: Mean::All, teacher: Some(&teacher) };
            let prefix = Prefix::Embeddings(prompt.clone());
            let found = tune::gradient_of(model, &prefix, &passes, recompute, loss).unwrap();
            let what = format!("{name}, {max_rows} rows, {recompute} layers recomputed");
            assert_close(&what, &found.nll().unwrap(), &expected, 1e-4 * largest);
            let gradient = found.gradient.unwrap();
            assert_tensors_close(&what, gradient.values(), golden.tensor(&golden.json["grad"]), 1e-4);
        }
    }
}

#[test]
fn divergences_and_gradient_agree_with_peft() {
    for name in NAMES {
        losses_and_gradient(name, &model(name, DType::F32));
        losses_and_gradient(name, &model(name, DType::F64));
    }
}

#[test]
fn ten_steps_train_as_with_peft() {
    for (name, max_rows) in NAMES.into_iter().flat_map(|name| [(name, usize::MAX), (name, 24)]) {
        let (golden, model) = (distillation(name), model(name, DType::F32));
        let options = options(&golden.json);
        let [train, teacher] =
            ["examples", "teacher"].map(|key| laid_out(&golden.json, &examples(&golden.json[key])));
        let task = Task {
            model: &model,
            train: &train,
            validation: &train[..3],
            teacher: Some(TeacherExamples { train: &teacher, validation: &teacher[..3] }),
            options: &options,
            limits: Limits::rows(max_rows),
        };
        let prompt = Prompt::embeddings(golden.tensor(&golden.json["prompt"])).unwrap();
        let mut trainer = Trainer::new(task, &prompt).unwrap();
        let mut steps = Steps::default();
        trainer.run(&mut steps).unwrap();
        let expected = golden.json["steps"].as_array().unwrap();
        assert_eq!((steps.0.len(), expected.len()), (10, 10));
        for (ours, expected) in steps.0.iter().zip(expected) {
            let near = |part: &str, ours: f64, relative: f64| {
                let expected = expected[part].as_f64().unwrap();
                let error = (ours - expected).abs();
                assert!(
                    error <= relative * expected,
                    "{name}, {max_rows} rows, {part}: {ours}, expected {expected}"
                );
            };
            near("loss", ours.loss, 1e-4);
            near("grad_norm", ours.grad_norm, grad_norm_tolerance(name));
        }
        let kept = trainer.kept().unwrap();
        let expected = golden.tensor(&golden.json["final_prompt"]);
        assert_tensors_close(name, kept.prompt.values(), expected, 1e-4);
        let loss = kept.validation_loss.unwrap();
        assert!(loss > 0.01 && loss < 2.0, "a mean divergence too: {loss}");
    }
}

use super::*;
use crate::config::PromptKind;

fn matrix(rows: usize, width: usize, first: f32) -> Tensor {
    let values: Vec<f32> = (0..rows * width).map(|i| first + i as f32).collect();
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

#[test]
fn prompt_of_embeddings_is_its_own_prefix() {
    let prompt = Prompt::embeddings(&matrix(2, 2, 1.0)).unwrap();
    assert_eq!((prompt.num_virtual_tokens(), prompt.elem_count()), (2, 4));
    let prompt = prompt.with_values(matrix(2, 2, 7.0));
    assert_eq!(rows(prompt.prefix().unwrap().values()), [[7.0, 8.0], [9.0, 10.0]]);
    let gradient = prompt.backward(&Prefix::Embeddings(matrix(2, 2, -1.0))).unwrap();
    assert_eq!(rows(&gradient), [[-1.0, 0.0], [1.0, 2.0]]);
}

#[test]
fn prompt_without_rows_is_refused() {
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    assert!(Prompt::embeddings(&empty).unwrap_err().to_string().contains("[0, 4]"));
    assert!(Prompt::embeddings(&matrix(2, 2, 1.0).flatten_all().unwrap()).is_err());
}

fn made(initial: &Prefix, frozen_tokens: usize, reparameterization: Reparameterization) -> Result<Prompt> {
    let kind = initial.kind();
    let options = PromptOptions { kind, frozen_tokens, reparameterization, ..PromptOptions::default() };
    Prompt::with_options(initial, &options, 2, 42)
}

#[test]
fn frozen_rows_are_no_part_of_the_values() {
    let initial = Prefix::Embeddings(matrix(3, 2, 1.0));
    let prompt = made(&initial, 1, Reparameterization::None).unwrap();
    assert_eq!((prompt.num_virtual_tokens(), prompt.elem_count(), prompt.frozen_elem_count()), (3, 4, 2));
    assert_eq!(rows(prompt.prefix().unwrap().values()), rows(initial.values()));
    let prompt = prompt.with_values(matrix(2, 2, -7.0));
    assert_eq!(rows(prompt.prefix().unwrap().values()), [[1.0, 2.0], [-7.0, -6.0], [-5.0, -4.0]]);
    let gradient = prompt.backward(&Prefix::Embeddings(matrix(3, 2, 10.0))).unwrap();
    assert_eq!(rows(&gradient), [[12.0, 13.0], [14.0, 15.0]]);
    let all = made(&initial, 3, Reparameterization::None).unwrap_err().to_string();
    assert!(
        all.contains("prompt.frozen_tokens: expected fewer than the prompt's 3 virtual tokens, found 3"),
        "{all}"
    );
}

/// Before the first step the rows are the initial ones, to the last bit.
#[test]
fn residual_prompt_starts_as_the_initial_prefix() {
    for kind in [PromptKind::Embeddings, PromptKind::Prefix] {
        let initial = Prefix::new(kind, matrix(5, 8, -0.7));
        let prompt = made(&initial, 2, Reparameterization::Residual).unwrap();
        assert_eq!(rows(prompt.prefix().unwrap().values()), rows(initial.values()));
        // Bottleneck 8: no more than the width.
        assert_eq!(prompt.elem_count(), 3 * 8 + 2 * 8 * 8 + 8 + 8 + 2 * 8);
    }
}

#[test]
fn the_seed_makes_the_network() {
    let initial = Prefix::Embeddings(matrix(2, 4, 0.0));
    let flat = |seed, reparameterization| {
        let options = PromptOptions { reparameterization, ..PromptOptions::default() };
        let prompt = Prompt::with_options(&initial, &options, 4, seed).unwrap();
        prompt.values().to_vec1::<f32>().unwrap()
    };
    for reparameterization in [Reparameterization::Residual, Reparameterization::Mlp] {
        assert_eq!(flat(1, reparameterization), flat(1, reparameterization));
        assert_ne!(flat(1, reparameterization), flat(2, reparameterization));
    }
}

#[test]
fn gradient_of_another_shape_is_refused() {
    let prompt = Prompt::embeddings(&matrix(2, 2, 1.0)).unwrap();
    for other in [Prefix::Embeddings(matrix(3, 2, 0.0)), Prefix::KeysValues(matrix(2, 2, 0.0))] {
        assert!(prompt.backward(&other).is_err());
    }
}

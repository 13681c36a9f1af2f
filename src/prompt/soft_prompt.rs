//! A soft prompt: named parameters, and the prefix that a model makes of them.

use super::Prefix;
use crate::config::PromptKind;
use crate::{Error, Result};
use candle_core::Tensor;
use std::sync::Arc;

/// A trainable tensor of a prompt.
#[derive(Debug, Clone)]
pub struct PromptParameter {
    /// Its name, as PEFT calls it in an adapter.
    pub name: &'static str,
    /// f32.
    pub value: Tensor,
}

/// A soft prompt whose values are being tuned.
#[derive(Debug, Clone)]
pub struct Prompt {
    kind: PromptKind,
    /// Tokens before the virtual tokens; none at the start.
    before: Arc<[u32]>,
    parameters: Vec<PromptParameter>,
}

impl Prompt {
    /// A prompt whose one parameter is its prefix.
    ///
    /// # Errors
    /// Returns an error if the prefix is not a matrix with at least one row.
    pub fn new(prefix: &Prefix) -> Result<Self> {
        let value = prefix.values().clone();
        match value.dims() {
            [rows, _] if *rows > 0 => {}
            found => {
                return Err(Error::shape(
                    "prompt",
                    "a row for each of at least 1 virtual token",
                    format!("{found:?}"),
                ));
            }
        }
        let parameters = vec![PromptParameter { name: "prompt_embeddings", value }];
        Ok(Self { kind: prefix.kind(), before: prefix.before().into(), parameters })
    }

    /// A prompt of the embeddings `values`, [P, C].
    ///
    /// # Errors
    /// Returns an error if `values` is not a matrix with at least one row.
    pub fn embeddings(values: &Tensor) -> Result<Self> {
        Self::new(&Prefix::Embeddings(values.clone()))
    }

    /// What the prompt puts in front of sequences.
    pub fn kind(&self) -> PromptKind {
        self.kind
    }

    /// Tokens before the virtual tokens, with which every input begins; none if these stand at the start.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// Virtual tokens of the prefix, P.
    pub fn num_virtual_tokens(&self) -> usize {
        self.parameters[0].value.dims()[0]
    }

    /// Trainable values of all parameters.
    pub fn elem_count(&self) -> usize {
        self.parameters.iter().map(|parameter| parameter.value.elem_count()).sum()
    }

    /// The trainable tensors.
    pub fn parameters(&self) -> &[PromptParameter] {
        &self.parameters
    }

    /// Replaces the values of the parameters, in their order.
    pub fn set_values(&mut self, values: &[Tensor]) {
        for (parameter, value) in self.parameters.iter_mut().zip(values) {
            parameter.value = value.clone();
        }
    }

    /// The prefix that the parameters make.
    pub fn prefix(&self) -> Prefix {
        Prefix::new(self.kind, self.parameters[0].value.clone()).with_before(&self.before)
    }

    /// The gradients of the parameters, in their order, from that of the prefix.
    pub fn backward(&self, gradient: &Prefix) -> Vec<Tensor> {
        vec![gradient.values().clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn values(first: f32) -> Tensor {
        Tensor::new(&[[first, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap()
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
        tensor.to_vec2().unwrap()
    }

    #[test]
    fn prompt_of_embeddings_is_its_own_prefix() {
        let mut prompt = Prompt::embeddings(&values(1.0)).unwrap();
        assert_eq!((prompt.num_virtual_tokens(), prompt.parameters().len()), (2, 1));
        prompt.set_values(&[values(7.0)]);
        assert_eq!(rows(prompt.prefix().values()), [[7.0, 2.0], [3.0, 4.0]]);
        let gradients = prompt.backward(&Prefix::Embeddings(values(-1.0)));
        assert_eq!(rows(&gradients[0]), [[-1.0, 2.0], [3.0, 4.0]]);
    }

    #[test]
    fn prompt_without_rows_is_refused() {
        let empty = Tensor::zeros((0, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(Prompt::embeddings(&empty).unwrap_err().to_string().contains("[0, 4]"));
        assert!(Prompt::embeddings(&values(1.0).flatten_all().unwrap()).is_err());
    }
}

//! The soft prompts of a batch in the form in which its passes read them.
//!
//! ```text
//! embeddings         rows of the prefix pass, whose keys and values the example passes read
//! keys and values    given to the prefix pass, which holds heads alone; the example passes read both, joined
//! ```

use crate::batch::{GivenPrompts, Passes};
use crate::model::{Decoder, PrefixGradient, PrefixState, join, keys_values_gradient, split};
use crate::prompt::Prefix;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The prompts of a batch.
pub(super) struct BatchPrompts<'a> {
    prompts: &'a Prefix,
    /// Embeddings of virtual tokens [n, C]; no rows if the prompts are keys and values.
    pub(super) embeddings: Tensor,
    /// What the layers read of prompts that are keys and values.
    given: Option<(Vec<PrefixState>, &'a GivenPrompts)>,
}

impl<'a> BatchPrompts<'a> {
    /// `prompts` as the passes of a batch read them.
    pub(super) fn new(model: &Decoder, prompts: &'a Prefix, passes: &'a Passes) -> Result<Self> {
        let (embeddings, given) = match (prompts, &passes.given) {
            (Prefix::Embeddings(embeddings) | Prefix::EmbeddingsAfter { values: embeddings, .. }, None) => {
                (embeddings.clone(), None)
            }
            (Prefix::KeysValues(values), Some(given)) => {
                (model.no_prompts()?, Some((model.given_states(values)?, given)))
            }
            _ => {
                return Err(Error::Invalid(format!(
                    "prompt.kind \"{}\": expected passes that were packed for it, found others",
                    prompts.kind()
                )));
            }
        };
        Ok(Self { prompts, embeddings, given })
    }

    /// What the prefix pass reads of prefixes that are not in it.
    pub(super) fn given(&self) -> Option<&[PrefixState]> {
        self.given.as_ref().map(|(states, _)| &states[..])
    }

    /// What the example passes read of prefixes; `computed` is what the layers made of the rows of the prefix pass.
    pub(super) fn for_examples(
        &self,
        computed: impl FnOnce() -> Result<Vec<PrefixState>>,
    ) -> Result<Vec<PrefixState>> {
        let Some((given, GivenPrompts { joined, .. })) = &self.given else { return computed() };
        if joined.is_empty() {
            return Ok(given.clone());
        }
        given.iter().zip(&computed()?).map(|(given, computed)| join(given, computed, joined)).collect()
    }

    /// Splits the gradient of what the example passes read, layer by layer, into that of the given prompts and that of the rows
    /// of the prefix pass.
    pub(super) fn split(&self, examples: Option<Vec<PrefixGradient>>) -> Result<ExampleGradients> {
        let Some((_, GivenPrompts { rows, joined })) = &self.given else {
            return Ok(ExampleGradients { given: None, computed: examples });
        };
        let Some(examples) = examples else { return Ok(ExampleGradients { given: None, computed: None }) };
        if joined.is_empty() {
            return Ok(ExampleGradients { given: Some(of_attention(examples)), computed: None });
        }
        let (mut given, mut computed) = (Vec::new(), Vec::new());
        for gradient in &examples {
            let parts = split(gradient, joined, *rows)?;
            given.extend(parts.given);
            computed.push(parts.computed);
        }
        Ok(ExampleGradients { given: Some(given), computed: Some(computed) })
    }

    /// The gradient of the prompts, from that of the example passes and what the prefix pass's backward pass gave.
    pub(super) fn gradient(
        &self,
        examples: Option<Vec<PrefixGradient>>,
        embeddings: Option<Tensor>,
        prefix_pass: Option<Vec<PrefixGradient>>,
    ) -> Result<Option<Prefix>> {
        let values = match &self.given {
            None => embeddings,
            Some(_) => {
                let dtype = if self.prompts.values().dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                let layers = add(examples, prefix_pass.map(of_attention))?;
                layers.map(|layers| keys_values_gradient(&layers, dtype)).transpose()?
            }
        };
        Ok(values.map(|values| self.prompts.with_values(values)))
    }
}

/// The gradient of attention layers' keys and values alone.
fn of_attention(layers: Vec<PrefixGradient>) -> Vec<PrefixGradient> {
    layers.into_iter().filter(|layer| matches!(layer, PrefixGradient::KeysValues(_))).collect()
}

/// The parts of a gradient of what example passes read of prefixes, layer by layer.
pub(super) struct ExampleGradients {
    /// Of prompts that are keys and values, of the attention layers.
    pub(super) given: Option<Vec<PrefixGradient>>,
    /// Of the rows of the prefix pass.
    pub(super) computed: Option<Vec<PrefixGradient>>,
}

/// The sum of two passes' gradients, layer by layer.
pub(super) fn add(
    sum: Option<Vec<PrefixGradient>>,
    other: Option<Vec<PrefixGradient>>,
) -> Result<Option<Vec<PrefixGradient>>> {
    match (sum, other) {
        (Some(sum), Some(other)) => {
            sum.iter().zip(&other).map(|(a, b)| a.add(b)).collect::<Result<_>>().map(Some)
        }
        (sum, other) => Ok(sum.or(other)),
    }
}

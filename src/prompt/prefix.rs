//! What a soft prompt puts in front of the sequences of a group.

use crate::batch::{Example, PrefixGroup};
use crate::config::PromptKind;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// What a model reads before the sequences of a group.
#[derive(Debug, Clone)]
pub enum Prefix {
    /// Embeddings of virtual tokens, f32 [P, C], before the model's `embedding_multiplier` (prompt tuning, Lester et al., 2021,
    /// arXiv:2104.08691).
    Embeddings(Tensor),
    /// Embeddings of virtual tokens that stand after tokens with which every input begins: `prompt.position = "after_head"`.
    EmbeddingsAfter {
        /// The tokens before the virtual tokens, at least one.
        before: Arc<[u32]>,
        /// As [`Prefix::Embeddings`].
        values: Tensor,
    },
    /// Keys and values of virtual tokens in every attention layer (prefix tuning, Li and Liang, 2021, arXiv:2101.00190), f32
    /// [P, L 2 K D] for L attention layers: column `((2 layer + kv) K + head) D + d` with 0 for keys and 1 for values, as PEFT's
    /// `PREFIX_TUNING`. Keys are those after the rotary embedding, in half-rotated order.
    KeysValues(Tensor),
}

impl Prefix {
    /// A prefix of this kind.
    pub fn new(kind: PromptKind, values: Tensor) -> Self {
        match kind {
            PromptKind::Embeddings => Self::Embeddings(values),
            PromptKind::Prefix => Self::KeysValues(values),
        }
    }

    /// The same virtual tokens after the tokens `before`, with which every input begins; none for the start.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if the prefix is keys and values and there are tokens.
    pub fn after(self, before: &[u32]) -> Result<Self> {
        if self.kind() == PromptKind::Prefix && !before.is_empty() {
            return Err(Error::Invalid(
                "prompt.position: expected \"start\" with keys and values (prompt.kind = \"prefix\"), found \"after_head\""
                    .into(),
            ));
        }
        Ok(self.with_before(&before.into()))
    }

    /// As [`Prefix::after`]; keys and values stay at the start.
    pub(super) fn with_before(self, before: &Arc<[u32]>) -> Self {
        match self {
            Self::Embeddings(values) | Self::EmbeddingsAfter { values, .. } if before.is_empty() => {
                Self::Embeddings(values)
            }
            Self::Embeddings(values) | Self::EmbeddingsAfter { values, .. } => {
                Self::EmbeddingsAfter { before: before.clone(), values }
            }
            keys_values @ Self::KeysValues(_) => keys_values,
        }
    }

    /// The tokens before the virtual tokens; none if they stand at the start.
    pub fn before(&self) -> &[u32] {
        match self {
            Self::EmbeddingsAfter { before, .. } => before,
            Self::Embeddings(_) | Self::KeysValues(_) => &[],
        }
    }

    /// The group of `examples` after this prefix, if no other prompt is in the batch.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if an input does not begin with the tokens before the virtual tokens.
    pub fn group<'a>(&self, examples: impl IntoIterator<Item = &'a Example>) -> Result<PrefixGroup> {
        PrefixGroup::after(self.before(), 0..self.num_virtual_tokens() as u32, examples)
    }

    /// The kind of prompt that makes such a prefix.
    pub fn kind(&self) -> PromptKind {
        match self {
            Self::Embeddings(_) | Self::EmbeddingsAfter { .. } => PromptKind::Embeddings,
            Self::KeysValues(_) => PromptKind::Prefix,
        }
    }

    /// The matrix, one row for each virtual token.
    pub fn values(&self) -> &Tensor {
        match self {
            Self::Embeddings(values) | Self::EmbeddingsAfter { values, .. } | Self::KeysValues(values) => {
                values
            }
        }
    }

    /// Virtual tokens, P.
    pub fn num_virtual_tokens(&self) -> usize {
        self.values().dims()[0]
    }

    /// The same kind of prefix in the same place with other values.
    #[must_use]
    pub fn with_values(&self, values: Tensor) -> Self {
        match self {
            Self::EmbeddingsAfter { before, .. } => Self::EmbeddingsAfter { before: before.clone(), values },
            Self::Embeddings(_) | Self::KeysValues(_) => Self::new(self.kind(), values),
        }
    }

    /// The same values in another dtype.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(self.with_values(self.values().to_dtype(dtype)?))
    }

    /// Whether `other` has the same values, which are f32.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn has_values_of(&self, other: &Self) -> Result<bool> {
        let [own, other] = [self, other].map(|prefix| prefix.values().flatten_all()?.to_vec1::<f32>());
        Ok(own? == other?)
    }

    /// The rows of `prefixes`, at least one, one below the other. Of several the result is a matrix of rows for the groups of a
    /// batch, each of which says what stands before its prompt.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if there is none, or if they differ in their kind or width.
    pub fn cat(prefixes: &[Self]) -> Result<Self> {
        let Some((first, others)) = prefixes.split_first() else {
            return Err(Error::Invalid("prompts: expected at least one, found none".into()));
        };
        if others.is_empty() {
            return Ok(first.clone());
        }
        if let Some(other) = others.iter().find(|other| other.kind() != first.kind()) {
            let (expected, found) = (first.kind(), other.kind());
            return Err(Error::Invalid(format!(
                "prompts: expected one kind in a pass, found prompt.kind \"{expected}\" and \"{found}\""
            )));
        }
        let rows: Vec<&Tensor> = prefixes.iter().map(Self::values).collect();
        Ok(Self::new(first.kind(), Tensor::cat(&rows, 0)?))
    }

    /// The embeddings of the virtual tokens, [P, C].
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] with `purpose` if the prefix is keys and values.
    pub fn embeddings(&self, purpose: &str) -> Result<&Tensor> {
        match self {
            Self::Embeddings(values) | Self::EmbeddingsAfter { values, .. } => Ok(values),
            Self::KeysValues(_) => Err(Error::Invalid(format!(
                "{purpose}: expected a prompt of embeddings, found keys and values (prefix tuning), which have no embeddings"
            ))),
        }
    }
}

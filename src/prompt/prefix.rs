//! What a soft prompt puts in front of the sequences of a group.

use crate::config::PromptKind;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What a model reads before the sequences of a group.
#[derive(Debug, Clone)]
pub enum Prefix {
    /// Embeddings of virtual tokens, f32 [P, C], before the model's `embedding_multiplier` (prompt tuning, Lester et al., 2021,
    /// arXiv:2104.08691).
    Embeddings(Tensor),
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

    /// The kind of prompt that makes such a prefix.
    pub fn kind(&self) -> PromptKind {
        match self {
            Self::Embeddings(_) => PromptKind::Embeddings,
            Self::KeysValues(_) => PromptKind::Prefix,
        }
    }

    /// The matrix, one row for each virtual token.
    pub fn values(&self) -> &Tensor {
        match self {
            Self::Embeddings(values) | Self::KeysValues(values) => values,
        }
    }

    /// Virtual tokens, P.
    pub fn num_virtual_tokens(&self) -> usize {
        self.values().dims()[0]
    }

    /// The same kind of prefix with other values.
    #[must_use]
    pub fn with_values(&self, values: Tensor) -> Self {
        Self::new(self.kind(), values)
    }

    /// The same values in another dtype.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(self.with_values(self.values().to_dtype(dtype)?))
    }

    /// The rows of `prefixes`, at least one, one below the other.
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
        Ok(first.with_values(Tensor::cat(&rows, 0)?))
    }

    /// The embeddings of the virtual tokens, [P, C].
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] with `purpose` if the prefix is keys and values.
    pub fn embeddings(&self, purpose: &str) -> Result<&Tensor> {
        match self {
            Self::Embeddings(values) => Ok(values),
            Self::KeysValues(_) => Err(Error::Invalid(format!(
                "{purpose}: expected a prompt of embeddings, found keys and values (prefix tuning), which have no embeddings"
            ))),
        }
    }
}

//! A soft prompt: its trainable values, and the prefix that a model makes of them.

use super::{Prefix, PromptLayout, reparameterization};
use crate::config::{PromptKind, PromptOptions, Reparameterization};
use crate::ops::gpu;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// A soft prompt whose values are being tuned.
///
/// ```text
/// values ── reparameterization ── trainable rows ─┐
///                                 frozen rows ────┴─ prefix [P, W], the frozen rows first
/// ```
#[derive(Debug, Clone)]
pub struct Prompt {
    layout: PromptLayout,
    /// Tokens before the virtual tokens, with which every input begins; none if these stand at the start.
    before: Arc<[u32]>,
    /// All trainable values, of the shape [`PromptLayout::values_shape`].
    values: Tensor,
    /// Rows that are not trained, if there are any.
    frozen: Option<Tensor>,
}

impl Prompt {
    /// A prompt whose trainable values are the rows of its prefix.
    ///
    /// # Errors
    /// Returns an error if the prefix is not a matrix with at least one row.
    pub fn new(prefix: &Prefix) -> Result<Self> {
        let layout = PromptLayout::plain(prefix.kind(), shape(prefix)?);
        Self::from_values(layout, prefix.values().clone(), prefix)
    }

    /// A prompt of the embeddings `values`, [P, C].
    ///
    /// # Errors
    /// Returns an error if `values` is not a matrix with at least one row.
    pub fn embeddings(values: &Tensor) -> Result<Self> {
        Self::new(&Prefix::Embeddings(values.clone()))
    }

    /// The prompt that starts from `initial`, f32 on the CPU, with the frozen rows and the reparameterization of `options`. `seed`
    /// is that of a network's first weights, and `token_dim` the width of PEFT's encoder: C for embeddings, K D for keys and
    /// values.
    ///
    /// # Errors
    /// Returns an error if `initial` is not a matrix with at least one row, or if no row is left to be trained.
    pub fn with_options(
        initial: &Prefix,
        options: &PromptOptions,
        token_dim: usize,
        seed: u64,
    ) -> Result<Self> {
        let layout = PromptLayout::new(shape(initial)?, options, token_dim)?;
        let rows = initial.values().narrow(0, layout.frozen_tokens, layout.trainable_rows())?;
        let values = reparameterization::start(&layout, &rows, seed)?;
        Self::from_values(layout, values, initial)
    }

    /// A prompt of `layout` with these trainable values; its frozen rows are the first of `initial`.
    ///
    /// # Errors
    /// Returns an error if a shape is not that of the layout.
    pub fn from_values(layout: PromptLayout, values: Tensor, initial: &Prefix) -> Result<Self> {
        layout.check().map_err(Error::Invalid)?;
        let expected = (layout.kind, (layout.num_virtual_tokens, layout.width));
        let found = (initial.kind(), shape(initial)?);
        if found != expected {
            return Err(Error::shape(
                "prompt",
                format!("an initial prefix of {expected:?}"),
                format!("{found:?}"),
            ));
        }
        if *values.shape() != layout.values_shape() {
            let expected = format!("trainable values of {:?}", layout.values_shape());
            return Err(Error::shape("prompt", expected, format!("{:?}", values.shape())));
        }
        let frozen = match layout.frozen_tokens {
            0 => None,
            rows => Some(initial.values().narrow(0, 0, rows)?.copy()?),
        };
        Ok(Self { layout, before: initial.before().into(), values, frozen })
    }

    /// The same prompt after the tokens `before`, with which every input begins; none for the start.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if the prompt is keys and values and there are tokens.
    pub fn after(self, before: &[u32]) -> Result<Self> {
        Prefix::new(self.layout.kind, self.values.clone()).after(before)?;
        Ok(Self { before: before.into(), ..self })
    }

    /// Tokens before the virtual tokens; none if these stand at the start.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// What the prompt puts in front of sequences.
    pub fn kind(&self) -> PromptKind {
        self.layout.kind
    }

    /// What the trainable values are.
    pub fn layout(&self) -> &PromptLayout {
        &self.layout
    }

    /// Virtual tokens of the prefix, P.
    pub fn num_virtual_tokens(&self) -> usize {
        self.layout.num_virtual_tokens
    }

    /// Number of trainable values.
    pub fn elem_count(&self) -> usize {
        self.values.elem_count()
    }

    /// Number of values of the frozen rows.
    pub fn frozen_elem_count(&self) -> usize {
        self.frozen.as_ref().map_or(0, Tensor::elem_count)
    }

    /// All trainable values: a matrix of rows, or a vector if a reparameterization makes the rows.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The same prompt with other trainable values, of the same shape.
    #[must_use]
    pub fn with_values(&self, values: Tensor) -> Self {
        Self { values, ..self.clone() }
    }

    /// The same prompt in f32 on `device`.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let there = |tensor: &Tensor| gpu::to_device(&tensor.to_dtype(DType::F32)?, device);
        let frozen = self.frozen.as_ref().map(there).transpose()?;
        Ok(Self { values: there(&self.values)?, frozen, ..self.clone() })
    }

    /// The prefix that the values make.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn prefix(&self) -> Result<Prefix> {
        let rows = match self.layout.reparameterization {
            Reparameterization::None => self.values.clone(),
            _ => reparameterization::forward(&self.layout, &self.layout.split(&self.values)?)?,
        };
        let rows = match &self.frozen {
            None => rows,
            Some(frozen) => Tensor::cat(&[frozen, &rows], 0)?,
        };
        Ok(Prefix::new(self.layout.kind, rows).with_before(&self.before))
    }

    /// The gradient of the trainable values from that of the prefix, of the values' shape and dtype.
    ///
    /// # Errors
    /// Returns an error if the gradient is of another kind or shape than the prefix, or if a device operation fails.
    pub fn backward(&self, gradient: &Prefix) -> Result<Tensor> {
        let layout = &self.layout;
        let expected = (layout.kind, (layout.num_virtual_tokens, layout.width));
        let found = (gradient.kind(), shape(gradient)?);
        if found != expected {
            return Err(Error::shape("prompt", format!("a gradient of {expected:?}"), format!("{found:?}")));
        }
        let mut rows = gradient.values().to_dtype(self.values.dtype())?;
        if layout.frozen_tokens > 0 {
            rows = rows.narrow(0, layout.frozen_tokens, layout.trainable_rows())?.contiguous()?;
        }
        if layout.reparameterization == Reparameterization::None {
            return Ok(rows);
        }
        let parts = reparameterization::backward(layout, &layout.split(&self.values)?, &rows)?;
        let flat = parts.iter().map(|part| Ok(part.flatten_all()?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    }
}

/// Rows and width of a prefix.
fn shape(prefix: &Prefix) -> Result<(usize, usize)> {
    match prefix.values().dims() {
        [rows, width] if *rows > 0 => Ok((*rows, *width)),
        found => {
            let expected = "a row for each of at least 1 virtual token";
            Err(Error::shape("prompt", expected, format!("{found:?}")))
        }
    }
}

#[cfg(test)]
mod tests;

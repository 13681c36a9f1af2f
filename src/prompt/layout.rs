//! The trainable tensors of a prompt: which there are, their shapes, and their order in the vector of all values.

use crate::config::{PromptKind, PromptOptions, Reparameterization};
use crate::{Error, Result};
use candle_core::{Shape, Tensor};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Hidden units of the residual network if the configuration names none: those of Residual Prompt Tuning on T5-Large, whose
/// width of 1024 is the nearest to Granite's.
const RESIDUAL_BOTTLENECK: usize = 400;

/// What a prompt's trainable values are. All of them stand in one tensor: the matrix of the rows if there is no
/// reparameterization, else a vector of all parts, one after another:
///
/// ```text
/// n trainable rows, width W of a row, bottleneck B, width E of the encoder's input
///
/// none                  prompt_embeddings [n, W]
/// residual              prompt_embeddings [n, W]   down.weight [B, W]         down.bias [B]
///                       up.weight [W, B]           up.bias [W]                norm.weight [W]   norm.bias [W]
/// mlp, embeddings       embedding.weight [n, W]    mlp_head.0.weight [B, W]   mlp_head.0.bias [B]
///                       mlp_head.2.weight [B, B]   mlp_head.2.bias [B]        mlp_head.4.weight [W, B]   mlp_head.4.bias [W]
/// mlp, prefix           embedding.weight [n, E]    transform.0.weight [B, E]  transform.0.bias [B]
///                       transform.2.weight [W, B]  transform.2.bias [W]
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptLayout {
    /// What the prompt puts in front of sequences.
    pub kind: PromptKind,
    /// Rows of the prefix, P; the frozen ones count.
    pub num_virtual_tokens: usize,
    /// Width of a row, W: C for embeddings, L 2 K D for keys and values.
    pub width: usize,
    /// First rows that are not trained.
    pub frozen_tokens: usize,
    /// How the rows are made of the trainable values.
    pub reparameterization: Reparameterization,
    /// Hidden units of the reparameterization's network, B; 0 without one.
    pub bottleneck: usize,
    /// Width of what that network reads, E; 0 without one.
    pub input_width: usize,
}

/// One trainable tensor of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptPart {
    /// Its name, as in PEFT if PEFT has it.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl PromptLayout {
    /// A prompt whose trainable values are its rows, a matrix of shape [`num_virtual_tokens`, `width`].
    pub fn plain(kind: PromptKind, (num_virtual_tokens, width): (usize, usize)) -> Self {
        Self {
            kind,
            num_virtual_tokens,
            width,
            frozen_tokens: 0,
            reparameterization: Reparameterization::None,
            bottleneck: 0,
            input_width: 0,
        }
    }

    /// The layout that a configuration asks for. `token_dim` is the width of PEFT's encoder: C for embeddings, K D for keys and
    /// values.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if no row is left to be trained.
    pub fn new(shape: (usize, usize), options: &PromptOptions, token_dim: usize) -> Result<Self> {
        let plain = Self::plain(options.kind, shape);
        let input_width = match (options.reparameterization, options.kind) {
            (Reparameterization::None, _) => 0,
            (Reparameterization::Mlp, PromptKind::Prefix) => token_dim,
            (Reparameterization::Residual, _) | (Reparameterization::Mlp, PromptKind::Embeddings) => {
                plain.width
            }
        };
        let bottleneck = match (options.bottleneck, options.reparameterization) {
            (0, Reparameterization::Residual) => RESIDUAL_BOTTLENECK.min(input_width),
            (0, _) => input_width,
            (units, _) => units,
        };
        let layout = Self {
            frozen_tokens: options.frozen_tokens,
            reparameterization: options.reparameterization,
            bottleneck,
            input_width,
            ..plain
        };
        layout.check().map_err(Error::Invalid)?;
        Ok(layout)
    }

    /// Whether the trainable values are the rows of a prompt of embeddings.
    pub fn is_plain_embeddings(&self) -> bool {
        *self == Self::plain(PromptKind::Embeddings, (self.num_virtual_tokens, self.width))
    }

    /// Rows that are trained, n.
    pub fn trainable_rows(&self) -> usize {
        self.num_virtual_tokens - self.frozen_tokens
    }

    /// The trainable tensors in their order.
    pub fn parts(&self) -> Vec<PromptPart> {
        let (n, w, b, e) = (self.trainable_rows(), self.width, self.bottleneck, self.input_width);
        let parts: Vec<(&'static str, Vec<usize>)> = match (self.reparameterization, self.kind) {
            (Reparameterization::None, _) => vec![("prompt_embeddings", vec![n, w])],
            (Reparameterization::Residual, _) => vec![
                ("prompt_embeddings", vec![n, w]),
                ("down.weight", vec![b, w]),
                ("down.bias", vec![b]),
                ("up.weight", vec![w, b]),
                ("up.bias", vec![w]),
                ("norm.weight", vec![w]),
                ("norm.bias", vec![w]),
            ],
            (Reparameterization::Mlp, PromptKind::Embeddings) => vec![
                ("embedding.weight", vec![n, e]),
                ("mlp_head.0.weight", vec![b, e]),
                ("mlp_head.0.bias", vec![b]),
                ("mlp_head.2.weight", vec![b, b]),
                ("mlp_head.2.bias", vec![b]),
                ("mlp_head.4.weight", vec![w, b]),
                ("mlp_head.4.bias", vec![w]),
            ],
            (Reparameterization::Mlp, PromptKind::Prefix) => vec![
                ("embedding.weight", vec![n, e]),
                ("transform.0.weight", vec![b, e]),
                ("transform.0.bias", vec![b]),
                ("transform.2.weight", vec![w, b]),
                ("transform.2.bias", vec![w]),
            ],
        };
        parts.into_iter().map(|(name, shape)| PromptPart { name, shape }).collect()
    }

    /// Number of trainable values.
    pub fn elem_count(&self) -> usize {
        self.parts().iter().map(|part| part.shape.iter().product::<usize>()).sum()
    }

    /// Shape of the tensor of all trainable values.
    pub fn values_shape(&self) -> Shape {
        match self.reparameterization {
            Reparameterization::None => (self.trainable_rows(), self.width).into(),
            Reparameterization::Residual | Reparameterization::Mlp => self.elem_count().into(),
        }
    }

    /// The parts of the tensor of all trainable values.
    pub(super) fn split(&self, values: &Tensor) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let parts = self.parts().into_iter().map(|part| {
            let part = values.narrow(0, start, part.shape.iter().product())?.reshape(part.shape)?;
            start += part.elem_count();
            Ok(part)
        });
        parts.collect()
    }

    /// What is wrong with the layout: it may come from a file.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let (rows, frozen) = (self.num_virtual_tokens, self.frozen_tokens);
        if rows == 0 || self.width == 0 {
            return Err(format!(
                "prompt: expected at least 1 virtual token, found a shape of [{rows}, {}]",
                self.width
            ));
        }
        if frozen >= rows {
            return Err(format!(
                "prompt.frozen_tokens: expected fewer than the prompt's {rows} virtual tokens, found {frozen}"
            ));
        }
        let has_network = self.reparameterization != Reparameterization::None;
        if has_network != (self.bottleneck > 0) || has_network != (self.input_width > 0) {
            return Err(format!(
                "prompt.bottleneck: expected a network for the reparameterization \"{}\" alone, found one of {} units",
                self.reparameterization, self.bottleneck
            ));
        }
        Ok(())
    }

    /// Checks that a run of this layout goes on with the options that it began with.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] that names the key.
    pub fn check_options(&self, options: &PromptOptions) -> Result<()> {
        let bottleneck = if options.bottleneck == 0 { self.bottleneck } else { options.bottleneck };
        let keys = [
            ("kind", self.kind.to_string(), options.kind.to_string()),
            (
                "reparameterization",
                self.reparameterization.to_string(),
                options.reparameterization.to_string(),
            ),
            ("bottleneck", self.bottleneck.to_string(), bottleneck.to_string()),
            ("frozen_tokens", self.frozen_tokens.to_string(), options.frozen_tokens.to_string()),
        ];
        match keys.into_iter().find(|(_, expected, found)| expected != found) {
            None => Ok(()),
            Some((key, expected, found)) => Err(Error::Invalid(format!(
                "prompt.{key}: expected {expected}, which the checkpoint has, found {found}; start a new run"
            ))),
        }
    }
}

/// The settings that are not the defaults, each after a comma.
impl fmt::Display for PromptLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind != PromptKind::Embeddings {
            write!(f, ", kind {}", self.kind)?;
        }
        if self.reparameterization != Reparameterization::None {
            write!(f, ", reparameterization {}, bottleneck {}", self.reparameterization, self.bottleneck)?;
        }
        if self.frozen_tokens > 0 {
            write!(f, ", {} frozen", self.frozen_tokens)?;
        }
        Ok(())
    }
}

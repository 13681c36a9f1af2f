//! The backward pass, from the hidden states of the target rows down to the prompts. No weight gets a gradient.

use super::layer::{Given, LayerGradients, LayerPrefix, PrefixGradient, PrefixState, Saved, Stream};
use super::{Decoder, Tape};
use crate::Result;
use crate::batch::PackedBatch;
use crate::ops::embed::{self, EmbedLookup};
use candle_core::Tensor;

/// Result of [`Decoder::backward`].
pub struct Backward {
    /// Gradient of the prompts [rows, C]; `None` if the prefixes are in another pass.
    pub prompts: Option<Tensor>,
    /// Gradient of what was read of the prefixes in another pass, layer by layer.
    pub prefixes: Option<Vec<PrefixGradient>>,
}

/// What a pass and the others have to do with each other's prefixes, layer by layer.
#[derive(Clone, Copy, Default)]
pub struct Prefixes<'a> {
    /// As in [`Decoder::forward`].
    pub states: Option<&'a [PrefixState]>,
    /// The gradient of this pass's prefixes from the example passes ([`Backward::prefixes`], summed).
    pub gradients: Option<&'a [PrefixGradient]>,
}

impl Decoder {
    /// The gradient of `virtual_tokens` rows of prompts, from `dhidden`, that of the hidden states of the target rows. The tape
    /// is used up layer by layer.
    ///
    /// # Errors
    /// Returns an error if shapes do not match or a device operation fails.
    pub fn backward(
        &self,
        batch: &PackedBatch,
        tape: Tape,
        dhidden: &Tensor,
        prefixes: Prefixes,
        virtual_tokens: usize,
    ) -> Result<Backward> {
        self.on_pool(|| {
            let rope = self.rope_of(batch)?;
            let Tape { layers, last, .. } = tape;
            let mut dx = self.norm.backward(dhidden, &last.residual, &last.rstd, None)?;
            drop(last);
            let mut found = Vec::new();
            for (i, (layer, saved)) in self.layers.iter().zip(layers).enumerate().rev() {
                let pass = self.layer_pass(i, batch, rope.as_deref());
                let prefix = LayerPrefix {
                    state: prefixes.states.map(|states| &states[i]),
                    gradient: prefixes.gradients.map(|gradients| &gradients[i]),
                };
                let saved = match saved {
                    Saved::All(saved) => saved,
                    Saved::Input { residual, routing, .. } => {
                        let given = Given { prefix: prefix.state, routing: routing.as_ref() };
                        layer.forward(layer.normed(&Stream::new(residual), &pass)?, &pass, given)?
                    }
                };
                let LayerGradients { input, prefix } = layer.backward(&dx, &saved, &pass, prefix)?;
                found.extend(prefix);
                let Some(input) = input else { break };
                dx = input;
            }
            found.reverse();
            if prefixes.states.is_some() {
                return Ok(Backward { prompts: None, prefixes: Some(found) });
            }
            let lookup = EmbedLookup { ids: batch.ids.view(0..batch.prefix_rows), ..self.lookup(batch) };
            let prompts = embed::backward(&dx, virtual_tokens, &lookup)?;
            Ok(Backward { prompts: Some(prompts), prefixes: None })
        })
    }
}

//! Tensors of experts and Mamba2 layers as llama.cpp's conversion writes them (`conversion/granite.py`, `conversion/mamba.py`).
//! [`crate::checkpoint::gguf`] reads them.

use super::{GgufEntry, Planned, PlannedSource, TensorPlan};
use crate::Result;
use crate::export::values;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};

/// What of a tensor is written.
#[derive(Clone, Copy)]
pub(super) enum LayerValues {
    /// All of it.
    All,
    /// `-exp` of it.
    Decay,
    /// Of each expert the first half of the rows (0) or the second (1).
    Half(usize),
}

impl TensorPlan<'_> {
    /// The entries for a tensor of experts or of a Mamba2 layer that has another shape, name or type than other matrices;
    /// `None` if it is not one of them.
    pub(super) fn layer_tensor(&self, name: &str) -> Result<Option<Vec<Planned>>> {
        let Some((layer, tensor)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        else {
            return Ok(None);
        };
        let shape = self.base.weights.shape(name)?;
        let values: usize = shape.iter().product();
        let groups = self.base.config.mamba.as_ref().map_or(1, |mamba| mamba.groups);
        // llama.cpp computes with these in f32.
        let one = |gguf: &str, shape: Vec<usize>, part| {
            let entry = GgufEntry { name: format!("blk.{layer}.{gguf}"), shape, dtype: GgmlDType::F32 };
            Some(vec![self.part(name, entry, part)])
        };
        Ok(match tensor {
            "mamba.A_log" => one("ssm_a", vec![values, 1], LayerValues::Decay),
            "mamba.D" => one("ssm_d", vec![values, 1], LayerValues::All),
            "mamba.dt_bias" => one("ssm_dt.bias", vec![values], LayerValues::All),
            "mamba.norm.weight" => one("ssm_norm.weight", vec![groups, values / groups], LayerValues::All),
            "mamba.conv1d.weight" => one("ssm_conv1d.weight", vec![shape[0], shape[2]], LayerValues::All),
            "block_sparse_moe.router.layer.weight" => one("ffn_gate_inp.weight", shape, LayerValues::All),
            "block_sparse_moe.output_linear.weight" => {
                Some(vec![self.experts(name, (layer, "ffn_down_exps"), shape, LayerValues::All)?])
            }
            "block_sparse_moe.input_linear.weight" => {
                let half = vec![shape[0], shape[1] / 2, shape[2]];
                let part = |gguf, i| self.experts(name, (layer, gguf), half.clone(), LayerValues::Half(i));
                Some(vec![part("ffn_gate_exps", 0)?, part("ffn_up_exps", 1)?])
            }
            _ => None,
        })
    }

    /// Matrices of experts, in the type of other matrices or in that of the GGUF file that they come from.
    fn experts(
        &self,
        name: &str,
        (layer, gguf): (&str, &str),
        shape: Vec<usize>,
        part: LayerValues,
    ) -> Result<Planned> {
        let stored = self.base.weights.stored_parts(name)?;
        let dtype = match self.value_type {
            Some(value_type) => value_type.ggml(),
            None => values::ggml_or_f32(stored[part.index().min(stored.len() - 1)].dtype),
        };
        let dtype = if shape[2].is_multiple_of(dtype.block_size()) { dtype } else { GgmlDType::F16 };
        Ok(self.part(name, GgufEntry { name: format!("blk.{layer}.{gguf}.weight"), shape, dtype }, part))
    }

    /// An entry whose bytes are those of a GGUF base if they have its type.
    fn part(&self, name: &str, entry: GgufEntry, part: LayerValues) -> Planned {
        let copied = self.base.metadata.is_some()
            && self
                .base
                .weights
                .stored_parts(name)
                .is_ok_and(|parts| values::is(parts[part.index()].dtype, entry.dtype));
        let source = match copied {
            true => PlannedSource::CopiedPart(name.to_owned(), part.index()),
            false => PlannedSource::Layer(name.to_owned(), part),
        };
        Planned { entry, source }
    }

    /// The values of a part of a tensor, in f32.
    pub(super) fn layer_values(&self, name: &str, part: LayerValues) -> Result<Tensor> {
        let shape = self.base.weights.shape(name)?;
        let tensor = self.base.weights.tensor(name, &shape, DType::F32, &Device::Cpu)?;
        Ok(match part {
            LayerValues::All => tensor,
            LayerValues::Decay => tensor.exp()?.neg()?,
            LayerValues::Half(i) => tensor.narrow(1, i * shape[1] / 2, shape[1] / 2)?.contiguous()?,
        })
    }
}

impl LayerValues {
    /// The index of the part in [`crate::checkpoint::Weights::stored_parts`] of a GGUF base.
    fn index(self) -> usize {
        match self {
            Self::All | Self::Decay => 0,
            Self::Half(i) => i,
        }
    }
}

//! The tensors of a GGUF file under their Hugging Face names, and what llama.cpp's conversion (`conversion/granite.py`,
//! `conversion/mamba.py`, `conversion/llama.py`) does to their values.
//!
//! ```text
//! GGUF, after blk.i.                       Hugging Face, after model.layers.i.
//! attn_q.weight          [H D, C]          self_attn.q_proj.weight                the rows of a head in another order
//! ssm_a                  [M, 1]            mamba.A_log                     [M]    -exp of it
//! ssm_d, ssm_dt.bias     [M, 1], [M]       mamba.D, mamba.dt_bias          [M]
//! ssm_conv1d.weight      [X, W]            mamba.conv1d.weight       [X, 1, W]
//! ssm_norm.weight        [G, I / G]        mamba.norm.weight               [I]
//! ffn_gate_exps.weight   [E, F, C]         block_sparse_moe.input_linear.weight
//! ffn_up_exps.weight     [E, F, C]           [E, 2 F, C]: gate above up, expert by expert
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use super::{ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use crate::checkpoint::config::{ModelConfig, unsupported};
use crate::checkpoint::tensors::LayerTensors;
use crate::{Error, Result};

/// Names of a layer's modules with weights or biases: Hugging Face's and GGUF's. Of a name that is there twice, the first is
/// written.
const LAYER_MODULES: [(&str, &str); 18] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_proj", "ffn_gate_shexp"),
    ("mlp.up_proj", "ffn_up_shexp"),
    ("mlp.down_proj", "ffn_down_shexp"),
    ("block_sparse_moe.router.layer", "ffn_gate_inp"),
    ("block_sparse_moe.output_linear", "ffn_down_exps"),
    ("mamba.in_proj", "ssm_in"),
    ("mamba.conv1d", "ssm_conv1d"),
    ("mamba.norm", "ssm_norm"),
    ("mamba.out_proj", "ssm_out"),
];

/// Names of a layer's other tensors: Hugging Face's and GGUF's.
const LAYER_TENSORS: [(&str, &str); 4] = [
    ("mamba.A_log", "ssm_a"),
    ("mamba.D", "ssm_d"),
    ("mamba.dt_bias", "ssm_dt.bias"),
    ("block_sparse_moe.input_linear.weight", GATE_EXPERTS),
];

/// The tensors that are one in Hugging Face's files.
const GATE_EXPERTS: &str = "ffn_gate_exps.weight";
const UP_EXPERTS: &str = "ffn_up_exps.weight";

/// Names of the tensors outside the layers.
const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// A Hugging Face tensor in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape in Hugging Face's files.
    pub shape: Vec<usize>,
    /// What llama.cpp's conversion did to it.
    pub conversion: Conversion,
}

/// What llama.cpp's conversion does to the values of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Conversion {
    /// Nothing.
    Same,
    /// It reorders the rows of each of these heads.
    Permuted { heads: usize },
    /// It stores the first half of each expert's rows as the tensor, and the second half as `up`.
    GateUp { up: String },
    /// It stores A, which is negative, for `ln(-A)`.
    Decay,
}

/// All tensors by their Hugging Face names.
///
/// # Errors
/// Returns [`Error::Unsupported`] with a tensor that the architecture does not have.
pub(super) fn tensors(
    path: &Path,
    content: &Content,
    config: &ModelConfig,
) -> Result<BTreeMap<String, GgufTensor>> {
    let layers = (0..config.num_hidden_layers)
        .map(|i| LayerTensors::new(config, i, false).names(i).collect::<Vec<_>>());
    let known: BTreeSet<String> = layers.flatten().chain(OUTER.map(|(hf, _)| hf.to_string())).collect();
    let mut tensors = BTreeMap::new();
    let is_of_rope = |name: &str| [ROPE_FREQS, ROPE_SHORT, ROPE_LONG].contains(&name);
    for (name, info) in content.tensor_infos.iter().filter(|(name, _)| !is_of_rope(name)) {
        if gate_of(name).is_some_and(|gate| content.tensor_infos.contains_key(&gate)) {
            continue;
        }
        // A tensor that the model does not use would silently change the results.
        let unknown = || unsupported(path, format!("tensor `{name}`"));
        let hf = hf_name(name).filter(|hf| known.contains(hf)).ok_or_else(unknown)?;
        let (conversion, shape) = conversion(path, content, name, &hf, config)?;
        let shape = shape.unwrap_or_else(|| info.shape.dims().to_vec());
        if tensors.insert(hf, GgufTensor { name: name.clone(), shape, conversion }).is_some() {
            return Err(unknown());
        }
    }
    Ok(tensors)
}

/// What llama.cpp's conversion did to a tensor, and its shape in Hugging Face's files if it is another one.
fn conversion(
    path: &Path,
    content: &Content,
    name: &str,
    hf: &str,
    config: &ModelConfig,
) -> Result<(Conversion, Option<Vec<usize>>)> {
    let dims = content.tensor_infos[name].shape.dims();
    let flat = || Some(vec![dims.iter().product()]);
    let in_layer = hf.splitn(4, '.').nth(3).unwrap_or_default();
    Ok(match in_layer {
        "self_attn.q_proj.weight" | "self_attn.q_proj.bias" => {
            (Conversion::Permuted { heads: config.num_attention_heads }, None)
        }
        "self_attn.k_proj.weight" | "self_attn.k_proj.bias" => {
            (Conversion::Permuted { heads: config.num_key_value_heads }, None)
        }
        "mamba.A_log" => (Conversion::Decay, flat()),
        "mamba.D" | "mamba.norm.weight" => (Conversion::Same, flat()),
        "mamba.conv1d.weight" => {
            let &[channels, taps] = dims else {
                return Err(wrong_shape(path, name, "[channels, taps]", dims));
            };
            (Conversion::Same, Some(vec![channels, 1, taps]))
        }
        "block_sparse_moe.input_linear.weight" => {
            let up = name.replace(GATE_EXPERTS, UP_EXPERTS);
            let &[experts, rows, columns] = dims else {
                return Err(wrong_shape(path, name, "[experts, size, hidden size]", dims));
            };
            match content.tensor_infos.get(&up).map(|info| info.shape.dims()) {
                Some(found) if found == dims => {}
                Some(found) => return Err(wrong_shape(path, &up, &format!("{dims:?}"), found)),
                None => return Err(unsupported(path, format!("tensor `{name}` without `{up}`"))),
            }
            (Conversion::GateUp { up }, Some(vec![experts, 2 * rows, columns]))
        }
        _ => (Conversion::Same, None),
    })
}

fn wrong_shape(path: &Path, name: &str, expected: &str, found: &[usize]) -> Error {
    let problem = format!("tensor `{name}`: expected shape {expected}, found {found:?}");
    Error::Checkpoint { path: path.to_path_buf(), problem }
}

/// The name of the tensor above a tensor of the experts' up projections.
fn gate_of(name: &str) -> Option<String> {
    name.strip_suffix(UP_EXPERTS).map(|block| format!("{block}{GATE_EXPERTS}"))
}

/// GGUF's name of a Hugging Face tensor of a model without experts and Mamba2 layers; `None` if it has no such tensor.
pub(crate) fn gguf_name(hf: &str) -> Option<String> {
    if let Some((_, gguf)) = OUTER.iter().find(|(outer, _)| *outer == hf) {
        return Some((*gguf).to_string());
    }
    let (layer, tensor) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = tensor.rsplit_once('.')?;
    let (_, gguf) = LAYER_MODULES.iter().find(|(known, _)| *known == module)?;
    matches!(kind, "weight" | "bias").then(|| format!("blk.{layer}.{gguf}.{kind}"))
}

fn hf_name(gguf: &str) -> Option<String> {
    if let Some((hf, _)) = OUTER.iter().find(|(_, outer)| *outer == gguf) {
        return Some((*hf).to_string());
    }
    let (layer, tensor) = gguf.strip_prefix("blk.")?.split_once('.')?;
    if let Some((hf, _)) = LAYER_TENSORS.iter().find(|(_, known)| *known == tensor) {
        return Some(format!("model.layers.{layer}.{hf}"));
    }
    let (module, kind) = tensor.rsplit_once('.')?;
    let (hf, _) = LAYER_MODULES.iter().find(|(_, known)| *known == module)?;
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{hf}.{kind}"))
}

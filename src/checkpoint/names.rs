//! Names of tensors: the names of transformers' causal language models, derived from the names that wrappers and base
//! classes save. Names also show that a file is not such a model.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use super::tensors::{EMBEDDING, HEAD, LayerTensors, NORM};
use super::weights::Weights;
use super::{ModelConfig, config};
use crate::{Error, Result};

/// Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Endings of names of quantised weights, and the method that writes them.
const QUANTISED: [(&str, &str); 9] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_scale", "compressed-tensors or fp8"),
    (".weight_scale_inv", "fp8"),
    (".weight_packed", "compressed-tensors"),
    (".scales", "MLX or GPTQ"),
];

/// Endings of names of buffers that older versions saved and no version reads.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".masked_bias", ".attn.bias"];

/// The name of a tensor in transformers' causal language model.
///
/// ```text
/// _orig_mod.model.norm.weight           torch.compile          model.norm.weight
/// module.model.norm.weight              DataParallel           model.norm.weight
/// base_model.model.model.norm.weight    PEFT, merged           model.norm.weight
/// norm.weight                           saved from the base    model.norm.weight
/// ```
pub(super) fn canonical(name: &str) -> Cow<'_, str> {
    let parts = || name.split('.').filter(|part| !WRAPPERS.contains(part));
    let unwrapped = match name.split('.').any(|part| WRAPPERS.contains(&part)) {
        true => Cow::Owned(parts().collect::<Vec<_>>().join(".")),
        false => Cow::Borrowed(name),
    };
    let mut rest: &str = &unwrapped;
    while let Some(inner) = rest.strip_prefix("module.") {
        rest = inner;
    }
    let is_full = |name: &str| name.starts_with("model.") || name.starts_with("lm_head.");
    for prefix in ["base_model.model.", "base_model."] {
        if let Some(inner) = rest.strip_prefix(prefix).filter(|inner| is_full(inner)) {
            rest = inner;
            break;
        }
    }
    let of_base = rest.starts_with("layers.") || rest == "embed_tokens.weight" || rest == "norm.weight";
    if of_base {
        return Cow::Owned(format!("model.{rest}"));
    }
    if rest.len() == name.len() { Cow::Borrowed(name) } else { Cow::Owned(rest.to_string()) }
}

/// Refuses tensors that a dense model does not have: an adapter's, quantised weights, names in Meta's own format.
///
/// # Errors
/// Returns an error with the kind of the tensors and the first one.
pub(super) fn refuse_foreign<'a>(
    path: &Path,
    mut names: impl Iterator<Item = &'a str> + Clone,
) -> Result<()> {
    let error = |problem: String| Err(Error::Checkpoint { path: path.to_path_buf(), problem });
    let of_adapter = |name: &&str| name.contains(".lora_") || name.contains(".base_layer.");
    if let Some(name) = names.clone().find(of_adapter) {
        return error(format!(
            "expected the weights of a model, found those of an adapter beside them (`{name}`); hint: merge it first, \
             with merge_and_unload of PEFT"
        ));
    }
    for name in names.clone() {
        if let Some((_, method)) = QUANTISED.iter().find(|(end, _)| name.ends_with(end)) {
            return Err(config::unsupported(
                path,
                format!("weights quantised by {method} (tensor `{name}`)"),
            ));
        }
    }
    if let Some(name) = names.find(|name| *name == "tok_embeddings.weight") {
        return error(format!(
            "expected transformers' names of tensors, found those of the original release (`{name}`); hint: convert \
             it with transformers' convert_llama_weights_to_hf.py, or take the repository whose name ends in -hf"
        ));
    }
    Ok(())
}

/// Decides between a tied head and a separate one: transformers 5 uses a head that the file contains. Returns a warning
/// if the configuration says otherwise.
///
/// # Errors
/// Returns an error if a tensor can't be read.
pub(crate) fn settle_head(config: &mut ModelConfig, weights: &mut Weights) -> Result<Option<String>> {
    if !config.tie_word_embeddings || !weights.contains(HEAD) {
        return Ok(None);
    }
    if !weights.contains(EMBEDDING) {
        weights.alias(EMBEDDING, HEAD);
        return Ok(None);
    }
    if weights.are_equal(EMBEDDING, HEAD)? {
        return Ok(None);
    }
    config.tie_word_embeddings = false;
    Ok(Some(format!(
        "{}: the configuration has `tie_word_embeddings` true, and `{HEAD}` is there with other values than \
         `{EMBEDDING}`: it is used as the head, as transformers 5 does",
        weights.path().display()
    )))
}

/// A warning about tensors that look like weights but are not part of the model. transformers ignores them too.
pub(super) fn unused(config: &ModelConfig, weights: &Weights) -> Option<String> {
    let known = expected(config, weights);
    let names = weights.names();
    let looks = |name: &&String| {
        (name.starts_with("model.") || name.starts_with("lm_head."))
            && !BUFFERS.iter().any(|end| name.ends_with(end))
            && !known.contains(name.as_str())
            && !(name.as_str() == HEAD && config.tie_word_embeddings)
    };
    let unused: Vec<&String> = names.iter().filter(looks).collect();
    let first: Vec<String> = unused.iter().take(3).map(|name| format!("`{name}`")).collect();
    let more = if unused.len() > 3 { ", ..." } else { "" };
    let count = match unused.len() {
        0 => return None,
        1 => "a tensor has".to_string(),
        n => format!("{n} tensors have"),
    };
    Some(format!(
        "{}: {count} no place in the model that the configuration describes, and {} ignored, as transformers does: {}{more}",
        weights.path().display(),
        if unused.len() == 1 { "is" } else { "are" },
        first.join(", "),
    ))
}

/// Names of the tensors that the model reads.
pub(crate) fn expected(config: &ModelConfig, weights: &Weights) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = [EMBEDDING, NORM, HEAD].map(String::from).into();
    for i in 0..config.num_hidden_layers {
        let merged = weights.contains(&LayerTensors::merged_name(i));
        names.extend(LayerTensors::new(config, i, merged).names(i));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_and_base_classes_are_seen_through() {
        for (name, expected) in [
            ("model.norm.weight", "model.norm.weight"),
            ("_orig_mod.model.norm.weight", "model.norm.weight"),
            ("module._orig_mod.module.lm_head.weight", "lm_head.weight"),
            (
                "model.layers.0._orig_mod.mlp._checkpoint_wrapped_module.up_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
            ),
            ("base_model.model.model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("base_model.model.lm_head.weight", "lm_head.weight"),
            ("base_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("_orig_mod.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("position_ids", "position_ids"),
            ("norm", "norm"),
            ("vision.norm.weight", "vision.norm.weight"),
        ] {
            assert_eq!(canonical(name), expected, "{name}");
        }
    }

    #[test]
    fn files_of_other_kinds_are_refused_by_their_names() {
        let path = Path::new("x");
        let refuse = |name: &str| refuse_foreign(path, ["model.norm.weight", name].into_iter());
        for (name, says) in [
            ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
            ("model.layers.0.self_attn.q_proj.base_layer.weight", "adapter"),
            ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
            ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
            ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8"),
            ("tok_embeddings.weight", "original release"),
        ] {
            let message = refuse(name).unwrap_err().to_string();
            assert!(message.contains(says) && message.contains(name), "{message}");
        }
        refuse("model.layers.0.mlp.up_proj.weight").unwrap();
    }
}

"""Holds a baked GGUF file against the folder that it was made of, by the gguf package.

    python tests/export/gguf_file.py FILE.gguf FOLDER f32|bf16|q8_0 FIRST

FOLDER is the base, FIRST the id of the first new token.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, LlamaFileType, TokenType, quants
from safetensors.numpy import load_file

file, folder, name, first = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
config = json.loads((folder / "config.json").read_text())
weights = {}
for part in folder.glob("*.safetensors"):
    weights |= load_file(part)
reader = GGUFReader(file)
value = {key: field.contents() for key, field in reader.fields.items()}

is_mamba = [kind == "linear_attention" for kind in config.get("layer_types") or []]
experts = config.get("num_local_experts") or 0
if config["model_type"] == "llama":
    arch = "llama"
elif any(is_mamba):
    arch = "granitehybrid"
else:
    arch = "granitemoe" if experts else "granite"
shared, has_rope = config.get("shared_intermediate_size"), config.get("position_embedding_type", "rope") == "rope"
hidden, heads = config["hidden_size"], config["num_attention_heads"]
head_dim = config.get("head_dim") or hidden // heads
rows = max(weights["model.embed_tokens.weight"].shape[0], first + 5)
expected = {
    "general.architecture": arch,
    "block_count": config["num_hidden_layers"],
    "context_length": config["max_position_embeddings"] if has_rope else 2**20,
    "embedding_length": hidden,
    "feed_forward_length": config["intermediate_size"] if experts else shared or config["intermediate_size"],
    "attention.head_count": heads,
    "attention.head_count_kv": config["num_key_value_heads"],
    "attention.key_length": head_dim,
    "rope.dimension_count": head_dim,
    "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    "vocab_size": rows,
}
if has_rope:
    expected["rope.freq_base"] = config["rope_parameters"]["rope_theta"]
if experts:
    expected |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    expected |= {"expert_shared_feed_forward_length": shared} if shared else {}
if any(is_mamba):
    expected |= {"attention.head_count_kv": [0 if mamba else config["num_key_value_heads"] for mamba in is_mamba],
                 "ssm.conv_kernel": config["mamba_d_conv"], "ssm.state_size": config["mamba_d_state"],
                 "ssm.group_count": config["mamba_n_groups"], "ssm.time_step_rank": config["mamba_n_heads"],
                 "ssm.inner_size": config["mamba_n_heads"] * config["mamba_d_head"]}
if arch != "llama":
    expected |= {"embedding_scale": config["embedding_multiplier"], "residual_scale": config["residual_multiplier"],
                 "attention.scale": config["attention_multiplier"], "logit_scale": config["logits_scaling"]}
for key, wanted in expected.items():
    found = value[key if key.startswith("general.") else f"{arch}.{key}"]
    assert found == wanted or abs(found - wanted) <= 1e-6 * abs(wanted), (key, found, wanted)
kinds = {"f32": (Q.F32, LlamaFileType.ALL_F32), "bf16": (Q.BF16, LlamaFileType.MOSTLY_BF16),
         "q8_0": (Q.Q8_0, LlamaFileType.MOSTLY_Q8_0)}
kind, file_type = kinds[name]
blocks = name != "q8_0" or hidden % 32 == 0

tokenizer = json.loads((folder / "tokenizer.json").read_text())
tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
assert len(tokens) == len(types) == rows
for token, id in tokenizer["model"]["vocab"].items():
    assert tokens[id] == token
new = [f"<|p:{i}|>" for i in range(5)]
assert tokens[first:first + 5] == new and set(types[first:first + 5]) == {TokenType.CONTROL}
assert [types[i] for i in range(5)] == [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED, TokenType.NORMAL]
assert value["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
assert (value["tokenizer.ggml.model"], value["tokenizer.ggml.pre"]) == ("gpt2", "refact")
assert value["tokenizer.ggml.eos_token_id"] == 2 and value["tokenizer.ggml.bos_token_id"] == 1
assert value["tokenizer.ggml.add_bos_token"] == bool(tokenizer["post_processor"])
assert "soft_prompt" in value["tokenizer.chat_template"]


def permute(rows, heads):
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def wanted_tensors():
    """The base's tensors under llama.cpp's names, and whether they are always in f32."""
    shexp = "_shexp" if experts else ""
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "shared_mlp.output_linear": f"ffn_down{shexp}",
             "block_sparse_moe.output_linear": "ffn_down_exps", "mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out"}
    exact = {"mamba.A_log": ("ssm_a", lambda a: -np.exp(a.reshape(-1, 1))),
             "mamba.D": ("ssm_d", lambda d: d.reshape(-1, 1)),
             "mamba.dt_bias": ("ssm_dt.bias", lambda b: b), "mamba.conv1d.bias": ("ssm_conv1d.bias", lambda b: b),
             "mamba.conv1d.weight": ("ssm_conv1d.weight", lambda w: w.reshape(w.shape[0], w.shape[2])),
             "mamba.norm.weight": ("ssm_norm.weight", lambda w: w.reshape(config["mamba_n_groups"], -1)),
             "block_sparse_moe.router.layer.weight": ("ffn_gate_inp.weight", lambda w: w)}
    for key, data in weights.items():
        if not key.startswith("model.layers."):
            continue
        _, _, layer, rest = key.split(".", 3)
        if rest in exact:
            name, change = exact[rest]
            yield f"blk.{layer}.{name}", change(data), True
            continue
        module, kind = rest.rsplit(".", 1)
        name = lambda part: f"blk.{layer}.{part}.{kind}"
        if module == "self_attn.q_proj":
            yield name("attn_q"), permute(data, heads), data.ndim == 1
        elif module == "self_attn.k_proj":
            yield name("attn_k"), permute(data, config["num_key_value_heads"]), data.ndim == 1
        elif module in ("shared_mlp.input_linear", "block_sparse_moe.input_linear"):
            ending = shexp if module == "shared_mlp.input_linear" else "_exps"
            gate, up = np.split(data, 2, axis=-2)
            yield name(f"ffn_gate{ending}"), gate, False
            yield name(f"ffn_up{ending}"), up, False
        else:
            yield name(parts[module]), data, data.ndim == 1
    yield "output_norm.weight", weights["model.norm.weight"], True


tensors = {tensor.name: tensor for tensor in reader.tensors}
read = lambda tensor: quants.dequantize(tensor.data, tensor.tensor_type).reshape(list(reversed(tensor.shape.tolist())))
tolerance = {"f32": 0, "bf16": 2**-8, "q8_0": 2**-7}[name]
seen = {"token_embd.weight", "output.weight"} | ({"rope_freqs.weight"} if arch == "llama" else set())
for key, data, vector in wanted_tensors():
    tensor = tensors[key]
    seen.add(key)
    assert tensor.tensor_type == (Q.F32 if vector else kind) or (tensor.tensor_type == Q.F16 and data.shape[-1] % 32), key
    worst = np.abs(read(tensor) - data).max()
    assert worst <= ((1e-6 if key.endswith("ssm_a") else 0) if vector else tolerance * np.abs(data).max()), (key, worst)
assert set(tensors) == seen, set(tensors) ^ seen
old = weights["model.embed_tokens.weight"][:first]
assert tensors["token_embd.weight"].tensor_type == {"q8_0": Q.F16}.get(name, kind)
assert np.abs(read(tensors["token_embd.weight"])[:first] - old).max() <= tolerance * np.abs(old).max()
head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])[:first]
assert np.abs(read(tensors["output.weight"])[:first] - head).max() <= tolerance * np.abs(head).max()
assert read(tensors["output.weight"]).shape == (rows, hidden)
if name != "q8_0" or blocks:
    assert value["general.file_type"] == file_type, value["general.file_type"]

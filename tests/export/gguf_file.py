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

arch = "llama" if config["model_type"] == "llama" else "granite"
hidden, heads = config["hidden_size"], config["num_attention_heads"]
head_dim = config.get("head_dim") or hidden // heads
rows = max(weights["model.embed_tokens.weight"].shape[0], first + 5)
expected = {
    "general.architecture": arch,
    "block_count": config["num_hidden_layers"],
    "context_length": config["max_position_embeddings"],
    "embedding_length": hidden,
    "feed_forward_length": config.get("shared_intermediate_size") or config["intermediate_size"],
    "attention.head_count": heads,
    "attention.head_count_kv": config["num_key_value_heads"],
    "attention.key_length": head_dim,
    "rope.dimension_count": head_dim,
    "rope.freq_base": config["rope_parameters"]["rope_theta"],
    "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    "vocab_size": rows,
}
if arch == "granite":
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
    """The base's tensors under llama.cpp's names."""
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "shared_mlp.output_linear": "ffn_down"}
    for key, data in weights.items():
        if not key.startswith("model.layers."):
            continue
        _, _, layer, rest = key.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        name = lambda part: f"blk.{layer}.{part}.{kind}"
        if module == "self_attn.q_proj":
            yield name("attn_q"), permute(data, heads)
        elif module == "self_attn.k_proj":
            yield name("attn_k"), permute(data, config["num_key_value_heads"])
        elif module == "shared_mlp.input_linear":
            gate, up = np.split(data, 2)
            yield name("ffn_gate"), gate
            yield name("ffn_up"), up
        else:
            yield name(parts[module]), data
    yield "output_norm.weight", weights["model.norm.weight"]


tensors = {tensor.name: tensor for tensor in reader.tensors}
read = lambda tensor: quants.dequantize(tensor.data, tensor.tensor_type).reshape(list(reversed(tensor.shape.tolist())))
tolerance = {"f32": 0, "bf16": 2**-8, "q8_0": 2**-7}[name]
seen = {"token_embd.weight", "output.weight"} | ({"rope_freqs.weight"} if arch == "llama" else set())
for key, data in wanted_tensors():
    tensor = tensors[key]
    seen.add(key)
    vector = data.ndim == 1
    assert tensor.tensor_type == (Q.F32 if vector else kind) or (tensor.tensor_type == Q.F16 and data.shape[-1] % 32), key
    worst = np.abs(read(tensor) - data).max()
    assert worst <= (0 if vector else tolerance * np.abs(data).max()), (key, worst)
assert set(tensors) == seen, set(tensors) ^ seen
old = weights["model.embed_tokens.weight"][:first]
assert tensors["token_embd.weight"].tensor_type == {"q8_0": Q.F16}.get(name, kind)
assert np.abs(read(tensors["token_embd.weight"])[:first] - old).max() <= tolerance * np.abs(old).max()
head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])[:first]
assert np.abs(read(tensors["output.weight"])[:first] - head).max() <= tolerance * np.abs(head).max()
assert read(tensors["output.weight"]).shape == (rows, hidden)
if name != "q8_0" or blocks:
    assert value["general.file_type"] == file_type, value["general.file_type"]

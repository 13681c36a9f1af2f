"""Writes tests/golden/checkpoints: one tiny Llama, read under many configurations by transformers.

    python tests/golden/checkpoints.py

Rotary scalings of every kind in both spellings, for sequences on both sides of the length at which `longrope` changes
its frequencies; a head of its own under `tie_word_embeddings`; other names of the activation. For each configuration
the losses, the gradient of a soft prompt and greedy continuations: each sequence alone behind the prompt, without a
cache and in a fresh model, so that neither a batch nor an earlier call decides which frequencies hold.
"""

import json
import random
import tempfile
from pathlib import Path

from oracle import quiet_and_deterministic, versions, write_json, write_tensors

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "checkpoints"
VIRTUAL, ORIGINAL, HALF = 3, 24, 4

BASE = dict(
    vocab_size=29, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)

SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.0, 2.0, 4.0, 7.0]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


def old(scaling, **beside):
    """The spelling of transformers 4: `rope_scaling` with `rope_theta` beside it."""
    return {"rope_parameters": None, "rope_theta": 1000.0, "rope_scaling": scaling, **beside}


def new(scaling, **beside):
    """The spelling of transformers 5."""
    return {"rope_parameters": {"rope_theta": 1000.0, **scaling}, **beside}


#: Name: changes of the configuration (None takes a key out), and tensors to leave out.
CASES = {
    "default": (new({"rope_type": "default"}), []),
    "linear": (new({"rope_type": "linear", "factor": 2.5}), []),
    "linear_old": (old({"type": "linear", "factor": 2.5}), []),
    "dynamic": (new({"rope_type": "dynamic", "factor": 2.0}), []),
    "dynamic_old": (old({"type": "dynamic", "factor": 4.0}), []),
    "yarn": (new(YARN), []),
    "yarn_old": (old({**YARN, "type": "yarn", "beta_fast": 8.0, "beta_slow": 0.5}), []),
    "yarn_attention_factor": (new({**YARN, "attention_factor": 0.7}), []),
    "yarn_mscale": (new({**YARN, "mscale": 1.2, "mscale_all_dim": 0.6, "truncate": False}), []),
    "longrope": (new({**LONGROPE, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}), []),
    "longrope_beside": (old(LONGROPE, original_max_position_embeddings=ORIGINAL), []),
    "longrope_attention_factor": (
        new({**LONGROPE, "attention_factor": 1.4, "original_max_position_embeddings": ORIGINAL}), []),
    "llama3": (
        old({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": ORIGINAL}), []),
    "tied_with_a_head": ({"tie_word_embeddings": True}, []),
    "tied": ({"tie_word_embeddings": True}, ["lm_head.weight"]),
    "tied_without_an_embedding": ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"]),
    "swish": ({"hidden_act": "swish"}, []),
}


def write_base():
    """The checkpoint that all cases share, with random weights."""
    torch.manual_seed(6)
    model = LlamaForCausalLM(LlamaConfig(**BASE))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0, 0.2) if "norm" in name else weight.normal_(0.0, 0.45)
    model.save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)


def configuration(changes):
    config = {**json.loads((HERE / "config.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not None}


def loader(config, drop, folder):
    """Writes a case's folder, and gives a function that reads it anew at each call."""
    (Path(folder) / "config.json").write_text(json.dumps(config))
    tensors = load_file(HERE / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in drop},
              f"{folder}/model.safetensors", metadata={"format": "pt"})
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def rows(model, prompt, ids):
    return torch.cat([prompt, model.get_input_embeddings()(torch.tensor(ids))])[None]


def losses(fresh, prompt, examples):
    """Cross-entropy of each target token, each example alone."""
    nll = []
    for example in examples:
        model, target = fresh(), example["target"]
        logits = model(inputs_embeds=rows(model, prompt, example["input"] + target)).logits[0]
        first = len(prompt) + len(example["input"]) - 1
        nll.append(torch.nn.functional.cross_entropy(
            logits[first : first + len(target)], torch.tensor(target), reduction="none"))
    return torch.cat(nll)


@torch.no_grad()
def greedy(fresh, prompt, ids, count):
    out = []
    for _ in range(count):
        model = fresh()
        best = model(inputs_embeds=rows(model, prompt, ids + out)).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, f"too close a choice: {best}"
        out.append(int(best.indices[0]))
    return out


def draw_examples():
    """Inputs that begin alike; with the virtual tokens 11, 24, 25, 46 and 12 positions."""
    draw = random.Random(7)
    ids = lambda n: [draw.randrange(BASE["vocab_size"]) for _ in range(n)]
    head = ids(2)
    return [{"input": head + ids(n), "target": ids(m)} for n, m in [(4, 2), (17, 2), (18, 2), (38, 3), (6, 1)]]


def case(name, changes, drop, examples, prompt, tensors):
    config = configuration(changes)
    with tempfile.TemporaryDirectory() as folder:
        fresh = loader(config, drop, folder)
        leaf = prompt.clone().requires_grad_()
        nll = losses(fresh, leaf, examples)
        nll.mean().backward()
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().mean() > 1e-5, leaf.grad
        tensors[f"{name}.grad"] = leaf.grad
        inputs = [examples[0]["input"], examples[3]["input"]]
        generated = [greedy(fresh, prompt, ids, 4) for ids in inputs]
    generate = [{"input": i, "generated": g} for i, g in zip(inputs, generated)]
    return {"name": name, "config": config, "drop": drop, "nll": nll.tolist(), "generate": generate}


def main():
    quiet_and_deterministic()
    HERE.mkdir(exist_ok=True)
    write_base()
    examples = draw_examples()
    prompt = torch.randn(VIRTUAL, BASE["hidden_size"], generator=torch.Generator().manual_seed(3)) * 0.5
    tensors = {"prompt": prompt}
    cases = [case(name, changes, drop, examples, prompt, tensors) for name, (changes, drop) in CASES.items()]
    # Cases that should differ do.
    losses_of = {c["name"]: c["nll"] for c in cases}
    alike = [{"default", "dynamic", "dynamic_old", "swish", "tied_with_a_head"}, {"linear", "linear_old"}]
    for i, a in enumerate(cases):
        for b in cases[i + 1 :]:
            distance = max(abs(x - y) for x, y in zip(losses_of[a["name"]], losses_of[b["name"]]))
            same = distance < 1e-6
            pair = {a["name"], b["name"]}
            assert same == any(pair <= group for group in alike), (pair, distance)
    write_json(HERE / "cases.json", {"versions": versions(), "virtual_tokens": VIRTUAL, "examples": examples, "cases": cases})
    write_tensors(HERE / "golden.safetensors", tensors)


if __name__ == "__main__":
    main()

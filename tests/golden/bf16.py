#!/usr/bin/env python3
"""How far PEFT in bf16 is from PEFT in f32: logits and the prompt's gradient, of every checkpoint here.

    python tests/golden/bf16.py --smollm2 PATH

Writes tests/golden/bf16.json, and tests/golden/smollm2/bf16.safetensors with the f32 gradients of the prompts that it
adds. The other f32 sides are generate.py's fixtures, which it reads; the bf16 side is the same model loaded with
dtype=torch.bfloat16 and the prompt in f32, as PEFT keeps it. An error is the norm of the difference over the norm of the
f32 side. One case says little of SmolLM2: its first position's activations are so large that a rounding there decides
the error of the gradient of the first two virtual tokens, to either side of bf16's. So there are seven.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from oracle import (
    collate, count_targets, prompt_of, quiet_and_deterministic, target_logits, versions, with_prompt, write_json,
    write_tensors,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
CHECKPOINTS = [
    "granite", "llama_bias", "hybrid_dense", "experts", "shared_experts", "mamba", "mamba_experts", "mamba_groups",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, required=True, metavar="PATH", help="SmolLM2-135M-Instruct as GGUF")
    args = parser.parse_args()
    quiet_and_deterministic()
    errors = {name: checkpoint(name, lambda dtype, name=name: load(HERE / name, dtype)) for name in CHECKPOINTS}
    path = args.smollm2
    fresh = lambda dtype: load(path.parent, dtype, gguf_file=path.name)
    errors["smollm2"] = {**checkpoint("smollm2", fresh), "more": more_prompts(fresh)}
    write_json(HERE / "bf16.json", {"versions": versions(), "errors": errors})
    print(json.dumps(errors, indent=1))
    return 0


def load(folder, dtype, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **kwargs)


def checkpoint(name, fresh):
    folder = HERE / name
    document, tensors = json.loads((folder / "cases.json").read_text()), load_file(folder / "golden.safetensors")
    case = document["cases"][0]
    (group,) = case["groups"]
    prompt, expected = tensors[group["prompt"]], tensors[group["grad"]]
    assert distance(run(fresh(torch.float32), prompt, group["examples"])[0], expected) < 1e-4, "another f32 side"
    gradient, logits = run(fresh(torch.bfloat16), prompt, group["examples"])
    found = {"case": case["name"], "gradient": distance(gradient, expected)}
    if "logits" in case:
        found["logits"] = distance(logits, tensors[case["logits"]])
    else:
        with torch.no_grad():
            base = fresh(torch.bfloat16).eval()
            rows = [base(input_ids=torch.tensor([s["ids"]])).logits[0, -1].float() for s in document["sequences"]]
        found["logits"] = distance(torch.stack(rows), tensors[document["last_logits"]])
    return found


def more_prompts(fresh):
    """The examples of the fixture behind other prompts: embeddings of random tokens."""
    document = json.loads((HERE / "smollm2" / "cases.json").read_text())
    examples = document["cases"][0]["groups"][0]["examples"]
    draw, cases, tensors = random.Random(7), [], {}
    for index, rows in enumerate([8, 8, 8, 20, 20, 20]):
        ids = [draw.randrange(100, 40000) for _ in range(rows)]
        base = fresh(torch.float32)
        prompt = base.get_input_embeddings().weight.detach()[ids].clone()
        expected, _ = run(base, prompt, examples)
        tensors[f"grad{index}"] = expected.clone()
        found, _ = run(fresh(torch.bfloat16), prompt, examples)
        cases.append({"prompt_ids": ids, "grad": f"grad{index}", "gradient": distance(found, expected)})
    write_tensors(HERE / "smollm2" / "bf16.safetensors", tensors)
    return cases


def run(base, prompt, examples):
    """Gradient in the prompt of the mean loss of the target tokens, and the logits that predict them."""
    model, batch = with_prompt(base, prompt), collate(examples)
    assert prompt_of(model).dtype == torch.float32
    labels = torch.cat([torch.full((len(examples), len(prompt)), -100), batch["labels"]], 1)
    logits = model(**batch).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    (loss / count_targets(examples)).backward()
    return prompt_of(model).grad, target_logits(model, examples, logits.detach())


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    sys.exit(main())

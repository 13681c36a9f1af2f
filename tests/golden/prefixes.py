"""Makes tests/golden/prefixes: prefix tuning by PEFT, losses and gradients of a batch and ten steps.

    python tests/golden/prefixes.py
"""

import torch

from generate import CHECKPOINTS, HERE, Draw, report
from oracle import (
    Run, collate, count_targets, load, prompt_of, quiet_and_deterministic, training_case, versions, with_prefix,
    write_json, write_tensors,
)

FOLDER = HERE / "prefixes"
NAMES = {"granite": (0.35, 0.163), "llama_bias": (2.534, 1.443), "hybrid_dense": (0.394, 0.25)}


def main():
    quiet_and_deterministic()
    FOLDER.mkdir(exist_ok=True)
    for name, norms in NAMES.items():
        write(name, norms)


def write(name, norms):
    folder, tensors = HERE / name, {}
    draw = Draw(CHECKPOINTS[name]["seed"] + 1000, folder)

    def fresh_base():
        return load(folder)

    runs = [Run("train_accumulate_1", 1, 3, norms[0]), Run("train_accumulate_4", 4, 2, norms[1])]
    document = {
        "versions": versions(), "checkpoint": name, "cases": [loss_case(draw, fresh_base(), tensors)],
        "training": [training_case(run, draw, fresh_base, tensors, with_prefix) for run in runs],
    }
    write_json(FOLDER / f"{name}.json", document)
    write_tensors(FOLDER / f"{name}.safetensors", tensors)
    report(name, document)


def loss_case(draw, base, tensors):
    """Loss, embeddings, their keys and values, and the gradient of these, of one batch; padded and one by one."""
    embeddings = draw.prompt(5)
    examples = draw.examples(draw.ids(3), [(4, 2), (17, 1), (9, 4), (6, 3), (12, 1)])
    total = count_targets(examples)
    model = with_prefix(base, embeddings).eval()
    weight = prompt_of(model)
    out = model(**collate(examples), num_items_in_batch=total)
    out.loss.backward()
    gradient = weight.grad.clone()
    weight.grad = None
    alone = [model(**collate([e]), num_items_in_batch=total).loss for e in examples]
    sum(alone).backward()
    assert torch.isfinite(gradient).all() and gradient.abs().mean() > 1e-6, gradient
    assert abs(sum(alone).item() - out.loss.item()) < 1e-5 * out.loss.item()
    worst = (weight.grad - gradient).abs().max() / gradient.abs().max()
    assert worst < 1e-4, f"padding changes the gradient by {worst}"
    tensors |= {"embeddings": embeddings, "prefix": weight.detach().clone(), "gradient": gradient}
    return {"name": "one_group", "examples": examples, "target_tokens": total, "loss": out.loss.item()}


if __name__ == "__main__":
    main()

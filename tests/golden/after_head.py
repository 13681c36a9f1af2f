"""Writes tests/golden/after_head: soft prompts that stand after the first tokens of every input.

    python tests/golden/after_head.py

PEFT puts virtual tokens before everything, so transformers alone is the oracle: each sequence is given as `inputs_embeds`,
the embeddings of the tokens before the prompt, the prompt, and the embeddings of the other tokens. Each sequence is alone,
without padding and without a cache. The checkpoints are those of `granite/` and `mamba_experts/`.
"""

import random
from pathlib import Path

from oracle import check_loss, load, quiet_and_deterministic, versions, write_json, write_tensors

import torch

HERE = Path(__file__).resolve().parent
CHECKPOINTS = ["granite", "mamba_experts"]
NEW_TOKENS = 6

#: Name: for each group the number of tokens before the prompt, of virtual tokens, and of tokens that the inputs share after
#: the prompt; and the numbers of own input and target tokens of each example.
CASES = {
    "one_group": [(3, 5, 2, [(4, 2), (1, 1), (7, 3)])],
    "no_shared_tokens": [(1, 4, 0, [(3, 1), (5, 2)])],
    "two_groups": [(3, 5, 2, [(4, 2), (2, 1)]), (2, 7, 0, [(6, 3), (3, 2), (1, 1)])],
    "after_and_at_the_start": [(4, 3, 1, [(2, 2), (5, 1)]), (0, 6, 2, [(3, 2), (4, 1)])],
}


class Draw:
    """Random token ids and prompts of a checkpoint."""

    def __init__(self, model, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.embedding = model.get_input_embeddings().weight.detach()

    def ids(self, count):
        return [self.random.randrange(len(self.embedding)) for _ in range(count)]

    def prompt(self, rows):
        noise = torch.randn(rows, self.embedding.shape[1], generator=self.generator)
        return noise * self.embedding.std()

    def distinct(self, count):
        """Own tokens of examples begin with different ids, so that inputs share no more than they are meant to."""
        return self.random.sample(range(len(self.embedding)), count)


def embeddings(model, prompt, before, ids):
    """The rows of a sequence whose first tokens are those before the prompt."""
    tokens = model.get_input_embeddings()(torch.tensor(ids))
    return torch.cat([tokens[:before], prompt, tokens[before:]])[None]


def loss_case(model, name, groups, draw, tensors):
    total, loss, logits, described, targets = 0, 0.0, [], [], []
    drawn = []
    for before, virtual, shared, lengths in groups:
        head, firsts = draw.ids(before + shared), draw.distinct(len(lengths))
        examples = [{"input": head + [first] + draw.ids(own - 1), "target": draw.ids(target)}
                    for first, (own, target) in zip(firsts, lengths)]
        drawn.append((before, draw.prompt(virtual), examples))
        total += sum(len(e["target"]) for e in examples)
    for index, (before, prompt, examples) in enumerate(drawn):
        leaf = prompt.clone().requires_grad_()
        for e in examples:
            rows = model(inputs_embeds=embeddings(model, leaf, before, e["input"] + e["target"])).logits[0]
            first = len(prompt) + len(e["input"]) - 1
            rows = rows[first : first + len(e["target"])]
            part = torch.nn.functional.cross_entropy(rows, torch.tensor(e["target"]), reduction="sum") / total
            part.backward()
            loss += part.item()
            logits.append(rows.detach())
            targets += e["target"]
        keys = {"prompt": f"{name}.prompt{index}", "grad": f"{name}.grad{index}"}
        tensors[keys["prompt"]], tensors[keys["grad"]] = prompt, leaf.grad
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().mean() > 1e-5, leaf.grad
        described.append({**keys, "before": before, "examples": examples})
    logits = torch.cat(logits)
    check_loss(loss, logits, targets)
    tensors[f"{name}.logits"] = logits
    return {"name": name, "groups": described, "loss": loss, "logits": f"{name}.logits"}


@torch.no_grad()
def generate_case(model, draw, tensors):
    """Greedy continuations after one prompt in two places: after tokens, and at the start."""
    prompt, before = draw.prompt(5), draw.ids(3)
    tensors["generate.prompt"] = prompt
    sequences = []
    for length in [1, 2, 6, 9]:
        tokens, found = before + draw.ids(length), {}
        for key, place in [("generated", len(before)), ("at_the_start", 0)]:
            found[key] = []
            for _ in range(NEW_TOKENS):
                rows = embeddings(model, prompt, place, tokens + found[key])
                best = model(inputs_embeds=rows, use_cache=False).logits[0, -1].topk(2)
                assert best.values[0] - best.values[1] > 1e-3, f"too close a choice: {best}"
                found[key].append(int(best.indices[0]))
        log_p = torch.log_softmax(model(inputs_embeds=embeddings(model, prompt, len(before), tokens)).logits[0].double(), -1)
        # The row that predicts a token before the prompt is one earlier; from the first after it there are virtual tokens between.
        rows = [i - 1 if i < len(before) else i - 1 + len(prompt) for i in range(1, len(tokens))]
        logprobs = [log_p[row, tokens[i + 1]].item() for i, row in enumerate(rows)]
        sequences.append({"input": tokens, **found, "logprobs": logprobs})
    assert any(s["generated"] != s["at_the_start"] for s in sequences), "a place that changes nothing shows nothing"
    return {"prompt": "generate.prompt", "before": len(before), "sequences": sequences}


def main():
    quiet_and_deterministic()
    for seed, name in enumerate(CHECKPOINTS, 31):
        model = load(HERE / name).eval()
        model.requires_grad_(False)
        draw, tensors = Draw(model, seed), {}
        cases = [loss_case(model, case, groups, draw, tensors) for case, groups in CASES.items()]
        generate = generate_case(model, draw, tensors)
        folder = HERE / "after_head"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", {"versions": versions(), "cases": cases, "generate": generate})
        write_tensors(folder / f"{name}.safetensors", tensors)


if __name__ == "__main__":
    main()

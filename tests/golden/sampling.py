"""What transformers' logits processors and warpers leave of some logits: tests/golden/sampling.json.

    .venv/bin/python tests/golden/sampling.py
"""

import json
import pathlib

import torch
import transformers
from transformers import generation


def case(name, size, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, text=(), forbidden=(), spread=2.0, seed=0, min_p=0.0):
    torch.manual_seed(seed)
    logits = (torch.randn(size) * spread).float()
    steps = generation.LogitsProcessorList()
    if penalty != 1.0:
        steps.append(generation.RepetitionPenaltyLogitsProcessor(penalty))
    if forbidden:
        steps.append(generation.SuppressTokensLogitsProcessor(list(forbidden)))
    if temperature != 1.0:
        steps.append(generation.TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(generation.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(generation.TopPLogitsWarper(top_p))
    if min_p:
        steps.append(generation.MinPLogitsWarper(min_p))
    scores = steps(torch.tensor([list(text) or [0]]), logits[None])[0].double()
    return {
        "name": name,
        "logits": [float(v) for v in logits],
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
        "text": list(text),
        "forbidden": list(forbidden),
        "probabilities": [float(f"{float(p):.9g}") for p in scores.softmax(-1)],
    }


cases = [
    case("as it is", 50),
    case("hot", 50, temperature=1.7),
    case("cold", 50, temperature=0.2),
    case("top 1", 50, top_k=1),
    case("top 5", 50, top_k=5, temperature=0.7),
    case("more than all", 20, top_k=100),
    case("nucleus", 50, top_p=0.9),
    case("small nucleus", 50, top_p=0.05, seed=1),
    case("flat nucleus beyond the first look", 400, top_p=0.95, spread=0.1),
    case("top 10, then nucleus of what is left", 50, top_k=10, top_p=0.6, seed=2),
    case("penalty", 50, penalty=1.5, text=[3, 7, 7, 11, 40], seed=3),
    case("reward", 50, penalty=0.8, text=[3, 7, 40], seed=4),
    case("forbidden", 50, forbidden=[0, 1, 2, 30], seed=5),
    case("min_p", 50, min_p=0.1, seed=7),
    case("min_p of all", 20, min_p=1.0, seed=8),
    case("min_p that leaves all", 30, min_p=0.001, spread=0.5, seed=9),
    case("min_p, hot", 50, temperature=1.8, min_p=0.2, seed=10),
    case("nucleus, then min_p", 50, top_p=0.9, min_p=0.15, seed=11),
    case("top 5, then min_p, with a penalty", 50, 0.7, 5, 1.0, 1.3, [2, 4, 6], min_p=0.05, seed=12),
    case("all at once, with min_p", 200, 0.8, 40, 0.95, 1.2, [5, 6, 7, 100], [9, 10], seed=13, min_p=0.02),
    case("all at once", 200, 0.8, 40, 0.9, 1.2, [5, 6, 7, 100, 150], [9, 10], seed=6),
]
made = {"made_with": {"transformers": transformers.__version__, "torch": torch.__version__}, "cases": cases}
path = pathlib.Path(__file__).with_name("sampling.json")
path.write_text(json.dumps(made, indent=1) + "\n")
print(f"{len(cases)} cases, {path.stat().st_size} bytes")

"""Writes choices.json: answers that have to be one of some token sequences, as transformers' generate gives them greedily when its
prefix_allowed_tokens_fn allows nothing else, with the log-probabilities of their tokens among all tokens.

    python tests/golden/choices.py
"""

import json
import pathlib
import random

import torch
from oracle import load, quiet_and_deterministic, versions
from safetensors.torch import load_file

FOLDER = pathlib.Path(__file__).parent
END = 3


def answer(model, rows, choices):
    """Greedy tokens without the end token, and their log-probabilities; `rows` [T, C] stand for prompt and text."""

    def allowed(_, generated):
        so_far = generated.tolist()
        fitting = [choice for choice in choices if choice[: len(so_far)] == so_far]
        after = {choice[len(so_far)] for choice in fitting if len(choice) > len(so_far)}
        return sorted(after | ({END} if so_far in choices else set())) or [END]

    out = model.generate(
        inputs_embeds=rows[None], attention_mask=torch.ones(1, len(rows), dtype=torch.long), do_sample=False, use_cache=False,
        max_new_tokens=8, eos_token_id=END, pad_token_id=0, prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True, output_logits=True)
    tokens = out.sequences[0].tolist()
    assert tokens[-1] == END and tokens[:-1] in choices, (tokens, choices)
    logprobs = [logits[0].double().log_softmax(-1)[token].item() for logits, token in zip(out.logits, tokens)]
    return tokens[:-1], logprobs[:-1]


def draw(numbers, vocabulary, at_least):
    """Choices of 1 to 4 tokens, one of which begins another."""
    choices = [[numbers.randrange(4, vocabulary) for _ in range(numbers.randint(1, 4))] for _ in range(at_least)]
    choices.append(choices[0] + [numbers.randrange(4, vocabulary) for _ in range(2)])
    choices.append(choices[1][:1])
    return [list(choice) for choice in dict.fromkeys(map(tuple, choices))]


def main():
    quiet_and_deterministic()
    numbers, cases = random.Random(5), []
    for name in ("granite", "llama_bias"):
        document = json.loads((FOLDER / name / "cases.json").read_text())["generate"]
        prompt = load_file(FOLDER / name / "golden.safetensors")[document["prompt"]]
        model = load(FOLDER / name).eval()
        embed = model.get_input_embeddings()
        for sequence in document["sequences"]:
            for with_prompt in (False, True):
                rows = embed(torch.tensor(sequence["input"])).detach()
                rows = torch.cat([prompt, rows]) if with_prompt else rows
                choices = draw(numbers, model.config.vocab_size, 5)
                tokens, logprobs = answer(model, rows, choices)
                cases.append({"checkpoint": name, "prompt": with_prompt, "input": sequence["input"], "choices": choices,
                              "answer": tokens, "logprobs": logprobs})
    prefixes = sum(any(c != case["answer"] and c[: len(case["answer"])] == case["answer"] for c in case["choices"]) for case in cases)
    longer = sum(any(c != case["answer"] and case["answer"][: len(c)] == c for c in case["choices"]) for case in cases)
    print(f"{len(cases)} cases; {prefixes} answers begin another choice, {longer} begin with another")
    path = FOLDER / "choices.json"
    path.write_text(json.dumps({"made_with": versions(), "end": END, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Distillation of a long text into a prompt, by transformers and PEFT.

    python tests/golden/distillation.py

Writes tests/golden/distillation/NAME.json and NAME.safetensors for a dense checkpoint and two with Mamba2 layers. The teacher is the
base model that reads a text before each input; the student is PEFT's prompt tuning, which reads the input alone. The loss
of a target row is KL(teacher || student) over the vocabulary, taken in f64 from both logits in f32. A student's input and
the teacher's differ in the first token too, as a tokenizer makes another token of a word that follows a space.

The losses and the gradient are also taken by torch's own `kl_div` in f32, without padding, and have to agree.
"""

import random
import sys
from pathlib import Path

import torch
from oracle import (
    TRAINING, collate, count_targets, load, prompt_of, quiet_and_deterministic, target_logits, versions, with_prompt,
    write_json, write_tensors,
)
import transformers

HERE = Path(__file__).resolve().parent
# Lengths of input and target; a text of more than 64 tokens is more than a chunk of a scan.
LENGTHS = [(4, 2), (17, 1), (9, 4), (6, 3), (12, 1), (3, 2), (30, 2), (5, 1)]
TEXT = 83
CHECKPOINTS = {"granite": (71, 0.4), "mamba": (76, 1.3), "mamba_groups": (73, 0.8)}


def main():
    quiet_and_deterministic()
    (HERE / "distillation").mkdir(exist_ok=True)
    for name, (seed, max_norm) in CHECKPOINTS.items():
        tensors = {}
        document = {"versions": versions(), "checkpoint": name, **case(name, seed, max_norm, tensors)}
        write_json(HERE / "distillation" / f"{name}.json", document)
        write_tensors(HERE / "distillation" / f"{name}.safetensors", tensors)
        losses = " ".join(f"{step['loss']:.4f}" for step in document["steps"])
        norms = " ".join(f"{step['grad_norm']:.3f}" for step in document["steps"])
        print(f"{name}: loss {document['loss']:.4f}; steps {losses}; gradient norms {norms}")
    return 0


def case(name, seed, max_norm, tensors):
    draw = random.Random(seed)
    base = load(HERE / name).eval()
    embedding = base.get_input_embeddings().weight
    vocab, hidden = embedding.shape
    ids = lambda count: [draw.randrange(vocab) for _ in range(count)]
    bos, text, first, shared = ids(1), ids(TEXT), draw.sample(range(vocab), 2), ids(2)
    examples, teacher = [], []
    for start, (n_input, n_target) in zip(draw.sample(range(vocab), len(LENGTHS)), LENGTHS):
        own, target = [*shared, start, *ids(n_input - 1)], ids(n_target)
        examples.append({"input": [*bos, first[0], *own], "target": target})
        teacher.append({"input": [*bos, *text, first[1], *own], "target": target})
    generator = torch.Generator().manual_seed(seed)
    prompt = embedding.std().item() * torch.randn((6, hidden), generator=generator)

    model = with_prompt(load(HERE / name), prompt)
    with torch.no_grad():
        of_teacher = [teacher_logits(base, [e]) for e in teacher]
    rows = divergences(student_logits(model, examples), torch.cat(of_teacher))
    rows.mean().backward()
    gradient = prompt_of(model).grad.clone()
    check(model, examples, of_teacher, rows.detach(), gradient)
    tensors["prompt"], tensors["grad"] = prompt, gradient
    document = {"max_norm": max_norm, "examples": examples, "teacher": teacher, "prompt": "prompt", "grad": "grad",
                "losses": rows.tolist(), "loss": rows.mean().item()}
    document["steps"] = train(name, prompt, (examples, of_teacher, draw), max_norm, tensors)
    return {**TRAINING, **document, "final_prompt": "final_prompt"}


def teacher_logits(base, examples):
    """Rows of the logits that predict target tokens, of the base model without a prompt."""
    batch = collate(examples)
    logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = [logits[i, len(e["input"]) - 1 : len(e["input"]) + len(e["target"]) - 1] for i, e in enumerate(examples)]
    return torch.cat(rows)


def student_logits(model, examples):
    batch = collate(examples)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return target_logits(model, examples, out.logits)


def divergences(student, teacher):
    """KL(teacher || student) of each row, f64."""
    log_q, log_p = (torch.log_softmax(logits.double(), dim=-1) for logits in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def check(model, examples, of_teacher, rows, gradient):
    """The second way: torch's kl_div in f32, one example at a time without padding."""
    prompt_of(model).grad = None
    found = []
    for example, teacher in zip(examples, of_teacher):
        log_q, log_p = (torch.log_softmax(l, dim=-1) for l in (student_logits(model, [example]), teacher))
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        found.append(kl.detach())
        (kl.sum() / len(rows)).backward()
    assert (torch.cat(found) - rows).abs().max() < 1e-4 * rows.max(), (found, rows)
    assert rows.min() > 1e-3 and torch.isfinite(gradient).all() and gradient.abs().mean() > 1e-5, (rows, gradient)
    worst = (prompt_of(model).grad - gradient).abs().max() / gradient.abs().max()
    assert worst < 1e-4, f"the second way gives another gradient by {worst}"


def train(name, start, data, max_norm, tensors):
    """Ten optimizer steps of four examples, as oracle.py's training_case takes them."""
    examples, of_teacher, draw = data
    model = with_prompt(load(HERE / name), start).train()
    weight = prompt_of(model)
    optimizer = torch.optim.AdamW([weight], lr=TRAINING["learning_rate"], betas=tuple(TRAINING["betas"]),
                                  eps=TRAINING["eps"], weight_decay=TRAINING["weight_decay"], foreach=False)
    steps = TRAINING["num_training_steps"]
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, TRAINING["num_warmup_steps"], steps)
    records = []
    for _ in range(steps):
        batch = draw.sample(range(len(examples)), 4)
        chosen = [examples[i] for i in batch]
        optimizer.zero_grad()
        loss = divergences(student_logits(model, chosen), torch.cat([of_teacher[i] for i in batch])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], max_norm).item()
        records.append({"micro_batches": [batch], "target_tokens": count_targets(chosen), "loss": loss.item(),
                        "grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
    tensors["final_prompt"] = weight.detach().clone()
    return records


if __name__ == "__main__":
    sys.exit(main())

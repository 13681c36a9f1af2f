"""What the fixtures need of transformers and PEFT: models with a prompt, examples, loss, training, generation.

Each function that makes a fixture also asserts it by a second way (f64, no padding, no cache), so
that a mistake of the oracle's use can't become a golden.
"""

import json
import math
import os
import platform
import re
import warnings
from dataclasses import dataclass

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Position ids are not supported")

import peft
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

IGNORE = -100  # the label that transformers' loss leaves out
TRAINING = dict(
    optimizer="adamw", learning_rate=0.01, betas=[0.9, 0.98], eps=1e-7, weight_decay=0.03,
    schedule="linear", num_warmup_steps=2, num_training_steps=10,
)


def quiet_and_deterministic():
    """One thread, deterministic kernels, no progress bars."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__}


def load(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **kwargs)
    if has_experts(model):
        model.set_experts_implementation("eager")
    return model


def has_experts(model):
    return getattr(model.config, "num_local_experts", 0) > 0


def with_prompt(base, prompt):
    """PEFT's model over `base`, its prompt set to the matrix `prompt`."""
    rows, width = prompt.shape
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=rows)
    model = get_peft_model(base, config)
    weight = prompt_of(model)
    assert weight.shape == (rows, width)
    with torch.no_grad():
        weight.copy_(prompt)
    return model.eval()


def with_prefix(base, prompt):
    """PEFT's prefix tuning over `base`, starting from the keys and values that it makes of the embeddings `prompt`."""
    with torch.no_grad():
        cache = base(inputs_embeds=prompt[None], use_cache=True).past_key_values
    parts = [half[0].transpose(0, 1).flatten(1) for layer in cache.layers for half in (layer.keys, layer.values)]
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=prompt.shape[0])
    model = get_peft_model(base, config)
    with torch.no_grad():
        prompt_of(model).copy_(torch.cat(parts, 1))
    return model


def prompt_of(model):
    return model.prompt_encoder["default"].embedding.weight


# ---------------------------------------------------------------- examples and loss


def collate(examples):
    """A right-padded batch; only target tokens carry labels."""
    width = max(len(e["input"]) + len(e["target"]) for e in examples)
    ids, mask, labels = [], [], []
    for e in examples:
        n_input, n_target = len(e["input"]), len(e["target"])
        pad = width - n_input - n_target
        ids.append(e["input"] + e["target"] + [0] * pad)
        mask.append([1] * (n_input + n_target) + [0] * pad)
        labels.append([IGNORE] * n_input + e["target"] + [IGNORE] * pad)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def count_targets(examples):
    return sum(len(e["target"]) for e in examples)


def target_logits(model, examples, logits):
    """The rows of `logits` that predict target tokens, example by example, [n_target_tokens, V]."""
    virtual = prompt_of(model).shape[0]
    rows = []
    for index, e in enumerate(examples):
        first = virtual + len(e["input"]) - 1
        rows.append(logits[index, first : first + len(e["target"])])
    return torch.cat(rows)


def loss_case(name, groups, fresh_base, tensors, keep_logits=True):
    """Loss, logits and gradients of prefix groups [(prompt, examples)], run by PEFT as one batch a group."""
    total = sum(count_targets(examples) for _, examples in groups)
    loss, logits, described = 0.0, [], []
    for index, (prompt, examples) in enumerate(groups):
        model = with_prompt(fresh_base(), prompt)
        out = model(**collate(examples), num_items_in_batch=total)
        out.loss.backward()
        loss += out.loss.item()
        logits.append(target_logits(model, examples, out.logits.detach()))
        gradient = prompt_of(model).grad
        check_unpadded(model, examples, total, gradient.clone())
        keys = {"prompt": f"{name}.prompt{index}", "grad": f"{name}.grad{index}"}
        tensors[keys["prompt"]], tensors[keys["grad"]] = prompt, gradient
        described.append({**keys, "num_virtual_tokens": prompt.shape[0], "examples": examples})
    logits = torch.cat(logits)
    check_loss(loss, logits, [t for _, examples in groups for e in examples for t in e["target"]])
    case = {"name": name, "groups": described, "target_tokens": total, "loss": loss}
    if keep_logits:
        case["logits"] = f"{name}.logits"
        tensors[case["logits"]] = logits
    return case


def check_unpadded(model, examples, total, gradient):
    """Asserts that the padded batch gave the gradient of the examples run one by one, and one worth testing.

    Experts run in transformers' default way then, all at once, which is another than `load` sets.
    """
    prompt_of(model).grad = None
    if has_experts(model.get_base_model()):
        model.get_base_model().set_experts_implementation("grouped_mm")
    for e in examples:
        model(**collate([e]), num_items_in_batch=total).loss.backward()
    assert torch.isfinite(gradient).all() and gradient.abs().mean() > 1e-5, gradient
    worst = (prompt_of(model).grad - gradient).abs().max() / gradient.abs().max()
    assert worst < 1e-4, f"padding changes the gradient by {worst}"


def check_loss(loss, logits, targets):
    """Asserts that transformers' loss is the mean of the cross entropies, taken here in f64."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    mean = -log_p[torch.arange(len(targets)), torch.tensor(targets)].mean().item()
    assert abs(mean - loss) < 1e-5 * abs(mean), (mean, loss)


@dataclass
class Run:
    """A training run: each step takes `micro_batches` batches of `size` examples and clips at `max_norm`."""

    name: str
    micro_batches: int
    size: int
    max_norm: float


def training_case(run, draw, fresh_base, tensors, tuned=with_prompt):
    """Ten optimizer steps, with the loss of each taken over all its target tokens, as transformers' Trainer does.

    `tuned` makes PEFT's model of a base and a matrix of embeddings from which its prompt starts.
    """
    name = run.name
    pool = draw.examples(draw.ids(2), [(draw.random.randint(3, 11), draw.random.randint(1, 3)) for _ in range(12)])
    model = tuned(fresh_base(), draw.prompt(6)).train()
    start = prompt_of(model).detach().clone()
    tensors[f"{name}.prompt"] = start
    weight = prompt_of(model)
    records = train(run, draw, pool, model, [weight])
    tensors[f"{name}.final_prompt"] = weight.detach().clone()
    return {"name": name, **TRAINING, "max_norm": run.max_norm, "prompt": f"{name}.prompt",
            "final_prompt": f"{name}.final_prompt", "num_virtual_tokens": start.shape[0],
            "examples": pool, "steps": records}


def train(run, draw, pool, model, parameters):
    """The steps of `run` over the examples of `pool`: batches, losses, norms of the gradient of `parameters`."""
    optimizer = torch.optim.AdamW(parameters, lr=TRAINING["learning_rate"], betas=tuple(TRAINING["betas"]),
                                  eps=TRAINING["eps"], weight_decay=TRAINING["weight_decay"], foreach=False)
    steps = TRAINING["num_training_steps"]
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, TRAINING["num_warmup_steps"], steps)
    records = []
    for _ in range(steps):
        batches = [draw.random.sample(range(len(pool)), run.size) for _ in range(run.micro_batches)]
        total = count_targets([pool[i] for batch in batches for i in batch])
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = model(**collate([pool[i] for i in batch]), num_items_in_batch=total).loss
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.max_norm).item()
        records.append({"micro_batches": batches, "target_tokens": total, "loss": loss,
                        "grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
    norms = sorted(r["grad_norm"] for r in records)
    assert norms[1] < run.max_norm < norms[-2], f"clipping at {run.max_norm} has to bite in some steps only: {norms}"
    return records


def generate_case(draw, fresh_base, tensors):
    """Greedy continuations of four inputs under one prompt, each generated alone."""
    name, new_tokens = "generate", 6
    prompt = draw.prompt(5)
    tensors[f"{name}.prompt"] = prompt
    base = fresh_base()
    # A step of transformers' decoding does not clamp the time step of a Mamba2 layer; a full pass does.
    clamped = math.isfinite(getattr(base.config, "time_step_limit", (0.0, math.inf))[1])
    base.generation_config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=not clamped)
    model = with_prompt(base, prompt)
    sequences = []
    for length in (1, 4, 9, 16):
        ids = draw.ids(length)
        context = torch.tensor([ids])
        out = model.generate(input_ids=context, attention_mask=torch.ones_like(context))
        generated = out[0, length:].tolist()
        assert len(generated) == new_tokens, generated
        check_greedy(model, ids, generated)
        sequences.append({"input": ids, "generated": generated})
    return {"prompt": f"{name}.prompt", "num_virtual_tokens": prompt.shape[0],
            "max_new_tokens": new_tokens, "sequences": sequences}


@torch.no_grad()
def check_greedy(model, ids, generated):
    """Asserts that full forward passes choose the same tokens, each by a clear margin."""
    for step, token in enumerate(generated):
        context = torch.tensor([ids + generated[:step]])
        best = model(input_ids=context, attention_mask=torch.ones_like(context)).logits[0, -1].topk(2)
        assert best.indices[0] == token, (best, token)
        assert best.values[0] - best.values[1] > 1e-3, f"too close a choice: {best}"


# ---------------------------------------------------------------- files


def write_json(path, document):
    """Indented JSON with lists of numbers on one line."""
    text = json.dumps(document, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r",\s+", ", ", m[1]) + "]", text)
    assert json.loads(text) == document
    path.write_text(text + "\n")


def write_tensors(path, tensors):
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all(), name
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)

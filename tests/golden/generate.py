"""Writes the fixtures of tests/golden with the oracle: Hugging Face transformers and PEFT.

    python tests/golden/generate.py [--only granite ...] [--smollm2 DIR_OR_GGUF]

Small random checkpoints, and for each the loss, logits, prompt gradient, training runs and greedy
generation that PEFT's prompt tuning gives on them. README.md says what each file holds. Everything
runs on one thread in f32 with fixed seeds, so a second run writes the same bytes.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import mixers
from oracle import (
    Run, generate_case, load, loss_case, quiet_and_deterministic, training_case, versions, with_prompt,
    write_json, write_tensors,
)

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent

# The vocabulary sizes equal no other dimension: PEFT finds the embeddings by their number of rows.
CHECKPOINTS = {
    "granite": dict(
        seed=11,
        config=transformers.GraniteConfig(
            vocab_size=131, hidden_size=40, intermediate_size=57, num_hidden_layers=3,
            num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=256,
            rms_norm_eps=1e-5, tie_word_embeddings=True, embedding_multiplier=3.5,
            residual_multiplier=0.37, attention_multiplier=0.21, logits_scaling=2.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        stds=(0.25, 0.35), max_norms=(3.0, 1.8),
    ),
    "llama_bias": dict(
        seed=22,
        config=transformers.LlamaConfig(
            vocab_size=149, hidden_size=42, intermediate_size=53, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=256,
            rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
            # Of the five wavelengths 6.3, 40, 250, 1577 and 9953 the first is kept, the second
            # interpolated and the others divided: all three branches of the formula.
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        ),
        stds=(0.4, 0.2), max_norms=(6.0, 3.0),
    ),
    "hybrid_dense": dict(
        seed=33,
        config=transformers.GraniteMoeHybridConfig(
            vocab_size=127, hidden_size=48, intermediate_size=64, shared_intermediate_size=45,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, rms_norm_eps=1e-3, tie_word_embeddings=True,
            embedding_multiplier=2.5, residual_multiplier=0.31, attention_multiplier=0.17,
            logits_scaling=1.7, num_local_experts=0, num_experts_per_tok=0, mamba_n_heads=4,
            layer_types=["attention"] * 4, position_embedding_type="rope",
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
        stds=(0.25, 0.35), max_norms=(5.0, 4.7),
    ),
    **mixers.CHECKPOINTS,
}

ADAPTER_BASE = "tests/golden/granite"

# Texts for SmolLM2, with the ids that its own tokenizer gives (every digit is a token).
SMOLLM2_SEQUENCES = [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    (
        "Gneiss forms when granite is squeezed and heated.\nThe bands in it are",
        [55, 662, 774, 2717, 645, 24361, 314, 37842, 284, 12150, 30, 198, 504, 12299, 281, 357, 359],
    ),
    (
        "def area(width, height):\n    return width *",
        [1604, 1557, 24, 6930, 28, 4614, 727, 472, 1003, 8068, 1672],
    ),
    (
        "In 1987 the shop washed 2,450 dogs, of which  36 were poodles; by 1990 it washed twice as many",
        [788, 216, 33, 41, 40, 39, 260, 6434, 16102, 216, 34, 28, 36, 37, 32, 5046, 28, 282, 527, 256,
         35, 38, 592, 273, 25655, 43, 411, 216, 33, 41, 41, 32, 357, 16102, 6757, 347, 800],
    ),
]
SMOLLM2_INIT = ("Say 1 if the customer is content", [36218, 216, 33, 585, 260, 7742, 314, 2627])
SMOLLM2_EXAMPLES = [
    # "Comment: The poodle came home shining.\nSatisfaction:\n" and "1", "<|im_end|>"
    dict(input=[30770, 42, 378, 273, 25325, 2422, 1478, 23952, 30, 198, 67, 15097, 24380, 42, 198],
         target=[33, 2]),
    # "Comment: They were late and rude.\nSatisfaction:\n" and "0", "<|im_end|>"
    dict(input=[30770, 42, 1069, 592, 3008, 284, 30879, 30, 198, 67, 15097, 24380, 42, 198],
         target=[32, 2]),
    # "Comment: It cost 45 dollars and the ears were still dirty, so we left.\nSatisfaction:\n", "0"
    dict(input=[30770, 42, 657, 1708, 216, 36, 37, 8358, 284, 260, 10006, 592, 1361, 16528, 28, 588,
                392, 2049, 30, 198, 67, 15097, 24380, 42, 198],
         target=[32, 2]),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CHECKPOINTS, "smollm2"], help="write these alone")
    parser.add_argument("--smollm2", type=Path, metavar="PATH",
                        help="SmolLM2-135M-Instruct as GGUF, or the folder that holds the one GGUF file")
    args = parser.parse_args()
    quiet_and_deterministic()
    wanted = args.only or [*CHECKPOINTS, "smollm2"]
    for name in [name for name in CHECKPOINTS if name in wanted]:
        write_checkpoint(name)
        write_cases(name)
    if not args.only:
        write_schedules()
    if "granite" in wanted:
        write_adapter()
    if "smollm2" in wanted:
        if args.smollm2 is None:
            print("smollm2: skipped, no --smollm2 PATH")
        else:
            write_smollm2(args.smollm2)
    return 0


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(name):
    """config.json, config.hub.json and model.safetensors of a random checkpoint."""
    folder, spec = HERE / name, CHECKPOINTS[name]
    model = AutoModelForCausalLM.from_config(spec["config"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(spec["seed"])
    embedding_std, linear_std = spec["stds"]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            special = mixers.value(key, noise, generator)
            if special is not None:
                parameter.copy_(special)
            elif "norm" in key:
                parameter.copy_(1.0 + 0.25 * noise)
            elif key.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            elif "embed_tokens" in key or "lm_head" in key:
                parameter.copy_(embedding_std * noise)
            else:
                parameter.copy_(linear_std * noise)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    write_hub_config(folder)


def write_hub_config(folder):
    """The same configuration in the spelling of the checkpoints on the hub (transformers 4)."""
    config, saved = json.loads((folder / "config.json").read_text()), AutoConfig.from_pretrained(folder)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if "layer_types" in config:
        spelling = {"full_attention": "attention", "linear_attention": "mamba"}
        config["layer_types"] = [spelling[kind] for kind in config["layer_types"]]
    if math.inf in saved.to_dict().get("time_step_limit", ()):
        del config["time_step_limit"]  # transformers 5 writes the infinity in a form of its own
    write_json(folder / "config.hub.json", config)
    with tempfile.TemporaryDirectory() as other:
        shutil.copy(folder / "config.hub.json", Path(other) / "config.json")
        hub = AutoConfig.from_pretrained(other)
    assert saved.to_diff_dict() == hub.to_diff_dict(), (saved, hub)


# ---------------------------------------------------------------- the cases of a checkpoint


class Draw:
    """Draws token ids and prompts for one checkpoint."""

    def __init__(self, seed, folder):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        embedding = load(folder).get_input_embeddings().weight
        (self.vocab, self.hidden), self.scale = embedding.shape, embedding.std().item()

    def ids(self, count):
        return [self.random.randrange(self.vocab) for _ in range(count)]

    def prompt(self, rows):
        return self.scale * torch.randn((rows, self.hidden), generator=self.generator)

    def examples(self, shared, lengths):
        """Examples of (input, target) lengths; the inputs begin with `shared` and then differ at once."""
        firsts = self.random.sample(range(self.vocab), len(lengths))
        out = []
        for first, (n_input, n_target) in zip(firsts, lengths):
            own = n_input - len(shared)
            assert own >= 1
            out.append({"input": [*shared, first, *self.ids(own - 1)], "target": self.ids(n_target)})
        return out


def loss_cases(draw, fresh_base, tensors):
    shared = draw.ids(3)
    one_group = draw.examples(shared, [(4, 2), (17, 1), (9, 4), (6, 3), (12, 1)])
    no_prefix = draw.examples([], [(3, 2), (8, 1), (1, 3), (14, 2)])
    # The first input is a prefix of all others, and its target repeats their next token: the
    # target must not be taken for shared input.
    a, b, *rest = draw.ids(6)
    short = [{"input": [a], "target": [b, *rest[:1]]}, {"input": [a, b], "target": rest[1:2]},
             {"input": [a, b, *rest[2:]], "target": draw.ids(2)}]
    single = draw.examples([], [(1, 1)])
    left = draw.examples(draw.ids(2), [(5, 2), (11, 1), (3, 3)])
    right = draw.examples(draw.ids(4), [(7, 1), (5, 4), (13, 2)])
    cases = [
        ("one_group", [(draw.prompt(7), one_group)]),
        ("no_common_prefix", [(draw.prompt(6), no_prefix)]),
        ("whole_input_shared", [(draw.prompt(4), short)]),
        ("single", [(draw.prompt(3), single)]),
        ("two_groups", [(draw.prompt(5), left), (draw.prompt(9), right)]),
    ]
    return [loss_case(name, groups, fresh_base, tensors) for name, groups in cases]


def long_and_short_cases(draw, fresh_base, tensors):
    """Prompts of 1 and 2 rows, prefixes and sequences of more than 64 rows, which is a chunk of the scan."""
    head = draw.ids(31)
    cases = [
        ("one_row_prompt", [(draw.prompt(1), draw.examples([], [(2, 1), (1, 2), (5, 2)]))]),
        ("two_row_prompt", [(draw.prompt(2), draw.examples([], [(1, 1), (12, 2), (4, 1)]))]),
        ("long_prefix", [(draw.prompt(40), draw.examples(head, [(32, 1), (34, 2), (39, 1)]))]),
        ("long_sequences", [(draw.prompt(6), draw.examples([], [(65, 2), (3, 1), (133, 1)]))]),
        ("short_and_long_prompt", [(draw.prompt(1), draw.examples(draw.ids(1), [(3, 2), (66, 1)])),
                                   (draw.prompt(67), draw.examples([], [(2, 1), (9, 2)]))]),
    ]
    return [loss_case(name, groups, fresh_base, tensors) for name, groups in cases]


def write_cases(name):
    folder, spec = HERE / name, CHECKPOINTS[name]
    draw, tensors, margins = Draw(spec["seed"], folder), {}, mixers.Margins()
    clip_1, clip_4 = spec["max_norms"]

    def fresh_base():
        return margins.watch(load(folder))

    document = {
        "versions": versions(),
        "checkpoint": name,
        "cases": loss_cases(draw, fresh_base, tensors),
        "training": [
            training_case(Run("train_accumulate_1", 1, 3, clip_1), draw, fresh_base, tensors),
            training_case(Run("train_accumulate_4", 4, 2, clip_4), draw, fresh_base, tensors),
        ],
        "generate": generate_case(draw, fresh_base, tensors),
    }
    if name in mixers.CHECKPOINTS:
        document["cases"] += long_and_short_cases(draw, fresh_base, tensors)
        document |= margins.finish()
    write_json(folder / "cases.json", document)
    write_tensors(folder / "golden.safetensors", tensors)
    report(name, document)


def report(name, document):
    for case in document["cases"]:
        print(f"{name}/{case['name']}: loss {case['loss']:.4f}")
    for case in document.get("training", []):
        norms = " ".join(f"{r['grad_norm']:.3f}" for r in case["steps"])
        losses = " ".join(f"{r['loss']:.3f}" for r in case["steps"])
        print(f"{name}/{case['name']}: losses {losses}; gradient norms {norms}")
    for sequence in document.get("generate", {}).get("sequences", []):
        print(f"{name}/generate: {sequence['generated']}")


# ---------------------------------------------------------------- schedules, adapter, SmolLM2


def write_schedules():
    """Multipliers of the learning rate, one a step, of transformers' schedules."""
    warmup, steps = 3, 20
    makers = {
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, steps),
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, steps),
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
    }
    multipliers = {}
    for name, make in makers.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule, values = make(optimizer), []
        for _ in range(steps):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        multipliers[name] = values
    write_json(HERE / "schedules.json", {"versions": versions(), "num_warmup_steps": warmup,
                                         "num_training_steps": steps, "multipliers": multipliers})


def write_adapter():
    """What PEFT saves for the prompt of granite's case one_group, with no path of this machine in it."""
    folder = HERE / "peft_adapter"
    prompt = load_file(HERE / "granite" / "golden.safetensors")["one_group.prompt0"]
    model = with_prompt(load(HERE / "granite"), prompt)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = ADAPTER_BASE
    write_json(path, config)
    assert str(HERE) not in path.read_text()


def write_smollm2(path):
    """Logits of a real pretrained model read from GGUF, and one PEFT case on it."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"{path}: expected one GGUF file, found {len(files)}")
    base = load(files[0].parent, gguf_file=files[0].name).eval()
    folder, tensors, rows = HERE / "smollm2", {}, []
    with torch.no_grad():
        for _, ids in SMOLLM2_SEQUENCES:
            rows.append(base(input_ids=torch.tensor([ids])).logits[0, -1])
        tensors["last_logits"] = torch.stack(rows)
        prompt = base.get_input_embeddings()(torch.tensor(SMOLLM2_INIT[1]))
    case = loss_case("peft", [(prompt, SMOLLM2_EXAMPLES)], lambda: base, tensors, keep_logits=False)
    document = {
        "versions": versions(),
        "gguf": {"file": files[0].name, "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest()},
        "sequences": [{"text": text, "ids": ids} for text, ids in SMOLLM2_SEQUENCES],
        "last_logits": "last_logits",
        "prompt_text": SMOLLM2_INIT[0],
        "prompt_ids": SMOLLM2_INIT[1],
        "cases": [case],
    }
    folder.mkdir(exist_ok=True)
    write_json(folder / "cases.json", document)
    write_tensors(folder / "golden.safetensors", tensors)
    report("smollm2", document)


if __name__ == "__main__":
    sys.exit(main())

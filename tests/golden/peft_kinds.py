"""Adapter folders of every kind of prompt that PEFT has for a decoder, as PEFT saves them, and the logits of each.

    python tests/golden/peft_kinds.py

`peft_kinds/CHECKPOINT/KIND/` is what `save_pretrained` writes. `peft_kinds.json` lists the cases: the checkpoint, the
folder, the task of a multitask prompt, the token ids of three sequences, and the name of their logits in
`peft_kinds.safetensors`, [rows, V], one sequence below the other. PEFT runs the sequences as one batch with padding on
the right; the rows of padding are left out.

The kind `text_prefix` is made of the keys and values of a text, which transformers' cache holds after the text; its case
has the text's ids and the logits that transformers gives for the sequences after this text.

The variants are folders of `granite` with some keys of the configuration set or removed: whether PEFT loads and runs
each, and whether its logits are those of the folder as it was.
"""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

from oracle import load, quiet_and_deterministic, versions, write_json, write_tensors

import torch
from peft import (
    CartridgeConfig, CPTConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig,
    get_peft_model,
)
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "peft_kinds"
WEIGHTS = "adapter_model.safetensors"
SEQUENCES = [[5, 17, 40, 2, 99], [63], [7, 7, 31, 88, 3, 120, 45, 9, 14]]
TEXT = [11, 74, 3, 52, 90, 28]
TASKS, ROWS = 3, 4
CAUSAL = {"task_type": "CAUSAL_LM"}

# Kind, the configuration of PEFT.
CONFIGS = {
    "p_tuning_mlp": lambda: PromptEncoderConfig(**CAUSAL, num_virtual_tokens=ROWS, encoder_hidden_size=12),
    "p_tuning_lstm": lambda: PromptEncoderConfig(
        **CAUSAL, num_virtual_tokens=ROWS, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"),
    "cpt": lambda: CPTConfig(
        **CAUSAL, cpt_token_ids=TEXT, cpt_mask=[1] * 6, cpt_tokens_type_mask=[1, 2, 2, 3, 4, 4],
        opt_weighted_loss_type="decay", opt_loss_decay_factor=0.95, opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1),
    "multitask": lambda: MultitaskPromptTuningConfig(
        **CAUSAL, num_virtual_tokens=ROWS, num_tasks=TASKS, num_ranks=2),
    "prefix": lambda: PrefixTuningConfig(**CAUSAL, num_virtual_tokens=ROWS),
    "prefix_projection": lambda: PrefixTuningConfig(
        **CAUSAL, num_virtual_tokens=ROWS, prefix_projection=True, encoder_hidden_size=12),
    "cartridge": lambda: CartridgeConfig(**CAUSAL, num_virtual_tokens=ROWS, num_frozen_tokens=1),
    "text_prefix": lambda: PrefixTuningConfig(**CAUSAL, num_virtual_tokens=len(TEXT)),
}
KINDS = {
    "granite": list(CONFIGS),
    "llama_bias": ["multitask", "prefix", "prefix_projection", "cartridge", "text_prefix"],
    "hybrid_dense": ["prefix", "cartridge", "text_prefix"],
    "experts": ["multitask", "prefix", "cartridge"],
}

# Kind, keys to set, keys to remove.
VARIANTS = [
    ("prefix", {}, ["num_layers"]),
    ("prefix", {}, ["num_attention_heads"]),
    ("prefix", {}, ["token_dim"]),
    ("prefix", {}, ["num_layers", "num_attention_heads", "token_dim"]),
    ("prefix", {"num_layers": 2}, []),
    ("prefix", {"num_layers": 4}, []),
    ("prefix", {"num_attention_heads": 5}, []),
    ("prefix", {"num_attention_heads": 2}, []),
    ("prefix", {"token_dim": 40}, []),
    ("prefix", {"num_attention_heads": 5, "token_dim": 40}, []),
    ("prefix", {"prefix_projection": True}, []),
    ("prefix", {"init_weights": "zero"}, []),
    ("prefix", {"encoder_hidden_size": None}, []),
    ("prefix", {"encoder_hidden_size": 3}, []),
    ("prefix", {"num_transformer_submodules": None}, []),
    ("prefix", {"num_transformer_submodules": 2}, []),
    ("prefix", {"inference_mode": False}, []),
    ("prefix", {"modules_to_save": ["lm_head"]}, []),
    ("prefix", {"modules_to_save": []}, []),
    ("prefix", {"task_type": "SEQ_CLS"}, []),
    ("prefix", {"num_virtual_tokens": 3}, []),
    ("prefix", {"gneiss_attention_layers": [0, 1, 2]}, []),
    ("prefix", {"peft_type": "CARTRIDGE"}, []),
    ("cartridge", {"num_frozen_tokens": 0}, []),
    ("cartridge", {}, ["num_frozen_tokens"]),
    ("cartridge", {"num_frozen_tokens": 4}, []),
    ("cartridge", {"num_frozen_tokens": 5}, []),
    ("cartridge", {"num_frozen_tokens": -1}, []),
    ("cartridge", {"peft_type": "PREFIX_TUNING"}, []),
    ("cpt", {}, ["cpt_token_ids"]),
    ("cpt", {}, ["cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"]),
    ("cpt", {"cpt_token_ids": [1, 2]}, []),
    ("cpt", {"cpt_mask": [1]}, []),
    ("cpt", {"cpt_tokens_type_mask": [1]}, []),
    ("cpt", {"cpt_mask": None, "cpt_tokens_type_mask": None}, []),
    ("cpt", {}, ["num_virtual_tokens"]),
    ("cpt", {"num_virtual_tokens": 5}, []),
    ("cpt", {"task_type": None}, []),
    ("cpt", {"task_type": "SEQ_CLS"}, []),
    ("cpt", {"opt_projection_epsilon": 0.0001}, []),
    ("cpt", {"inference_mode": False}, []),
    ("cpt", {"cpt_token_ids": [999] * 6}, []),
    ("multitask", {"num_tasks": 2}, []),
    ("multitask", {}, ["num_tasks"]),
    ("multitask", {"num_ranks": 1}, []),
    ("multitask", {}, ["num_ranks"]),
    ("multitask", {"prompt_tuning_init": "ONLY_SOURCE_SHARED"}, []),
    ("multitask", {"inference_mode": False}, []),
    ("multitask", {"peft_type": "PROMPT_TUNING"}, []),
    ("p_tuning_mlp", {"encoder_num_layers": 5, "encoder_dropout": 0.5, "encoder_reparameterization_type": "LSTM"}, []),
    ("p_tuning_mlp", {"modules_to_save": ["lm_head"]}, []),
]


def adapted(checkpoint, kind):
    """A model of PEFT whose prompt has values worth testing."""
    model = get_peft_model(load(checkpoint), CONFIGS[kind]()).eval()
    encoder = model.prompt_encoder["default"]
    generator = torch.Generator().manual_seed(5)
    if kind == "text_prefix":
        encoder.load_prompt_embeddings(keys_and_values(load(checkpoint)))
        return model
    with torch.no_grad():
        for name, values in encoder.named_parameters():
            # Of the size that embeddings have; the factors of a multitask prompt multiply to about 1.
            scale = 0.8 if name.startswith("prefix_task") else 0.3
            values.copy_(scale * torch.randn(values.shape, generator=generator))
    return model


@torch.no_grad()
def keys_and_values(base):
    """Keys and values of TEXT in the columns of PEFT's prefix, [len(TEXT), L 2 K D]."""
    cache = base(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    # [L, 2, K, P, D] to [P, L, 2, K, D].
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).contiguous()


@torch.no_grad()
def logits(model, sequences, task=None):
    """Logits of the sequences as one padded batch, [rows, V] without those of virtual tokens and padding."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    named = {} if task is None else {"task_ids": torch.full((len(sequences),), task)}
    out = model(input_ids=ids, attention_mask=mask, **named).logits[:, -longest:]
    return torch.cat([rows[: len(s)] for rows, s in zip(out, sequences)])


def check(case, model, checkpoint, folder, ours):
    """Asserts the logits in a second way: one sequence at a time; of a text's prefix, the text itself in front."""
    named = {} if case["task"] is None else {"task": case["task"]}
    alone = torch.cat([logits(model, [s], **named) for s in SEQUENCES])
    assert (alone - ours).abs().max() < 1e-4, case
    assert (ours - torch.cat([logits(load(checkpoint), [s]) for s in SEQUENCES])).abs().max() > 1e-2, case
    if folder.name == "text_prefix":
        hard = torch.cat([logits(load(checkpoint), [TEXT + s])[len(TEXT) :] for s in SEQUENCES])
        print("text as a prefix and as tokens:", (hard - ours).abs().max().item())
        assert (hard - ours).abs().max() < 1e-5, case
        return hard
    return None


def write(name, kind, tensors):
    """Saves an adapter, and returns its cases."""
    checkpoint, folder = HERE / name, FOLDER / name / kind
    made = adapted(checkpoint, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(HERE), "tests/golden"))
    model = PeftModel.from_pretrained(load(checkpoint), folder).eval()
    shapes = {key: list(value.shape) for key, value in sorted(load_file(folder / WEIGHTS).items())}
    cases = []
    for task in range(TASKS) if kind == "multitask" else [None]:
        key = f"{name}.{kind}" if task is None else f"{name}.{kind}.{task}"
        case = {"checkpoint": name, "folder": f"{name}/{kind}", "task": task, "tensors": shapes, "logits": key}
        tensors[key] = logits(model, SEQUENCES, task)
        # What was tuned and what was loaded are the same.
        assert (logits(made, SEQUENCES, task) - tensors[key]).abs().max() < 1e-5, case
        hard = check(case, model, checkpoint, folder, tensors[key])
        if hard is not None:
            case["text"], case["text_logits"] = TEXT, f"{key}.text"
            tensors[case["text_logits"]] = hard
        print(key, shapes)
        cases.append(case)
    return cases


def variant(kind, sets, removed, expected):
    """What PEFT makes of a folder of `granite` with another configuration."""
    source, task = FOLDER / "granite" / kind, 1 if kind == "multitask" else None
    config = json.loads((source / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in removed} | sets
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        shutil.copyfile(source / WEIGHTS, Path(folder) / WEIGHTS)
        found = {"loads": True}
        try:
            model = PeftModel.from_pretrained(load(HERE / "granite"), folder).eval()
            task = task if config["peft_type"] == "MULTITASK_PROMPT_TUNING" else None
            found["same_logits"] = bool((logits(model, SEQUENCES, task) - expected).abs().max() < 1e-5)
        except Exception as error:
            found = {"loads": False, "error": type(error).__name__}
    print(kind, sets, removed, found)
    return {"kind": kind, "set": sets, "remove": removed, "peft": found}


def main():
    quiet_and_deterministic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    tensors, cases = {}, []
    for name, kinds in KINDS.items():
        for kind in kinds:
            cases += write(name, kind, tensors)
    write_tensors(HERE / "peft_kinds.safetensors", tensors)
    expected = {kind: tensors[f"granite.{kind}" + (".1" if kind == "multitask" else "")] for kind in CONFIGS}
    variants = [variant(kind, sets, removed, expected[kind]) for kind, sets, removed in VARIANTS]
    write_json(HERE / "peft_kinds.json",
               {"versions": versions(), "sequences": SEQUENCES, "cases": cases, "variants": variants})


if __name__ == "__main__":
    main()

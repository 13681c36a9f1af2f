"""What PEFT makes of adapter folders as people have them: which it loads, and to which rows.

    python tests/golden/peft_loads.py

Each variant is `peft_adapter/` with some keys of its configuration set or removed, or with another file of tensors,
which is written into `peft_loads/`. `peft_loads.json` says of each whether `PeftModel.from_pretrained` loads it, the
sum and the first values of its rows, and the most likely next token behind them. Runs on the checkpoint `granite/`.
"""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

from oracle import load, prompt_of, quiet_and_deterministic, versions, write_json

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ADAPTER, CHECKPOINT, TENSORS = HERE / "peft_adapter", HERE / "granite", HERE / "peft_loads"
IDS = [5, 17, 40, 2, 99]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Name, keys to set, keys to remove.
CONFIGS = [
    ("whole", {}, []),
    ("no token_dim", {}, ["token_dim"]),
    ("null token_dim", {"token_dim": None}, []),
    ("no num_layers", {}, ["num_layers", "num_attention_heads"]),
    ("null num_layers", {"num_layers": None, "num_attention_heads": None}, []),
    ("no num_transformer_submodules", {}, ["num_transformer_submodules"]),
    ("null num_transformer_submodules", {"num_transformer_submodules": None}, []),
    ("no prompt_tuning_init", {}, ["prompt_tuning_init"]),
    ("null prompt_tuning_init", {"prompt_tuning_init": None}, []),
    ("an init of a later version", {"prompt_tuning_init": "KMEANS"}, []),
    ("an init in small letters", {"prompt_tuning_init": "random"}, []),
    ("init from the vocabulary", {"prompt_tuning_init": "SAMPLE_VOCAB"}, []),
    ("no inference_mode", {}, ["inference_mode"]),
    ("null inference_mode", {"inference_mode": None}, []),
    ("inference_mode false", {"inference_mode": False}, []),
    ("no base_model_name_or_path", {}, ["base_model_name_or_path", "revision"]),
    ("no tokenizer_name_or_path", {}, ["tokenizer_name_or_path", "prompt_tuning_init_text"]),
    ("no task_type", {}, ["task_type"]),
    ("null task_type", {"task_type": None}, []),
    ("keys of a later version", {"peft_version": "9.9.9", "some_option": {"a": [1, None]}}, []),
    ("runtime_config", {"runtime_config": {"ephemeral_gpu_offload": False}}, []),
    ("peft_type and num_virtual_tokens alone", None, []),
    ("text and tokenizer", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a text",
                            "tokenizer_name_or_path": "org/name"}, []),
    ("an empty text", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "",
                       "tokenizer_name_or_path": "org/name"}, []),
    ("text without tokenizer", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a text"}, []),
    ("tokenizer without text", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "org/name"}, []),
    ("no peft_type", {}, ["peft_type"]),
    ("null peft_type", {"peft_type": None}, []),
    ("another peft_type", {"peft_type": "LORA"}, []),
    ("P_TUNING", {"peft_type": "P_TUNING"}, []),
    ("PREFIX_TUNING", {"peft_type": "PREFIX_TUNING"}, []),
    ("an unknown peft_type", {"peft_type": "PROMPT"}, []),
    ("no num_virtual_tokens", {}, ["num_virtual_tokens"]),
    ("null num_virtual_tokens", {"num_virtual_tokens": None}, []),
    ("num_virtual_tokens as text", {"num_virtual_tokens": "7"}, []),
    ("num_virtual_tokens of another number", {"num_virtual_tokens": 8}, []),
    ("token_dim of another number", {"token_dim": 41}, []),
    ("two submodules", {"num_transformer_submodules": 2}, []),
    ("an unknown task_type", {"task_type": "causal_lm"}, []),
    ("SEQ_2_SEQ_LM", {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": None}, []),
    ("SEQ_CLS", {"task_type": "SEQ_CLS"}, []),
    ("TOKEN_CLS", {"task_type": "TOKEN_CLS"}, []),
    ("QUESTION_ANS", {"task_type": "QUESTION_ANS"}, []),
    ("FEATURE_EXTRACTION", {"task_type": "FEATURE_EXTRACTION"}, []),
]

# Name, file, tensors.
FILES = [
    ("f16", "f16", lambda rows: {"prompt_embeddings": rows.half()}),
    ("bf16", "bf16", lambda rows: {"prompt_embeddings": rows.bfloat16()}),
    ("f64", "f64", lambda rows: {"prompt_embeddings": rows.double()}),
    ("an extra tensor", "extra", lambda rows: {"prompt_embeddings": rows, "classifier.weight": rows[:2].clone()}),
    ("a head of its own", "head", lambda rows: {"prompt_embeddings": rows,
                                                "base_model.lm_head.weight": torch.zeros(4, 40)}),
    ("a prefix", "prefix", lambda rows: {"base_model.model.prompt_embeddings": rows}),
    ("the module's state", "state", lambda rows: {"prompt_encoder.default.embedding.weight": rows}),
    ("three dimensions", "batch", lambda rows: {"prompt_embeddings": rows[None].clone()}),
    ("transposed", "transposed", lambda rows: {"prompt_embeddings": rows.T.contiguous()}),
]


def asked(folder):
    """What PEFT makes of the adapter in `folder`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(load(CHECKPOINT), folder).eval()
        rows = prompt_of(model).detach().float()
        ids = torch.tensor([IDS])
        with torch.no_grad():
            embeds = model.get_base_model().get_input_embeddings()(ids)
            prompts = model.get_prompt(batch_size=1).to(embeds.dtype)
            logits = model.get_base_model()(inputs_embeds=torch.cat([prompts, embeds], dim=1)).logits
            called = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        return {"loads": False, "error": type(error).__name__}
    return {
        "loads": True,
        "sum": float(rows.double().sum()),
        "first": [float(value) for value in rows.flatten()[:4]],
        "next": int(logits[0, -1].argmax()),
        # Whether PEFT's own pass puts these rows in front, as it does for a causal model.
        "same_pass": bool(torch.equal(called.logits[0, -1], logits[0, -1])),
    }


def main():
    quiet_and_deterministic()
    config = json.loads((ADAPTER / CONFIG).read_text())
    rows = load_file(ADAPTER / WEIGHTS)["prompt_embeddings"]
    shutil.rmtree(TENSORS, ignore_errors=True)
    TENSORS.mkdir()
    variants = []
    for name, sets, removed in CONFIGS:
        if sets is None:
            removed = sorted(set(config) - {"peft_type", "num_virtual_tokens", "task_type"})
            sets = {}
        variants.append({"name": name, "set": sets, "remove": removed, "tensors": None})
    for name, file, tensors in FILES:
        save_file(tensors(rows), TENSORS / f"{file}.safetensors", metadata={"format": "pt"})
        variants.append({"name": name, "set": {}, "remove": [], "tensors": f"{file}.safetensors"})
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            keys = {key: value for key, value in config.items() if key not in variant["remove"]}
            (folder / CONFIG).write_text(json.dumps({**keys, **variant["set"]}))
            tensors = TENSORS / variant["tensors"] if variant["tensors"] else ADAPTER / WEIGHTS
            shutil.copyfile(tensors, folder / WEIGHTS)
            variant["peft"] = asked(folder)
            print(variant["name"], variant["peft"])
    write_json(HERE / "peft_loads.json", {"versions": versions(), "input": IDS, "variants": variants})


if __name__ == "__main__":
    main()

"""Holds a baked GGUF file against the baked folder of the same prompts, both read by transformers.

    python tests/export/gguf_transformers.py FOLDER FILE.gguf
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder, file = map(Path, sys.argv[1:])
whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
tokenizers = [AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)]
prompts = [json.loads(path.read_text()) for path in (folder / "prompts.json", file.with_suffix(".prompts.json"))]
assert prompts[0] == prompts[1]
for prompt in prompts[0].values():
    text = prompt["template"].replace("{{input}}", "wet dogs")
    ids, found = [tokenizer(text, add_special_tokens=False).input_ids for tokenizer in tokenizers]
    assert ids == found, (ids, found)
    ids = torch.tensor([ids])
    with torch.no_grad():
        worst = (read(ids).logits - whole(ids).logits).abs().max().item()
    assert worst < 1e-4, worst

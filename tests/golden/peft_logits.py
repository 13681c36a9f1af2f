"""Logits that transformers + PEFT give for an adapter folder, as JSON on stdout.

    python tests/golden/peft_logits.py --checkpoint DIR --adapter DIR --ids "1,2,3;4,5"

A test of gneiss calls it on an adapter that gneiss wrote, to hold that PEFT reads it and computes
the same. Output: {"versions": {...}, "logits": [[last position's logits, V] per sequence],
"prompt_embeddings_shape": [rows, columns], "prompt_embeddings": [[row] per virtual token]}. Each
sequence runs alone, in f32.
"""

import argparse
import json
import sys
from pathlib import Path

from oracle import load, prompt_of, quiet_and_deterministic, versions

import torch
from peft import PeftModel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_config.json")
    parser.add_argument("--ids", type=sequences, required=True, help='token ids, as in "1,2,3;4,5"')
    args = parser.parse_args()
    for folder in (args.checkpoint, args.adapter):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    quiet_and_deterministic()
    model = PeftModel.from_pretrained(load(args.checkpoint), args.adapter).eval()
    json.dump({
        "versions": versions(),
        "logits": [last_logits(model, ids) for ids in args.ids],
        "prompt_embeddings_shape": list(prompt_of(model).shape),
        "prompt_embeddings": prompt_of(model).tolist(),
    }, sys.stdout)
    print()
    return 0


def sequences(text):
    """[[1, 2, 3], [4, 5]] of "1,2,3;4,5"."""
    return [[int(token) for token in part.split(",")] for part in text.split(";")]


@torch.no_grad()
def last_logits(model, ids):
    context = torch.tensor([ids])
    return model(input_ids=context, attention_mask=torch.ones_like(context)).logits[0, -1].tolist()


if __name__ == "__main__":
    sys.exit(main())

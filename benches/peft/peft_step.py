"""Times stock PEFT prompt tuning on the CPU and prints one JSON line.

    python benches/peft/peft_step.py --model MODEL --data FILE.csv --verbalizer 'classify {0, 1} {{input}}'
        [--batch 8] [--virtual-tokens 100] [--accumulate 1] [--dtype f32] [--threads N]

A step is what transformers' Trainer does: for each micro-batch a right-padded batch through
`model(**batch)`, loss over the target tokens of the whole step, `backward()`; then clipping, AdamW.
It runs PEFT at its best: glibc's malloc keeps freed memory instead of giving it back to the system
at every step (worth 1.1 to 1.5 times on a 135M model; --plain-malloc leaves it as it comes), and the
key-value cache, which training does not use, is off.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "200000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
IGNORE = -100  # the label that transformers' loss leaves out
# Values of tokenizer.ggml.pre whose tokenizers make every digit a token of its own, then split as
# GPT-2's (llama.cpp, llama-vocab.cpp); transformers builds these from GGUF without the digits.
DIGIT_SPLITTING = ("smollm", "refact", "starcoder")


def main():
    args = arguments()
    re_execute(args)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer, model = load(args)
    loaded = status_bytes("VmRSS")
    rows = encode_rows(args, tokenizer)
    model, weight = with_prompt(model, prompt_ids(args, tokenizer, model))
    records = train(args, model, weight, rows)
    print(json.dumps({**summary(args, model, records, rows), "loaded_rss_bytes": loaded,
                      "peak_rss_bytes": status_bytes("VmHWM")}))
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="GGUF file, or folder with a GGUF file or config.json")
    add("--data", type=Path, required=True, help="CSV with the columns input and output")
    add("--verbalizer", default="{{input}}", help="template of the input; default {{input}}")
    add("--batch", type=positive, default=8, help="examples a micro-batch")
    add("--virtual-tokens", type=positive, default=100)
    add("--accumulate", type=positive, default=1, help="micro-batches an optimizer step")
    add("--dtype", choices=("f32", "bf16"), default="f32")
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    add("--steps", type=positive, default=6, help="optimizer steps that count")
    add("--warmup", type=int, default=2, help="optimizer steps before them")
    add("--seed", type=int, default=0)
    add("--init-text", help="the prompt begins as this text's embeddings, cut or tiled")
    add("--init-ids", help="the same with token ids, as in 1,2,3; without either: ids drawn by the seed")
    add("--max-input-tokens", type=positive, default=256, help="a longer input is an error, not cut")
    add("--learning-rate", type=float, default=0.001)
    add("--plain-malloc", action="store_true", help="leave malloc as it comes")
    args = parser.parse_args()
    if args.init_text and args.init_ids:
        parser.error("--init-text and --init-ids exclude each other")
    if "{{input}}" not in args.verbalizer:
        parser.error("--verbalizer has no {{input}}")
    return args


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


def re_execute(args):
    """Starts this program again where malloc or OpenMP, which read their settings at start, lack them."""
    wanted = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not args.plain_malloc:
        wanted |= MALLOC
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


# ---------------------------------------------------------------- model and rows


def load(args):
    """Tokenizer and base model, from a GGUF file or a folder."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = args.model
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not path.exists() or (not found and not (path / "config.json").is_file()) or len(found) > 1:
        sys.exit(f"{path}: expected one GGUF file, or a folder with one or with config.json")
    folder, source = (found[0].parent, {"gguf_file": found[0].name}) if found else (path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    if found:
        split_digits(tokenizer, found[0])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source)
    model.config.use_cache = False
    return tokenizer, model


def split_digits(tokenizer, path):
    """Gives a tokenizer built from GGUF the digit splitting that the file's pre-tokenizer asks for."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() in DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])
        ids = tokenizer("12345", add_special_tokens=False)["input_ids"]
        assert len(ids) == 5, f"digits are not split: {ids}"


def encode_rows(args, tokenizer):
    """[(input ids, target ids)] of the CSV's rows in their order; a target ends with the end-of-text token."""
    rows = []
    with args.data.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"input", "output"} - set(reader.fieldnames or ()):
            sys.exit(f"{args.data}: no column {sorted(missing)}; found {reader.fieldnames}")
        for row in reader:
            text = args.verbalizer.replace("{{input}}", row["input"])
            ids = tokenizer(text)["input_ids"]
            if len(ids) > args.max_input_tokens:
                sys.exit(f"{args.data}:{reader.line_num}: {len(ids)} input tokens, over --max-input-tokens "
                         f"{args.max_input_tokens}; a comparison needs rows that neither side cuts")
            target = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
            rows.append((ids, [*target, tokenizer.eos_token_id]))
    if not rows:
        sys.exit(f"{args.data}: no rows")
    return rows


def prompt_ids(args, tokenizer, model):
    """The ids whose embeddings the prompt begins as, cut or tiled to the number of virtual tokens as PEFT does."""
    if args.init_text:
        ids = tokenizer(args.init_text)["input_ids"]
    elif args.init_ids:
        ids = [int(token) for token in args.init_ids.split(",")]
    else:
        rng, vocab = random.Random(args.seed), model.get_input_embeddings().num_embeddings
        ids = [rng.randrange(vocab) for _ in range(args.virtual_tokens)]
    return (ids * math.ceil(args.virtual_tokens / len(ids)))[: args.virtual_tokens]


def with_prompt(model, ids):
    """PEFT's model and the weight of its prompt, which holds the embeddings of `ids` in f32."""
    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(ids))
    tuned = get_peft_model(model, config)
    weight = tuned.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(model.get_input_embeddings()(torch.tensor(ids)).float())
    return tuned.train(), weight


# ---------------------------------------------------------------- training


def steps_of(rows, batch, accumulate):
    """Endless optimizer steps, each a list of micro-batches; rows in order, epochs closed as a Trainer closes them."""
    while True:
        batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        for at in range(0, len(batches), accumulate):
            yield batches[at : at + accumulate]


def collate(rows):
    """A right-padded batch; only target tokens carry labels."""
    import torch

    width = max(len(ids) + len(target) for ids, target in rows)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, target in rows:
        used = len(ids) + len(target)
        out["input_ids"].append(ids + target + [0] * (width - used))
        out["attention_mask"].append([1] * used + [0] * (width - used))
        out["labels"].append([IGNORE] * len(ids) + target + [IGNORE] * (width - used))
    return {name: torch.tensor(values) for name, values in out.items()}


def train(args, model, weight, rows):
    """One record an optimizer step: its loss, examples and seconds."""
    import torch

    optimizer = torch.optim.AdamW([weight], lr=args.learning_rate, weight_decay=0.0)
    records = []
    for _, micro_batches in zip(range(args.warmup + args.steps), steps_of(rows, args.batch, args.accumulate)):
        start = time.perf_counter()
        loss, examples = 0.0, sum(map(len, micro_batches))
        targets = sum(len(target) for batch in micro_batches for _, target in batch)
        for batch in micro_batches:
            part = model(**collate(batch), num_items_in_batch=targets).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"loss": loss, "examples": examples, "seconds": time.perf_counter() - start})
    return records


# ---------------------------------------------------------------- results


def summary(args, model, records, rows):
    import peft
    import torch
    import transformers

    counted = records[args.warmup :]
    config = model.config
    return {
        "tool": "peft",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "peft": peft.__version__},
        "model": args.model.name, "dtype": args.dtype, "threads": torch.get_num_threads(),
        "malloc": "plain" if args.plain_malloc else "tuned", "attention": config._attn_implementation,
        "shapes": {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
                   "vocab_size": config.vocab_size},
        "batch": args.batch, "virtual_tokens": args.virtual_tokens, "accumulate": args.accumulate,
        "warmup": args.warmup,
        "tokens_per_example": statistics.fmean(len(ids) + len(target) for ids, target in rows),
        "step_seconds": [r["seconds"] for r in records],
        "step_examples": [r["examples"] for r in records],
        "losses": [r["loss"] for r in records],
        "examples_per_second": quantiles([r["examples"] / r["seconds"] for r in counted]),
    }


def quantiles(values):
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def status_bytes(key):
    """A memory figure of /proc/self/status: VmHWM is the peak of the resident set, VmRSS what it is now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    sys.exit(f"/proc/self/status: no {key}; the peak memory is read on Linux only")


if __name__ == "__main__":
    sys.exit(main())

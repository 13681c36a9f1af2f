"""Times stock PEFT prompt tuning and prints one JSON line.

    python benches/peft/peft_step.py --model MODEL --data FILE.csv --verbalizer 'classify {0, 1} {{input}}'
        [--batch 8] [--virtual-tokens 100] [--accumulate 1] [--device cpu] [--dtype f32] [--threads N]
    python benches/peft/peft_step.py --model-config configs/models/NAME.json --examples FILE.json ...

The second form takes a model of random weights from its shape, built on the device in the dtype, and token ids in
place of texts: {"examples": [{"input": [ids], "target": [ids]}, ...]}, as `gneiss bench --examples` reads them.

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

from canary import Canary

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
    if args.device != "cpu":
        if not torch.cuda.is_available():
            sys.exit(f"--device {args.device}: torch {torch.__version__} sees no CUDA device")
        torch.cuda.set_device(args.device)
    try:
        tokenizer, model = (None, shape_of(args)) if args.model_config else load(args)
        loaded = status_bytes("VmRSS")
        rows = read_examples(args, model) if args.examples else encode_rows(args, tokenizer)
        with_kind = {"embeddings": with_prompt, "prefix": with_prefix}[args.prompt_kind]
        model, weight = with_kind(model, prompt_ids(args, tokenizer, model))
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()  # building the model may have taken more
        records = train(args, model, weight, rows)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(json.dumps({"tool": "peft", "out_of_memory": " ".join(str(error).split())[:200]}))
        return 0
    print(json.dumps({**summary(args, model, records, rows), **memory(args), "loaded_rss_bytes": loaded}))
    return 0


def out_of_memory(error):
    """Whether it says that memory ran out: torch has a class for CUDA, and for the CPU only a text."""
    import torch

    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(text in str(error) for text in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="GGUF file, or folder with a GGUF file or config.json")
    model.add_argument("--model-config", type=Path, help="config.json: random weights")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data", type=Path, help="CSV with the columns input and output")
    rows.add_argument("--examples", type=Path, help="JSON with token ids")
    add("--verbalizer", default="{{input}}", help="template of the input; default {{input}}")
    add("--batch", type=positive, default=8, help="examples a micro-batch")
    add("--virtual-tokens", type=positive, default=100)
    add("--prompt-kind", choices=("embeddings", "prefix"), default="embeddings",
        help="PEFT's PROMPT_TUNING or PREFIX_TUNING; a prefix begins as the keys and values of the ids")
    add("--accumulate", type=positive, default=1, help="micro-batches an optimizer step")
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
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
    if args.model_config and (args.data or args.init_text):
        parser.error("--model-config has no tokenizer: it takes --examples and --init-ids")
    return args


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


def device(text):
    if text not in ("cpu", "cuda") and not (text.startswith("cuda:") and text[5:].isdigit()):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, found {text!r}")
    return text


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
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(args), **source)
    model.config.use_cache = False
    return tokenizer, model.to(args.device)


def shape_of(args):
    """A model of random weights from its config.json, made on the device."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    if not args.model_config.is_file():
        sys.exit(f"{args.model_config}: expected a config.json")
    config = transformers.AutoConfig.from_pretrained(args.model_config)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(args), attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def torch_dtype(args):
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]


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


def read_examples(args, model):
    """[(input ids, target ids)] of the JSON file's examples in their order."""
    vocab = model.get_input_embeddings().num_embeddings
    try:
        rows = [(e["input"], e["target"]) for e in json.loads(args.examples.read_text())["examples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{args.examples}: expected {{\"examples\": [{{\"input\": [ids], \"target\": [ids]}}]}}: {error!r}")
    for number, row in enumerate(rows):
        if not all(row) or not all(0 <= token < vocab for token in row[0] + row[1]):
            sys.exit(f"{args.examples}: examples[{number}]: expected two lists of ids under {vocab}, found {row}")
    if not rows:
        sys.exit(f"{args.examples}: no examples")
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
        weight.copy_(model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float())
    return tuned.train(), weight


def with_prefix(model, ids):
    """PEFT's model and the weight of its prefix, which holds the keys and values of `ids` in f32."""
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    with torch.no_grad():
        cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    # [1, K, P, D] each, keys and values of a layer side by side.
    parts = [half[0].transpose(0, 1).flatten(1) for layer in cache.layers for half in (layer.keys, layer.values)]
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(ids))
    tuned = get_peft_model(model, config)
    weight = tuned.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(torch.cat(parts, 1).float())
    return tuned.train(), weight


# ---------------------------------------------------------------- training


def steps_of(rows, batch, accumulate):
    """Endless optimizer steps, each a list of micro-batches; rows in order, epochs closed as a Trainer closes them."""
    while True:
        batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        for at in range(0, len(batches), accumulate):
            yield batches[at : at + accumulate]


def collate(rows, device):
    """A batch padded on the right to its longest row; only target tokens carry labels."""
    import torch

    width = max(len(ids) + len(target) for ids, target in rows)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, target in rows:
        used = len(ids) + len(target)
        out["input_ids"].append(ids + target + [0] * (width - used))
        out["attention_mask"].append([1] * used + [0] * (width - used))
        out["labels"].append([IGNORE] * len(ids) + target + [IGNORE] * (width - used))
    return {name: torch.tensor(values).to(device) for name, values in out.items()}


def train(args, model, weight, rows):
    """One record an optimizer step: its loss, examples, seconds and whether the machine was quiet (None on a GPU). The
    device is idle at a step's ends, and is asked for nothing in between."""
    import torch

    canary = Canary() if args.device == "cpu" else None
    readings = [canary.read()] if canary else []

    optimizer = torch.optim.AdamW([weight], lr=args.learning_rate, weight_decay=0.0)
    wait = torch.cuda.synchronize if args.device != "cpu" else lambda: None
    records = []
    for _, micro_batches in zip(range(args.warmup + args.steps), steps_of(rows, args.batch, args.accumulate)):
        wait()
        start = time.perf_counter()
        parts, examples = [], sum(map(len, micro_batches))
        targets = sum(len(target) for batch in micro_batches for _, target in batch)
        for batch in micro_batches:
            part = model(**collate(batch, args.device), num_items_in_batch=targets).loss
            part.backward()
            parts.append(part.detach())
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = sum(part.item() for part in parts)
        wait()
        records.append({"loss": loss, "examples": examples, "seconds": time.perf_counter() - start, "quiet": None})
        if canary:
            readings.append(canary.read())
    if canary:
        for record, quiet in zip(records, canary.quiet(readings, [record["seconds"] for record in records])):
            record["quiet"] = quiet
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
        "model": (args.model or args.model_config).name, "device": args.device,
        "device_name": torch.cuda.get_device_name() if args.device != "cpu" else platform.processor(),
        "dtype": args.dtype, "threads": torch.get_num_threads(),
        "malloc": "plain" if args.plain_malloc else "tuned", "attention": config._attn_implementation,
        "shapes": {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
                   "vocab_size": config.vocab_size},
        "parameters": sum(p.numel() for p in model.get_base_model().parameters()),
        "batch": args.batch, "virtual_tokens": args.virtual_tokens, "accumulate": args.accumulate,
        "warmup": args.warmup,
        "tokens_per_example": statistics.fmean(len(ids) + len(target) for ids, target in rows),
        "step_seconds": [r["seconds"] for r in records],
        "step_examples": [r["examples"] for r in records],
        "step_quiet": [r["quiet"] for r in records],
        "losses": [r["loss"] for r in records],
        "examples_per_second": quantiles([r["examples"] / r["seconds"] for r in counted]),
    }


def quantiles(values):
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def memory(args):
    """The process's peak, and on CUDA that of what tensors took, in bytes."""
    import torch

    found = {"peak_rss_bytes": status_bytes("VmHWM")}
    if args.device != "cpu":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def status_bytes(key):
    """A memory figure of /proc/self/status: VmHWM is the peak of the resident set, VmRSS what it is now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    sys.exit(f"/proc/self/status: no {key}; the peak memory is read on Linux only")


if __name__ == "__main__":
    sys.exit(main())

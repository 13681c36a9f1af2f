"""Runs gneiss and stock PEFT in turn on the same rows and prints their throughput side by side.

    python benches/peft/compare.py [--cases 8/100/1,8/32/1,8/100/16] [--rounds 3] [--csv result_peft.csv]
    python benches/peft/compare.py --models granite-4.0-350m,granite-3.3-2b --device cuda --dtype bf16
        [--batch 8] [--virtual-tokens 100] [--accumulate 16]

The second form takes shapes of configs/models with random weights in place of a model (shapes.py).

Run it in the repository's root after `cargo build --release`, with the Python that has torch,
transformers and peft. Each run is a process of its own, gneiss and PEFT by turns, so that a machine
that slows down slows both. Steps during which the machine was disturbed are left out on both sides. The table's
figures are medians over the rounds, each the median of a round's steps. Exit code 1 if the two sides' losses of the
first step differ: then they did not do the same work.
"""

import argparse
import datetime
import json
import math
import os
import shutil
import statistics
import sys
import tomllib
from pathlib import Path

import canary
import shapes
from common import Failed, append_row, describe_machine, gneiss_version, run
from peft_step import device, positive

# Where a configuration of gneiss keeps what both sides need.
MODEL_KEY, DATA_KEY = "model.id", "data.train"
INIT_TEXT_KEY, VERBALIZER_KEY, MAX_INPUT_KEY = "prompt.init_text", "data.verbalizer", "data.max_input_tokens"
TOLERANCE = {"f32": 1e-3, "bf16": 2e-2}  # relative, on the first step's loss
RUNS = Path("runs")


CASES, ROUNDS, STEPS, WARMUP = "8/100/1,8/32/1,8/100/16", 3, 6, 2


def main():
    args = arguments()
    machine = describe_machine()
    if args.models:
        return shapes.compare(args, machine)
    results = []
    try:
        work = shared_work(args)
        for case in args.cases:
            for number in range(1, args.rounds + 1):
                for side in (run_gneiss, run_peft):
                    result = {"round": number, **case, **side(args, work, case, number)}
                    results.append(result)
                    print(f"{label(case)} round {number} {result['tool']}: "
                          f"{result['examples_per_second']['median']:.2f} examples/s", file=sys.stderr)
                    if args.csv:
                        append_csv(args, machine, result)
    except Failed as failure:
        print(f"compare: {failure}", file=sys.stderr)
        return 1
    print(table(args, machine, results))
    return 0 if check_losses(args, results) else 1


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gneiss", default="target/release/gneiss", help="the binary")
    add("--rounds", type=positive, help=f"runs of each side, by turns; default {ROUNDS}, with --models {shapes.ROUNDS}")
    add("--steps", type=positive, help=f"micro-batches that count, at least two optimizer steps; default {STEPS}; "
        f"with --models optimizer steps, default {shapes.STEPS}")
    add("--warmup", type=positive, help=f"micro-batches before them, at least one optimizer step; default {WARMUP}; "
        f"with --models optimizer steps, default {shapes.WARMUP}")
    add("--dtype", choices=sorted(TOLERANCE), default="f32")
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    add("--prompt-kind", choices=("embeddings", "prefix"), default="embeddings",
        help="prompt tuning, or prefix tuning from the init text's keys and values; default embeddings")
    add("--plain-malloc", action="store_true", help="PEFT with malloc as it comes")
    of_model = parser.add_argument_group("a model's weights and rows")
    add = of_model.add_argument
    add("--config", type=Path, default=Path("configs/tutorial.toml"))
    add("--model", help=f"in place of the configuration's {MODEL_KEY}")
    add("--data", help=f"CSV in place of the configuration's {DATA_KEY}")
    add("--cases", type=cases, help=f"batch/virtual tokens/accumulate; default {CASES}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting for gneiss")
    add("--keep-runs", action="store_true", help="leave gneiss's run folders in runs/")
    add("--csv", type=Path, help="file to which each run's figures are appended")
    of_shape = parser.add_argument_group("shapes with random weights")
    add = of_shape.add_argument
    add("--models", type=shapes.models, help="names of configs/models, or paths of config.json files: A,B,...")
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    add("--batch", type=positive, default=8, help="examples a micro-batch; default 8")
    add("--virtual-tokens", type=positive, default=100, help="default 100")
    add("--accumulate", type=positive, default=16, help="micro-batches an optimizer step; default 16")
    add("--tokens", type=positive, help="tokens of every example; default: as the reviews of data/ have")
    add("--results", type=Path, default=Path("benches/results"), help="folder of DATE-DEVICE.csv")
    args = parser.parse_args()
    if args.models and (args.cases or args.model or args.data or args.set or args.csv):
        parser.error("--models excludes --cases, --model, --data, --set and --csv")
    if not args.models and args.device != "cpu":
        parser.error("--device takes --models")
    defaults = (shapes.ROUNDS, shapes.STEPS, shapes.WARMUP) if args.models else (ROUNDS, STEPS, WARMUP)
    for name, default in zip(("rounds", "steps", "warmup"), defaults):
        setattr(args, name, getattr(args, name) or default)
    args.cases = args.cases or cases(CASES)
    return args


def cases(text):
    """[{batch, virtual_tokens, accumulate}] of "8/100/1,8/32/1"."""
    parsed = []
    for part in text.split(","):
        numbers = part.split("/")
        if len(numbers) != 3:
            raise argparse.ArgumentTypeError(f"expected batch/virtual/accumulate, found {part!r}")
        parsed.append(dict(zip(("batch", "virtual_tokens", "accumulate"), map(positive, numbers))))
    return parsed


def label(case):
    return f"{case['batch']} / {case['virtual_tokens']} / {case['accumulate']}"


def shared_work(args):
    """What the configuration gives to both sides: model, data, init text, verbalizer, longest input."""
    try:
        config = tomllib.loads(args.config.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Failed(f"{args.config}: {error}") from None

    def value(key):
        at = config
        for name in key.split("."):
            if not isinstance(at, dict) or name not in at:
                raise Failed(f"{args.config}: no {key}, which both sides have to share")
            at = at[name]
        return at

    return {
        "model": args.model or value(MODEL_KEY), "data": args.data or value(DATA_KEY),
        "init_text": value(INIT_TEXT_KEY), "verbalizer": value(VERBALIZER_KEY),
        "max_input_tokens": value(MAX_INPUT_KEY),
    }


def optimizer_steps(args, case):
    """(warm-up, counted) optimizer steps of a case."""
    accumulate = case["accumulate"]
    return max(1, math.ceil(args.warmup / accumulate)), max(2, math.ceil(args.steps / accumulate))


# ---------------------------------------------------------------- the two sides


def run_gneiss(args, work, case, number):
    """A run of `gneiss tune` for the losses and the peak memory, and `gneiss bench` for the figures of quiet steps."""
    warmup, counted = optimizer_steps(args, case)
    name = "compare-" + label(case).replace(" / ", "-") + f"-{number}-{os.getpid()}"
    settings = {"name": name, "train.max_steps": max(2, warmup), "train.batch_size": case["batch"],
                "train.accumulate_steps": case["accumulate"], "prompt.num_virtual_tokens": case["virtual_tokens"],
                "prompt.kind": args.prompt_kind, "model.dtype": args.dtype, "train.shuffle": "false", "train.keep": "last", "data.validation": '""',
                "train.num_epochs": 1000}
    if args.data:
        settings[DATA_KEY] = args.data
    common = ["--model", args.model] if args.model else []
    common += [part for setting in args.set for part in ("--set", setting)]
    threads = {"RAYON_NUM_THREADS": str(args.threads)}
    _, peak = run([args.gneiss, "tune", str(args.config), *common, *(f"--set={k}={v}" for k, v in settings.items())], threads)
    steps = read_metrics(RUNS / name / "metrics.jsonl", settings["train.max_steps"])
    if not args.keep_runs:
        shutil.rmtree(RUNS / name)
    sizes = {"--batch": case["batch"], "--accumulate": case["accumulate"], "--virtual-tokens": case["virtual_tokens"],
             "--prompt-kind": args.prompt_kind, "--dtype": args.dtype, "--steps": counted, "--warmup": warmup, **({"--data": args.data} if args.data else {})}
    out, _ = run([args.gneiss, "bench", str(args.config), "--json", *common,
                  *(str(part) for pair in sizes.items() for part in pair)], threads)
    figures = json.loads(out)["cases"][0]
    return {"tool": "gneiss", "peak_rss_bytes": peak, "first_loss": steps[0]["loss"], "steps": counted,
            "disturbed": figures["disturbed_steps"], "examples_per_second": figures["examples_per_second"],
            "version": gneiss_version(args)}


def read_metrics(path, expected):
    """The objects of a run's metrics.jsonl, one an optimizer step."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise Failed(f"{path}: {error}") from None
    steps = [record for record in records if "loss" in record]  # the others are ends of epochs
    if len(steps) != expected:
        raise Failed(f"{path}: expected {expected} steps, found {len(steps)}")
    for number, step in enumerate(steps, 1):
        if missing := {"loss", "examples", "seconds"} - step.keys():
            raise Failed(f"{path}:{number}: no {sorted(missing)}")
    return steps


def run_peft(args, work, case, number):
    warmup, counted = optimizer_steps(args, case)
    command = [
        sys.executable, str(Path(__file__).with_name("peft_step.py")), "--model", work["model"],
        "--data", work["data"], "--verbalizer", work["verbalizer"], "--init-text", work["init_text"],
        "--max-input-tokens", str(work["max_input_tokens"]), "--batch", str(case["batch"]),
        "--virtual-tokens", str(case["virtual_tokens"]), "--accumulate", str(case["accumulate"]),
        "--prompt-kind", args.prompt_kind, "--dtype", args.dtype, "--threads", str(args.threads), "--steps", str(counted), "--warmup", str(warmup),
    ]
    out, _ = run(command + ["--plain-malloc"] * args.plain_malloc, {})
    report = json.loads(out.splitlines()[-1])
    quiet = report["step_quiet"][warmup:]
    rates = [n / s for n, s in zip(report["step_examples"], report["step_seconds"])][warmup:]
    return {"tool": "peft", "peak_rss_bytes": report["peak_rss_bytes"], "first_loss": report["losses"][0],
            "steps": counted, "disturbed": quiet.count(False),
            "examples_per_second": shapes.spread([rate for rate, use in zip(rates, canary.used(quiet)) if use]),
            "tokens_per_example": report["tokens_per_example"],
            "version": " ".join(f"{name} {text}" for name, text in report["versions"].items())}


# ---------------------------------------------------------------- results


def append_csv(args, machine, result):
    figures = result["examples_per_second"]
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tool": result["tool"], "batch": result["batch"], "virtual_tokens": result["virtual_tokens"],
        "accumulate": result["accumulate"], "prompt_kind": args.prompt_kind, "dtype": args.dtype, "threads": args.threads,
        "round": result["round"], "steps": result["steps"], "disturbed_steps": result["disturbed"],
        "examples_per_second_p50": figures["median"], "examples_per_second_p10": figures["p10"],
        "examples_per_second_p90": figures["p90"],
        "peak_rss_bytes": result["peak_rss_bytes"], "first_loss": result["first_loss"],
        "malloc": ("plain" if args.plain_malloc else "tuned") if result["tool"] == "peft" else "",
        **machine, "version": result["version"],
    }
    append_row(args.csv, row)


def of(results, tool, case):
    return [r for r in results if r["tool"] == tool and label(r) == label(case)]


def table(args, machine, results):
    """A Markdown table, one row a case, and what it was measured on."""
    lines = [
        "| batch / virtual tokens / accumulate | gneiss examples/s (by round) | PEFT examples/s (by round) | "
        "ratio (by round) | gneiss peak | PEFT peak | first loss, gneiss | first loss, PEFT | disturbed steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in args.cases:
        sides = [of(results, tool, case) for tool in ("gneiss", "peft")]
        ours, theirs = ([r["examples_per_second"]["median"] for r in side] for side in sides)
        peaks = [max(r["peak_rss_bytes"] for r in side) / 1e9 for side in sides]
        left_out = [f"{sum(r['disturbed'] for r in side)} of {sum(r['steps'] for r in side)}" for side in sides]
        lines.append(
            f"| {label(case)} | {over_rounds(ours)} | {over_rounds(theirs)} | "
            f"{over_rounds([a / b for a, b in zip(ours, theirs)])} | {peaks[0]:.2f} GB | {peaks[1]:.2f} GB | "
            f"{sides[0][0]['first_loss']:.5f} | {sides[1][0]['first_loss']:.5f} | {left_out[0]}, {left_out[1]} |")
    first = {tool: of(results, tool, args.cases[0])[0] for tool in ("gneiss", "peft")}
    tokens = statistics.fmean(r["tokens_per_example"] for r in results if r["tool"] == "peft")
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}; "
        f"{args.threads} threads, {args.dtype}, {args.rounds} rounds by turns, {tokens:.1f} tokens an example; "
        f"{first['gneiss']['version']}; {first['peft']['version']}, "
        f"malloc {'as it comes' if args.plain_malloc else 'tuned'}.",
    ]
    return "\n".join(lines)


def over_rounds(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def check_losses(args, results):
    """Whether both sides' losses of the first step agree in each case; says where not."""
    agree = True
    for case in args.cases:
        ours, theirs = (of(results, tool, case)[0]["first_loss"] for tool in ("gneiss", "peft"))
        difference = abs(ours - theirs) / abs(theirs)
        if not difference <= TOLERANCE[args.dtype]:
            agree = False
            print(f"{label(case)}: first losses differ by {difference:.2e} relative (gneiss {ours}, PEFT {theirs}; "
                  f"allowed {TOLERANCE[args.dtype]:.0e})", file=sys.stderr)
    return agree


if __name__ == "__main__":
    sys.exit(main())

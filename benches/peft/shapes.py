"""compare.py --models: the shapes of configs/models with random weights, by gneiss and by PEFT, on one device.

Both sides read the same token ids from a file: lengths are those of the reviews of data/ (benches/reviews.json), or
--tokens; the first tokens of the inputs are the same, as a template's are. The weights are random on both sides, so that
losses are not compared; the number of parameters is. A side that runs out of memory is shown as such.
"""

import argparse
import datetime
import json
import random
import re
import statistics
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import canary
from common import Failed, OutOfMemory, append_row, gneiss_version, run

ROUNDS, STEPS, WARMUP = 1, 5, 2
MODELS = Path("configs/models")
LENGTHS = Path(__file__).resolve().parents[1] / "reviews.json"
MADE_STEPS = 4  # optimizer steps whose examples are made, as gneiss bench does; after them they come again
SEED = 42


def models(text):
    """Paths of the config.json files that `A,B,...` names."""
    found = []
    for name in text.split(","):
        path = Path(name) if name.endswith(".json") else MODELS / f"{name}.json"
        if not path.is_file():
            raise argparse.ArgumentTypeError(f"no {path}; run this in the repository's root")
        found.append(path)
    return found


def compare(args, machine):
    """Runs everything, prints the table, and gives the exit code."""
    results, code = [], 0
    try:
        args.device_name = device_name(args, machine)
        with tempfile.TemporaryDirectory() as folder:
            for path in args.models:
                examples = Path(folder) / f"{name_of(path)}.json"
                examples.write_text(json.dumps({"examples": made(args, path)}))
                for number in range(1, args.rounds + 1):
                    results += [measured(args, side, path, examples, number) for side in (gneiss, peft)]
                    check_parameters(results[-2:])
    except Failed as failure:
        print(f"compare: {failure}", file=sys.stderr)
        code = 1
    if results:
        print(table(args, machine, results))
    return code


def device_name(args, machine):
    """The processor's name, or the GPU's as torch says it."""
    if args.device == "cpu":
        return machine["cpu"]
    program = "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]))"
    return run([sys.executable, "-c", program, args.device], {})[0].strip()


def made(args, path):
    """Examples of random tokens for a model, as many as MADE_STEPS optimizer steps take."""
    given = json.loads(LENGTHS.read_text())
    lengths = [args.tokens] if args.tokens else given["lengths"]
    if min(lengths) <= given["target"]:
        raise Failed(f"--tokens: expected over {given['target']}, which are the target's, found {min(lengths)}")
    rng, vocab = random.Random(SEED), json.loads(path.read_text())["vocab_size"]

    def tokens(n):
        return [rng.randrange(vocab) for _ in range(n)]

    head, examples = tokens(given["head"]), []
    for length in islice(cycle(lengths), MADE_STEPS * args.batch * args.accumulate):
        n = length - given["target"]
        shared = head[: n - 1]
        examples.append({"input": shared + tokens(n - len(shared)), "target": tokens(given["target"])})
    return examples


def name_of(path):
    return path.parent.name if path.name == "config.json" else path.stem


# ---------------------------------------------------------------- the two sides


def measured(args, side, path, examples, number):
    """The figures of one run, which are also appended to the file of results."""
    result = {"tool": side.__name__, "model": name_of(path), "round": number}
    try:
        result |= side(args, path, examples)
        rate = result["examples_per_second"]
        said = f"{rate['median']:.2f} examples/s ({rate['p10']:.2f}-{rate['p90']:.2f})"
    except OutOfMemory as starved:
        result["out_of_memory"] = str(starved)
        said = f"out of memory: {starved}"
    print(f"{result['model']} round {number} {result['tool']}: {said}", file=sys.stderr)
    append_row(results_file(args), row(args, result))
    return result


def sizes(args):
    return ["--batch", args.batch, "--virtual-tokens", args.virtual_tokens, "--accumulate", args.accumulate,
            "--prompt-kind", args.prompt_kind, "--steps", args.steps, "--warmup", args.warmup, "--device", args.device, "--dtype", args.dtype]


def gneiss(args, path, examples):
    command = [args.gneiss, "bench", "--model-config", path, "--examples", examples, "--json", *sizes(args)]
    out, peak = run([str(part) for part in command], {"RAYON_NUM_THREADS": str(args.threads)})
    report = json.loads(out)
    case = report["cases"][0]
    return {
        "examples_per_second": case["examples_per_second"], "step_seconds": case["step_seconds"]["median"],
        "peak_bytes": peak if args.device == "cpu" else case["peak_memory_bytes"],
        "share_of_peak": case["share_of_peak"], "matmul_peak": report["matmul_peak"]["flops_per_second"],
        "parameters": report["parameters"], "version": gneiss_version(args),
    }


def peft(args, path, examples):
    command = [sys.executable, Path(__file__).with_name("peft_step.py"), "--model-config", path, "--examples", examples,
               "--threads", args.threads, *sizes(args), *["--plain-malloc"] * args.plain_malloc]
    out, _ = run([str(part) for part in command], {})
    report = json.loads(out.splitlines()[-1])
    if "out_of_memory" in report:
        raise OutOfMemory(report["out_of_memory"])
    steps = list(zip(report["step_examples"], report["step_seconds"]))[args.warmup :]
    if args.device == "cpu":
        steps = [step for step, use in zip(steps, canary.used(report["step_quiet"][args.warmup :])) if use]
    return {
        "examples_per_second": spread([examples / seconds for examples, seconds in steps]),
        "step_seconds": statistics.median(seconds for _, seconds in steps),
        "peak_bytes": report["peak_rss_bytes"] if args.device == "cpu" else report["peak_device_bytes"],
        "parameters": report["parameters"],
        "version": " ".join(f"{name} {text}" for name, text in report["versions"].items()),
    }


def spread(values):
    """Median, 10th and 90th percentile, as gneiss bench takes them."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[8]}


def check_parameters(pair):
    found = {r["tool"]: r["parameters"] for r in pair if "parameters" in r}
    if len(set(found.values())) > 1:
        raise Failed(f"{pair[0]['model']}: the two sides built different models: parameters {found}")


# ---------------------------------------------------------------- results


def results_file(args):
    """DATE-DEVICE.csv in the folder of results."""
    args.results.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", args.device_name.lower()).strip("-")
    return args.results / f"{datetime.date.today().isoformat()}-{device}.csv"


def row(args, result):
    rate = result.get("examples_per_second", {})
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "tool": result["tool"],
        "model": result["model"], "device": args.device, "device_name": args.device_name,
        "dtype": args.dtype, "batch": args.batch, "virtual_tokens": args.virtual_tokens, "accumulate": args.accumulate,
        "prompt_kind": args.prompt_kind,
        "tokens": args.tokens or "reviews", "threads": args.threads, "round": result["round"], "steps": args.steps,
        "warmup": args.warmup, "examples_per_second_p50": rate.get("median", ""),
        "examples_per_second_p10": rate.get("p10", ""), "examples_per_second_p90": rate.get("p90", ""),
        "step_seconds_p50": result.get("step_seconds", ""), "peak_bytes": result.get("peak_bytes", ""),
        "share_of_matmul_peak": result.get("share_of_peak", ""),
        "matmul_peak_flops_per_second": result.get("matmul_peak", ""), "parameters": result.get("parameters", ""),
        "out_of_memory": "out_of_memory" in result, "version": result.get("version", ""),
    }


def table(args, machine, results):
    """A Markdown table, one row a model, and what it was measured on."""
    lines = ["| model | gneiss, examples/s | PEFT, examples/s | ratio | gneiss, peak memory | PEFT, peak memory | "
             "gneiss, of the matmul peak |", "|---|---|---|---|---|---|---|"]
    for path in args.models:
        of = {tool: [r for r in results if r["tool"] == tool and r["model"] == name_of(path)]
              for tool in ("gneiss", "peft")}
        rates = {tool: rate(runs) for tool, runs in of.items()}
        ratio = f"**{rates['gneiss'] / rates['peft']:.2f}**" if all(rates.values()) else "-"
        shares = [r["share_of_peak"] for r in of["gneiss"] if "share_of_peak" in r]
        share = f"{100 * statistics.median(shares):.1f} %" if shares else "-"
        lines.append(f"| {name_of(path)} | {cell(of['gneiss'])} | {cell(of['peft'])} | {ratio} | {peak(of['gneiss'])} | "
                     f"{peak(of['peft'])} | {share} |")
    versions = [next((r["version"] for r in results if r["tool"] == tool and "version" in r), f"no {tool}")
                for tool in ("gneiss", "peft")]
    peaks = [r["matmul_peak"] for r in results if "matmul_peak" in r]
    where = "" if args.device == "cpu" else f"{args.device_name}, "
    lines += ["", f"{where}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {args.dtype}, batch "
              f"{args.batch} x accumulation {args.accumulate}, {args.virtual_tokens} virtual tokens, "
              f"{'examples of %d tokens' % args.tokens if args.tokens else 'lengths of the reviews'}; medians of "
              f"{args.steps} steps behind {args.warmup}, {args.rounds} rounds by turns"
              + (f"; matmul peak {max(peaks) / 1e12:.3g} TFLOP/s" if peaks else "") + f"; {'; '.join(versions)}."]
    return "\n".join(lines)


def rate(runs):
    """Median over the rounds; `None` where a round gave none."""
    if not runs or any("out_of_memory" in r for r in runs):
        return None
    return statistics.median(r["examples_per_second"]["median"] for r in runs)


def cell(runs):
    if not runs:
        return "not run"
    found = rate(runs)
    if found is None:
        return "out of memory"
    low, high = (pick(r["examples_per_second"][p] for r in runs) for pick, p in ((min, "p10"), (max, "p90")))
    return f"{found:.2f} ({low:.2f}-{high:.2f})"


def peak(runs):
    found = [r["peak_bytes"] for r in runs if r.get("peak_bytes")]
    return f"{max(found) / 1e9:.2f} GB" if found else "-"

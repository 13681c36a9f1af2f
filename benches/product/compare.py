"""gneiss' product of a frozen bf16 weight beside torch's (oneDNN), and both beside the floor, in one run.

    python benches/product/compare.py [--threads N] [--filter 512x] [--json result_product.json]

Run it in the repository's root, on an idle machine, with a Python that has torch. It runs `cargo bench --bench product`,
reads what criterion wrote, then times torch at the same shapes: y = x @ w.t() and dx = dy @ w, w rotating over as many
matrices. Rates are of the median time. The floor is the faster of two loops over registers
alone, in bf16 and in f32 (benches/product.rs).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CRITERION = Path("target/criterion")
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)$")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--filter", default="", help="shapes whose name holds this alone")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    begun = time.time()
    command = ["cargo", "bench", "--bench", "product", "--", *([args.filter] if args.filter else [])]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    if args.filter:
        subprocess.run([*command[:-1], "floor"], check=True, env=environment, stdout=sys.stderr)
    torch.set_num_threads(args.threads)
    floor = max(rates("floor", begun).values(), default=None)
    ours, rows = rates("product", begun), []
    for shape in sorted({shape for _, shape in ours}):
        for direction in ("forward", "backward"):
            rows.append({"shape": shape, "direction": direction, "gneiss": ours[direction, shape],
                         "torch": of_torch(shape, direction), "floor": floor})
    print("| product | direction | gneiss, GFLOP/s | torch bf16 | gneiss of torch | gneiss of the floor |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        m, k, n = row["shape"]
        of_floor = f"{row['gneiss'] / floor:.0%}" if floor else "not known"
        print(f"| [{m}, {k}] x [{k}, {n}] | {row['direction']} | {row['gneiss']:.0f} | {row['torch']:.0f} | "
              f"{row['gneiss'] / row['torch']:.0%} | {of_floor} |")
    print(f"\nFloor {floor:.0f} GFLOP/s; " if floor else "\n", f"{args.threads} threads, torch {torch.__version__}.", sep="")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


def rates(group, since):
    """GFLOP/s of what criterion measured after `since`, by direction and shape."""
    found = {}
    for path in (CRITERION / group).glob("**/new/benchmark.json"):
        if path.stat().st_mtime < since:
            continue
        benchmark = json.loads(path.read_text())
        estimates = json.loads((path.parent / "estimates.json").read_text())
        seconds = estimates["median"]["point_estimate"] * 1e-9
        shape = SHAPE.search(benchmark["value_str"] or "")
        key = (benchmark["function_id"], tuple(map(int, shape.groups()))) if shape else benchmark["full_id"]
        found[key] = benchmark["throughput"]["Elements"] / seconds / 1e9
    return found


def of_torch(shape, direction):
    m, k, n = shape
    weights = [torch.randn(n, k).bfloat16() for _ in range(max(2, min(8, 400_000_000 // (2 * k * n))))]
    given = torch.randn(m, k if direction == "forward" else n).bfloat16()
    times, begun = [], time.perf_counter()
    while len(times) < 12 or time.perf_counter() - begun < 1.8:
        weight = weights[len(times) % len(weights)]
        started = time.perf_counter()
        given @ (weight.t() if direction == "forward" else weight)
        times.append(time.perf_counter() - started)
    return 2 * m * k * n / statistics.median(times[2:]) / 1e9


if __name__ == "__main__":
    main()

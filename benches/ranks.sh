#!/usr/bin/env bash
# Seconds of a tuning step on one process of one thread and on RANKS ranks of one thread each, by turns:
#
#   benches/ranks.sh MODEL [RANKS] [STEPS]
#
# MODEL is a folder or a .gguf file; GNEISS names the program, a release build with MPI (make mpi). Prints one line of JSON for each
# case: the median of a step's seconds, without the first two steps, of each of three runs, and the ratio of their medians.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 ranks=${2:-2} steps=${3:-12}
gneiss=$(realpath "${GNEISS:-target/release/gneiss}")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export RAYON_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# batch_size num_virtual_tokens accumulate_steps name [launcher...]: median of the steps' seconds
seconds() {
    local batch=$1 tokens=$2 accumulate=$3 name=$4
    shift 4
    "$@" "$gneiss" tune configs/tutorial.toml --model "$model" --device cpu --set "runs=$out" --set "name=$name" \
        --set "train.batch_size=$batch" --set "train.accumulate_steps=$accumulate" --set "prompt.num_virtual_tokens=$tokens" \
        --set "train.max_steps=$steps" --set 'data.validation=""' --set train.keep=last >"$out/log" 2>&1 || { cat "$out/log" >&2; return 1; }
    python3 - "$out/$name/metrics.jsonl" <<'PY'
import json, statistics, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
print(statistics.median(step["seconds"] for step in steps[2:] if "learning_rate" in step))
PY
    rm -rf "${out:?}/$name"
}

for case in "8 100 1" "8 100 16"; do
    read -r batch tokens accumulate <<<"$case"
    one=() several=()
    for _ in 1 2 3; do
        one+=("$(seconds "$batch" "$tokens" "$accumulate" one)")
        several+=("$(seconds "$batch" "$tokens" "$accumulate" several mpirun -n "$ranks" --bind-to none)")
    done
    python3 - "$case" "$ranks" "${one[*]}" "${several[*]}" <<'PY'
import json, statistics, sys
case, ranks, one, several = sys.argv[1:]
one, several = ([float(value) for value in values.split()] for values in (one, several))
speedup = statistics.median(one) / statistics.median(several)
print(json.dumps({"batch, virtual tokens, accumulation": case, "ranks": int(ranks), "one process, s": one,
                  "ranks, s": several, "speed-up": round(speedup, 3), "efficiency": round(speedup / int(ranks), 3)}))
PY
done

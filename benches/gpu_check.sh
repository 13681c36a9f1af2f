#!/bin/sh
# What a machine with a GPU has to show, from a built binary: no Rust toolchain is needed.
#
#   benches/gpu_check.sh [path of gneiss] [cuda|metal]
#
# 1. compute-sanitizer (memcheck, racecheck) over every kernel, where it is installed
# 2. every op against the CPU in f32, bf16 and f16, and short tuning runs whose losses follow the CPU's
# 3. time per op of a step of the shapes of MODELS
# 4. tuning throughput beside Hugging Face PEFT, where torch, transformers and peft are installed (CUDA)
#
# MODELS="granite-4.0-350m ..." names shapes of configs/models; OUT is a folder for the results (default
# benches/results).
set -eu
cd "$(dirname "$0")/.."
gneiss=${1:-target/release/gneiss}
device=${2:-cuda}
models=${MODELS:-granite-4.0-350m granite-3.3-2b granite-4.1-8b}
python=${PYTHON:-python3}
out=${OUT:-benches/results}
mkdir -p "$out"
rows=$out/gpu_check.rows
: >"$rows"
failed=0

row() {
    printf '%-22s %s\n' "$1" "$2" >>"$rows"
}

# step NAME LOG PATTERN COMMAND...: runs a step, its output in a file of its own as well; the last line that matches goes
# into the table.
step() {
    name=$1 log=$out/$2.log pattern=$3
    shift 3
    echo "== $name"
    if "$@" >"$log" 2>&1; then result=passed; else result=FAILED failed=1; fi
    cat "$log"
    row "$name" "$result: $(grep -E "$pattern" "$log" | tail -1 | tr -s " ")"
}

if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "sanitizer, $tool" "$tool" "ERROR SUMMARY|hazards" compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$gneiss" check --device "$device" --steps 2
    done
else
    row "sanitizer" "not run: compute-sanitizer is not here"
fi

step "$device against the CPU" check "comparisons and" "$gneiss" check --device "$device" --steps 30

for model in $models; do
    # Batch, ms, examples, tokens and rows a second, rows, at a time, FLOP, FLOP/s, share of the peak, peak memory.
    step "$model" "steps-$(basename "$model")" "^8 x 16" "$gneiss" bench --model-config "configs/models/$model.json" --device "$device" \
        --batch 8 --accumulate 16 --virtual-tokens 100 --steps 10 --profile --csv "$out/steps.csv"
done

if [ "$device" = cuda ] && "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
    step "beside PEFT" peft "^\| .*gneiss" "$python" benches/peft/compare.py --gneiss "$gneiss" \
        --models "$(echo "$models" | tr ' ' ',')" --device cuda --dtype bf16 --batch 8 --virtual-tokens 100 \
        --accumulate 16
else
    row "beside PEFT" "not run: torch, transformers and peft for $device are not here"
fi

echo
echo "== gpu-check, $device"
cat "$rows"
if [ -s "$out/peft.log" ]; then grep '^|' "$out/peft.log" || true; fi
exit "$failed"

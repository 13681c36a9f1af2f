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

if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer, $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex-exclude kns=cutlass \
            "$gneiss" check --device "$device" --steps 2 2>"$out/$tool.log" || { tail -40 "$out/$tool.log"; exit 1; }
    done
else
    echo "== compute-sanitizer: none here"
fi

echo "== $device against the CPU"
"$gneiss" check --device "$device" --steps 30

for model in $models; do
    echo "== time per op, $model, rows of 128 examples to a step"
    "$gneiss" bench --model-config "configs/models/$model.json" --device "$device" --batch 8 --accumulate 16 \
        --virtual-tokens 100 --steps 10 --profile --csv "$out/steps.csv"
done

if [ "$device" = cuda ] && "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
    echo "== beside PEFT"
    "$python" benches/peft/compare.py --gneiss "$gneiss" --models "$(echo "$models" | tr ' ' ',')" \
        --device cuda --dtype bf16 --batch 8 --virtual-tokens 100 --accumulate 16
else
    echo "== PEFT: torch, transformers and peft for $device are not here"
fi

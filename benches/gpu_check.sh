#!/bin/sh
# The first hour on a GPU: what a machine has to show, from a built binary. No Rust toolchain is needed.
#
#   benches/gpu_check.sh [path of gneiss] [cuda|cuda:N|metal|cpu]
#
#   check      every op against the CPU in f32, bf16 and f16, and short runs whose losses follow the CPU's
#   large      the ops at the sizes of real models, and a step in several passes, against plain ops on the GPU
#   bench      a step of 8 x 32 reviews of each shape of MODELS: time per op, share of the sustained matmul peak and of
#              the data sheet, launches
#   graphs     tokens of one text with GNEISS_CUDA_GRAPHS=1 and without, and the time of each
#   sanitizer  compute-sanitizer's memcheck, racecheck, synccheck and initcheck over the kernels
#   nsys       Nsight Systems over three steps
#   tutorial   the tutorial from data to served prompt
#   peft       the step beside Hugging Face PEFT's
#
# What is not installed is not run, and said. The end is a verdict a line, and what to do about each that failed; the
# exit code is 1 if one did. Everything takes BUDGET seconds at the most.
#
#   STEPS="check large"          these steps alone, in this order
#   MODELS="granite-4.1-8b"      shapes of configs/models, or paths of config.json files
#   OUT=folder                   for all output; default benches/results
#   BUDGET=840                   seconds for everything; what does not begin in time is not run
#   PATIENCE=1                   times as long as each step may take
#   MODEL=file                   the tutorial's model; default models/SmolLM2-135M-Instruct.Q4_1.gguf
#   PYTHON=python                with torch, transformers and peft
#   SMALL=1                      small sizes, to try this script where no GPU is
set -u
cd "$(dirname "$0")/.." || exit 1
gneiss=${1:-target/release/gneiss}
device=${2:-cuda}
steps=${STEPS:-check large bench graphs sanitizer nsys tutorial peft}
small=${SMALL:-0}
budget=${BUDGET:-840}
patience=${PATIENCE:-1}
model=${MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
python=${PYTHON:-python3}
out=${OUT:-benches/results}
if [ "$small" = 1 ]; then
    models=${MODELS:-tests/golden/granite/config.json}
    runs=2 scale=32 sanitized=64 batch=2 accumulate=2 tokens=5 counted=2 dtypes=f32
else
    models=${MODELS:-granite-4.0-350m granite-3.3-2b granite-4.1-8b}
    runs=30 scale=1 sanitized=8 batch=8 accumulate=32 tokens=100 counted=10 dtypes=bf16,f32
fi
[ "$device" = cpu ] && dtypes=f32

if ! [ -x "$gneiss" ]; then
    echo "gpu-check: expected the program gneiss at $gneiss, found none; hint: make cuda" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
verdicts=$out/gpu_check.txt
: >"$verdicts"
began=$(date +%s)
failed=0

have() {
    command -v "$1" >/dev/null 2>&1
}

is_cuda() {
    case $device in cuda*) true ;; *) false ;; esac
}

shape() {
    if [ -f "$1" ]; then echo "$1"; else echo "configs/models/$1.json"; fi
}

# The name of a shape's file, or of the folder of a config.json.
shape_name() {
    file_name=$(basename "$1" .json)
    if [ "$file_name" = config ]; then basename "$(dirname "$1")"; else echo "$file_name"; fi
}

# verdict NAME RESULT TEXT [WHAT TO DO]
verdict() {
    printf '%-28s %s: %s\n' "$1" "$2" "$3" >>"$verdicts"
    if [ "$2" = FAILED ]; then
        failed=1
        printf '%-28s   what to do: %s\n' "" "$4" >>"$verdicts"
    fi
}

# step NAME LOG SECONDS PATTERN WHAT_TO_DO COMMAND...: runs a command with its output in a file; the last line that
# matches becomes its verdict. False unless it passed.
step() {
    step_name=$1 log=$out/$2.log seconds=$(($3 * patience)) pattern=$4 step_hint=$5
    shift 5
    left=$((budget - $(date +%s) + began))
    if [ "$left" -lt 5 ]; then
        verdict "$step_name" "not run" "the $budget s of BUDGET are over"
        return 1
    fi
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $step_name (at most $seconds s)"
    asked=$*
    if have timeout; then set -- timeout -k 5 "$seconds" "$@"; fi
    started=$(date +%s)
    "$@" >"$log" 2>&1
    code=$?
    cat "$log"
    line=$(grep -E "$pattern" "$log" | tail -1 | tr -s ' ' | sed 's/^[= ]*//')
    took=$(($(date +%s) - started))
    case $code in
        0) verdict "$step_name" passed "${line:-in $took s}" ;;
        124 | 137) verdict "$step_name" FAILED "not done within $seconds s" \
            "read the end of $log, then run it alone with more PATIENCE and BUDGET: $asked" ;;
        *) verdict "$step_name" FAILED "${line:-exit code $code, $log}" "$step_hint" ;;
    esac
    return "$code"
}

run_check() {
    step "$device against the CPU" check 120 "comparisons and|^error|^Error" \
        "the table in $out/check.log names op, dtype and shape; 'gneiss check --op NAME' repeats it, and until it passes use another dtype or --device cpu." \
        "$gneiss" check --device "$device" --steps "$runs"
}

run_large() {
    step "real sizes" large 150 "^check --large in|^error|^Error" \
        "the lines FAILED in $out/large.log name op, dtype and shape; if 'check' passes, the fault comes with the size (tiles, 32-bit places, split passes)." \
        "$gneiss" check --device "$device" --large --scale "$scale"
}

run_bench() {
    for model_name in $models; do
        file=$(shape "$model_name") model_name=$(shape_name "$model_name")
        # Batch, ms, examples, tokens and rows a second, rows, at a time, FLOP, FLOP/s, of peak, of data sheet, memory,
        # disturbed steps (a CPU's alone).
        step "step, $model_name" "bench-$model_name" 90 "^$batch x $accumulate|^error|^Error" \
            "the error in $out/bench-$model_name.log says why; for too little memory take a smaller shape or --max-rows 2048." \
            "$gneiss" bench --model-config "$file" --device "$device" --batch "$batch" --accumulate "$accumulate" \
            --virtual-tokens "$tokens" --steps "$counted" --profile --csv "$out/steps.csv" || continue
        bench_verdicts "$model_name" "$out/bench-$model_name.log"
    done
}

# What a step's log says beside its time.
bench_verdicts() {
    peak=$(grep "^matmul peak" "$2" | tail -1)
    # Whole per cent of the data sheet; nothing of a card that is not known.
    share=$(echo "$peak" | sed -n 's/.*; \([0-9]*\)[0-9.]* % of the data sheet.*/\1/p')
    if [ -n "$share" ] && [ "$share" -lt 50 ]; then
        verdict "sustained matmul, $1" FAILED "$peak" \
            "the card is shared, capped or hot: nvidia-smi -q -d PERFORMANCE,POWER,CLOCK names the reason; no share of the peak means anything before."
    else
        verdict "sustained matmul, $1" passed "$peak"
    fi
    launches=$(grep "^launches:" "$2" | tail -1)
    case $launches in
        "") verdict "launches, $1" "not run" "$device launches nothing" ;;
        *"is bound by launches"*) verdict "launches, $1" FAILED "$launches" \
            "the host is too slow for this step: more rows a step (--batch, --accumulate), a faster or less busy CPU." ;;
        *) verdict "launches, $1" passed "$launches" ;;
    esac
}

# Decoding by graphs against decoding without: one text, so that the host is the slower side.
run_graphs() {
    name="decoding by graphs"
    if ! is_cuda; then
        verdict "$name" "not run" "$device has no graphs"
        return
    fi
    if ! [ -f "$model" ]; then
        verdict "$name" "not run" "no $model; hint: make model"
        return
    fi
    hint="unset GNEISS_CUDA_GRAPHS, which is off unless it is set; everything else works without it."
    for graphs in 0 1; do
        for tokens in 8 264; do
            left=$((budget - $(date +%s) + began)) log=$out/graphs-$graphs-$tokens
            if [ "$left" -lt 5 ]; then
                verdict "$name" "not run" "the $budget s of BUDGET are over"
                return
            fi
            echo "== $name: GNEISS_CUDA_GRAPHS=$graphs, $tokens tokens"
            set -- "$gneiss" generate --model "$model" --device "$device" --dtype bf16 --max-new-tokens "$tokens" "Once upon a time there was a dog"
            if have timeout; then set -- timeout -k 5 "$left" "$@"; fi
            started=$(date +%s%3N)
            if ! GNEISS_CUDA_GRAPHS=$graphs "$@" >"$log.txt" 2>"$log.log"; then
                verdict "$name" FAILED "GNEISS_CUDA_GRAPHS=$graphs: $(tail -1 "$log.log")" "$hint"
                return
            fi
            echo $(($(date +%s%3N) - started)) >"$log.ms"
        done
    done
    # Microseconds a token: what 256 tokens more take.
    for graphs in 0 1; do
        echo $((($(cat "$out/graphs-$graphs-264.ms") - $(cat "$out/graphs-$graphs-8.ms")) * 1000 / 256)) >"$out/graphs-$graphs.us"
    done
    times="$(cat "$out/graphs-0.us") us a token without graphs, $(cat "$out/graphs-1.us") with"
    if grep -q "^warning" "$out/graphs-1-264.log"; then
        verdict "$name" FAILED "$(grep "^warning" "$out/graphs-1-264.log" | head -1)" "$hint"
    elif ! cmp -s "$out/graphs-0-264.txt" "$out/graphs-1-264.txt"; then
        verdict "$name" FAILED "other tokens than without graphs; $times" "$hint"
    else
        verdict "$name" passed "the same tokens; $times"
    fi
}

run_sanitizer() {
    if ! is_cuda || ! have compute-sanitizer; then
        verdict sanitizer "not run" "compute-sanitizer is not here, or $device is not CUDA"
        return
    fi
    sanitize memcheck odd-shapes "an access beyond a buffer: the report in the log names kernel, thread and address." \
        --steps 1 --dtype "$dtypes"
    sanitize memcheck large "an access beyond a buffer: the report in the log names kernel, thread and address." \
        --large --scale "$sanitized" --dtype "$dtypes"
    sanitize racecheck large "two threads meet in shared memory: the report names the kernel; results may differ from run to run, do not tune with it." \
        --large --scale "$sanitized" --dtype "$dtypes"
    sanitize synccheck large "a barrier that not all threads reach: the report names the kernel; it may hang on another card." \
        --large --scale "$sanitized" --dtype "$dtypes"
    sanitize initcheck large "memory read before it is written: of a kernel of kernels/ it is a fault of gneiss, of cuBLAS's (cublas, cutlass, gemm in the name) it may be padding that does not count." \
        --large --scale "$sanitized" --dtype "$dtypes"
}

# sanitize TOOL WHAT WHAT_TO_DO ARGUMENTS...
sanitize() {
    tool=$1 what=$2 hint=$3
    shift 3
    step "$tool, $what" "$tool-$what" 90 "ERROR SUMMARY|RACECHECK SUMMARY|hazard" "$hint" \
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$gneiss" check --device "$device" "$@"
}

run_nsys() {
    if ! is_cuda || ! have nsys; then
        verdict nsys "not run" "nsys is not here, or $device is not CUDA"
        return
    fi
    step "three steps under nsys" nsys 120 "cuda_gpu_kern_sum|^error|^Error" \
        "profiling may need rights: see NVIDIA's 'ERR_NVGPUCTRPERM', or run it as root; gneiss itself is not at fault if 'step' passed." \
        nsys profile --stats=true --force-overwrite true --output "$out/nsys" \
        "$gneiss" bench --model-config "$(shape "${models%% *}")" --device "$device" --batch "$batch" \
        --accumulate "$accumulate" --virtual-tokens "$tokens" --steps 3 --warmup 1
}

run_tutorial() {
    if ! [ -f "$model" ]; then
        verdict tutorial "not run" "no $model; hint: make model"
        return
    fi
    set -- --set name=gpu-check --model "$model" --device "$device"
    if [ "$small" = 1 ]; then
        for part in train validation test; do
            head -n 9 "data/$part.csv" >"$out/$part.csv" || return
            set -- "$@" --set "data.$part=$out/$part.csv"
        done
        set -- "$@" --set train.max_steps=1 --set train.warmup_ratio=0
    fi
    step tutorial tutorial 180 "[Aa]ccuracy|tuned|^error|^Error" \
        "if 'check' passed, compare the losses of runs/gpu-check/metrics.csv with a run of --device cpu: where they part is where to look." \
        "$gneiss" tutorial "$@"
}

run_peft() {
    if ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
        verdict "beside PEFT" "not run" "$python has no torch, transformers and peft"
        return
    fi
    case $device in metal) verdict "beside PEFT" "not run" "compare.py knows cpu and cuda"; return ;; esac
    paths=""
    for each in $models; do paths=$paths${paths:+,}$(shape "$each"); done
    [ "$device" = cpu ] && dtype=f32 || dtype=bf16
    step "beside PEFT" peft 300 "^\| .*gneiss|^compare:" \
        "if the step of gneiss passed, the error is PEFT's or its memory's: STEPS=peft MODELS=granite-4.0-350m takes the smallest alone." \
        "$python" benches/peft/compare.py --gneiss "$gneiss" --models "$paths" --device "$device" --dtype "$dtype" \
        --batch "$batch" --virtual-tokens "$tokens" --accumulate "$accumulate"
    [ -s "$out/peft.log" ] && grep '^|' "$out/peft.log" >"$out/peft.md"
}

for part in $steps; do
    case $part in
        check) run_check ;;
        large) run_large ;;
        bench) run_bench ;;
        graphs) run_graphs ;;
        sanitizer) run_sanitizer ;;
        nsys) run_nsys ;;
        tutorial) run_tutorial ;;
        peft) run_peft ;;
        *)
            echo "gpu-check: expected in STEPS check, large, bench, graphs, sanitizer, nsys, tutorial or peft, found $part" >&2
            exit 2
            ;;
    esac
done

echo
echo "== gpu-check, $device, $(($(date +%s) - began)) s"
cat "$verdicts"
if [ -s "$out/peft.md" ]; then cat "$out/peft.md"; fi
exit "$failed"

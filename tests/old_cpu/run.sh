#!/usr/bin/env bash
# Runs a built program on CPUs without AVX, emulated by qemu-user (Debian: apt-get install qemu-user):
#   tests/old_cpu/run.sh target/release/gneiss
#   tests/old_cpu/run.sh dist/gneiss_tune-VERSION-py3-none-manylinux_2_28_x86_64.whl
# An instruction that such a CPU lacks ends an emulated program with SIGILL. Two steps of tuning a small model must
# give the losses that this machine's own CPU gives. Says nothing about speed.
set -euo pipefail
program=$(realpath "${1:?the program, or a wheel that has it}")
cd "$(dirname "$0")/../.."
emulator=$(command -v qemu-x86_64) || { echo "qemu-x86_64: not found; Debian: apt-get install qemu-user" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
if [[ $program == *.whl ]]; then
    python3 -m zipfile -e "$program" "$folder/wheel"
    program=$(echo "$folder"/wheel/gneiss_tune-*.data/scripts/gneiss)
    chmod +x "$program"
fi

tune() { # tune NAME [EMULATOR...]: tunes, evaluates, and prints the losses
    local name=$1
    shift
    "$@" "$program" --quiet tune configs/tutorial.toml --model tests/fixtures/granite.gguf --device cpu --dtype f32 \
        --set train.max_steps=2 --set runs="$folder" --set name="$name" > "$folder/$name.log"
    python3 - "$folder/$name/summary.json" <<'END'
import json, sys
summary = json.load(open(sys.argv[1]))
print(f"{summary['train_loss']:.4f} {summary['validation_loss']:.4f}")
END
}

expected=$(tune own)
echo "this CPU: losses $expected"
failed=0
# An early x86-64 CPU (SSE2), the first Core i7 (SSE4.2 and POPCNT), and all that qemu emulates (AVX2, no AVX-512).
for cpu in Opteron_G1 Nehalem max; do
    "$emulator" -cpu "$cpu" "$program" --version | sed -n "s/^CPU/$cpu:/p"
    found=$(tune "$cpu" "$emulator" -cpu "$cpu") || { echo "$cpu: FAILED, exit code $?"; failed=1; continue; }
    "$emulator" -cpu "$cpu" "$program" check --device cpu --steps 0 --op linear,rms_norm,rope,swiglu,conv,ssd,experts,cross_entropy,adamw \
        > "$folder/check.log" 2>&1 || { echo "$cpu: FAILED: $(tail -n 1 "$folder/check.log")"; failed=1; continue; }
    python3 - "$expected" "$found" <<'END' || { echo "$cpu: FAILED: losses $found"; failed=1; continue; }
import sys
pairs = [map(float, words) for words in zip(sys.argv[1].split(), sys.argv[2].split())]
sys.exit(any(abs(a - b) > 1e-3 for a, b in pairs))
END
    echo "$cpu: passed, losses $found"
done
exit $failed

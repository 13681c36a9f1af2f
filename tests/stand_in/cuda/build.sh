#!/usr/bin/env bash
# Makes the stand-in for CUDA's libraries in FOLDER, and gneiss's kernels for the emulator beside it:
#   tests/stand_in/cuda/build.sh FOLDER INCLUDE
# INCLUDE is the folder of cuda.h.
set -euo pipefail
cd "$(dirname "$0")/../../.."
folder=${1:?a folder} include=${2:?the folder of cuda.h}
mkdir -p "$folder"
compiler=${CXX:-c++}

newer() { # newer FILE SOURCES...: whether a source is newer than the file, or the file is not there
    local file=$1
    shift
    [ ! -e "$file" ] || [ -n "$(find "$@" -newer "$file" -print -quit)" ]
}

kernels() {
    local out=$folder/kernels_$1.so
    if newer "$out" kernels; then
        "$compiler" -std=c++17 -O1 -fPIC -shared -Wall -Werror -include kernels/emulated.h "-DELEMENT_$1" -x c++ kernels/*.cu \
            kernels/emulated/emulate.cpp -o "$out.part"
        mv "$out.part" "$out"
    fi
}

stand_in() {
    local out=$folder/libcuda.so.1
    if newer "$out" tests/stand_in/cuda kernels/emulated; then
        "$compiler" -std=c++17 -O3 -fPIC -shared -Wall -Werror -isystem "$include" -iquote kernels tests/stand_in/cuda/*.cpp -ldl \
            -Wl,-soname,libcuda.so.1 -o "$out.part"
        mv "$out.part" "$out"
    fi
    # One library under all names: it is loaded once. The names without a version are the linker's.
    for name in libcuda.so.1 libcudart.so.13 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnvrtc.so.13; do
        [ "$name" = libcuda.so.1 ] || ln -sf libcuda.so.1 "$folder/$name"
        ln -sf libcuda.so.1 "$folder/${name%.so.*}.so"
    done
}

pids=()
for element in F32 BF16 F16; do
    kernels "$element" &
    pids+=($!)
done
stand_in
for pid in "${pids[@]}"; do wait "$pid"; done

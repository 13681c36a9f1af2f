#!/usr/bin/env python3
"""Plants faults in the host code of a CUDA build, one by one in a copy, and sees whether the tests on the stand-in find each.

    tests/stand_in/cuda/plant.py TESTS FOLDER [--only PART] [--first N]

TESTS is the binary of tests/cuda (`make test-cuda` builds it), FOLDER a folder for the copy and what is built from it. The
environment is that of `make test-cuda`. Prints a line a fault: the test that found it first, or NOT FOUND (exit code 1).
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CUDA, START, BLAS, LT = (f"src/ops/backend/gpu/{name}.rs" for name in ["cuda", "cuda/start", "cuda/blas", "cuda/lt"])

DECODING, GRAPHS = "src/model/decoding.rs", "src/ops/backend/gpu/graphs.rs"

# What is wrong, file, text, text with the fault; or several texts and what takes their places.
FAULTS = [
    ("buffers in another order", CUDA, "for address in &addresses {", "for address in addresses.iter().rev() {"),
    ("a buffer too few", CUDA, "for address in &addresses {", "for address in addresses.iter().skip(1) {"),
    ("parameters before the buffers", CUDA, "    for address in &addresses {", "    arguments.arg(&parameters);\n    for address in &addresses {"),
    ("no parameters", CUDA, "    arguments.arg(&parameters);\n    let [x", "    let [x"),
    ("a view's offset is left out", CUDA, "Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)",
     "let _at = layout.start_offset();\n    Ok(base)"),
    ("a view's offset in elements", CUDA, "(layout.start_offset() * tensor.dtype().size_in_bytes()) as u64", "layout.start_offset() as u64"),
    ("machine code of another dtype", CUDA, "let Some(code) = fatbin(kernel.file, element) else {",
     "let Some(code) = fatbin(kernel.file, DType::F32) else {"),
    ("functions are kept without their dtype", CUDA, "loaded.functions.insert((device.id(), kernel.name, element), function.clone());",
     "for e in [DType::F32, DType::BF16, DType::F16] {\n        loaded.functions.insert((device.id(), kernel.name, e), function.clone());\n    }"),
    ("more shared memory is not asked for", CUDA, "if kernel.shared > PLAIN_SHARED_BYTES {", "if kernel.shared > 4 * PLAIN_SHARED_BYTES {"),
    ("half of the shared memory", CUDA, "shared_mem_bytes: super::uint(kernel.shared),", "shared_mem_bytes: super::uint(kernel.shared / 2),"),
    ("grid's dimensions swapped", CUDA, "grid_dim: (x, y, z),", "grid_dim: (y, x, z),"),
    ("a block too few", CUDA, "grid_dim: (x, y, z),", "grid_dim: (x.max(2) - 1, y, z),"),
    ("a struct of parameters with a field too few", "src/ops/cross_entropy/gpu.rs",
     ("    stride: u32,\n    per_row", "        stride: gpu::uint(stride),\n"),
     ("    per_row", "")),
    ("a struct of parameters in another order", "src/ops/cross_entropy/gpu.rs",
     "    vocab: u32,\n    stride: u32,\n    per_row", "    stride: u32,\n    vocab: u32,\n    per_row"),
    ("a wrong leading dimension", LT, "lt::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64)",
     "lt::create_matrix_layout(dtype, rows as u64, columns as u64, columns as i64)"),
    ("a transposed operand taken as it is", LT, "            true => cublasOperation_t::CUBLAS_OP_T,",
     "            true => cublasOperation_t::CUBLAS_OP_N,"),
    ("what is added is taken from the output", LT, "add.unwrap_or(out) as *const c_void", "out as *const c_void"),
    ("nothing is added", LT, "if add.is_some() { 1f32 } else { 0f32 }", "if add.is_some() { 0f32 } else { 0f32 }"),
    ("sums in 16 bits are allowed", LT, "        this.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;\n",
     "        let _allowed = schemes;\n"),
    ("an alignment that addresses do not have", "src/ops/backend/gpu/products.rs",
     "1 << addresses.into_iter().fold(256, |all, address| all | address).trailing_zeros()", "addresses.into_iter().fold(256, |all, _| all)"),
    ("more workspace than there is", BLAS, "let workspace = Workspace { address, bytes: WORKSPACE };",
     "let workspace = Workspace { address, bytes: 2 * WORKSPACE };"),
    ("products on another stream", BLAS, "self.stream.cu_stream().cast()", "std::ptr::null_mut()"),
    ("an operand that is freed before its use", BLAS, "        b: address(product.a)?,", "        b: address(&product.a.copy()?)?,"),
    ("the scale is left out", BLAS, "scale: product.scale as f32,", "scale: 1f32.max(0.0 * product.scale as f32),"),
    ("the pool gives memory back", START, "        result::mem_pool::set_attribute(pool, threshold, (&raw mut keep_all).cast()).w()?;\n",
     "        let _unused = (pool, threshold, &raw mut keep_all);\n"),
    ("buffers carry events", START, "    unsafe { device.disable_event_tracking() };\n", ""),
    ("the first GPU instead of another", START, "Device::new_cuda_with_stream(index)", "Device::new_cuda_with_stream(0 * index)"),
    ("an old driver is not seen", START, "found == 0 || found >= expected", "found == 0 || found < expected || found >= expected"),
    ("the inputs of a graph are not written", "src/ops/indices.rs", "gpu::write(buffer, &all)?;", "let _written = &all;"),
    ("a graph is kept although the angles moved", DECODING, "if self.recorded_with.replace(read) != Some(read) {",
     "if self.recorded_with.replace(read).is_none() {"),
    ("the outputs of a graph stay in its own memory", DECODING, "outputs.logits.slice_set(&computed.logits, 0, 0)?;", ""),
    ("the tokens of a graph stay in its own memory", DECODING, "outputs.tokens.slice_set(&computed.tokens, 0, 0)?;", ""),
    ("an upload in a capture", GRAPHS, "            let _kept = device.enable_cuda_graph_htod_cache();\n", ""),
    ("the error of a failed capture stays", "src/ops/backend/gpu/cuda/graph.rs", "    let freed = context.check_err();\n",
     "    let freed = context.bind_to_thread();\n"),
    ("padding sequences share rows with others", "src/model/kv_cache/pack.rs", "let padding = (self.capacity..self.capacity + padding)",
     "let padding = (0..padding)"),
    ("out of memory is not recognised", "src/device/mod.rs", "guess || is_out_of_memory(error)", "guess && is_out_of_memory(error)"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="faults whose name has this part")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    arguments = parser.parse_args()
    copy = arguments.folder / "gneiss"
    make_copy(copy)
    environment = dict(os.environ, CARGO_TARGET_DIR=str(arguments.folder / "target"), GNEISS_BINARY=str(arguments.folder / "target/debug/gneiss"))
    build(copy, environment)
    missed = 0
    for what, name, before, after in FAULTS[arguments.first:]:
        if arguments.only not in what:
            continue
        path, started = copy / name, time.time()
        text = faulty = path.read_text()
        pairs = [(before, after)] if isinstance(before, str) else zip(before, after, strict=True)
        for old, new in pairs:
            if text.count(old) != 1:
                sys.exit(f"{what}: expected once in {name}, found {text.count(old)} times: {old}")
            faulty = faulty.replace(old, new)
        path.write_text(faulty)
        build(copy, environment)
        found = first_failure(arguments.tests, environment)
        path.write_text(text)
        missed += found is None
        print(f"{what}: {found or 'NOT FOUND'} ({time.time() - started:.0f} s)", flush=True)
    sys.exit(missed > 0)


def make_copy(copy):
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)


def build(copy, environment):
    done = subprocess.run(["cargo", "build", "--locked", "--features", "cuda", "--bin", "gneiss"], cwd=copy, env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the copy does not build:\n{done.stderr}")


def first_failure(tests, environment):
    """The name of a test that fails; the fast ones are tried first."""
    for part in ["counts", "devices", "graphs", "tune", "memory", "serve", "check"]:
        try:
            done = subprocess.run([tests, f"{part}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return f"{part}: no end"
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("test ") and line.endswith("FAILED")]
        if failed:
            return failed[0]
    return None


if __name__ == "__main__":
    main()

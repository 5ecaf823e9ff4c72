# `make check` is what CI runs.
.PHONY: check test kernels cuda-check sanitize cuda gpu gpu-pack nightly bench golden

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --document-private-items --locked
	cargo test --workspace --locked
	$(MAKE) --no-print-directory kernels cuda-check sanitize

test:
	cargo test --workspace

# The CUDA kernels, by NVIDIA's compiler, which it fetches; see kernels/README.md.
kernels:
	kernels/build.sh

# The Rust code of the feature `cuda`, on a machine without CUDA: a script stands in for nvcc, and nothing is linked.
cuda-check: export PATH := $(CURDIR)/kernels/host/stand-in-nvcc:$(PATH)
cuda-check: export CUDA_COMPUTE_CAP := 90
cuda-check: export CUDARC_CUDA_VERSION := 13000
cuda-check: export CUDAFORGE_THREADS := 2
cuda-check:
	cargo clippy --workspace --all-targets --features cuda --locked --target-dir target/cuda-check -- --deny warnings

# The kernels' tests on the CPU, under sanitizers. Fibers switch stacks, which leak detection does not follow.
sanitize: export KERNELS_SANITIZE := address,undefined
sanitize: export ASAN_OPTIONS := detect_leaks=0:detect_stack_use_after_return=0
sanitize: export PROPTEST_CASES := 4
sanitize:
	cargo test -p int8-ops --test cuda_kernels --locked --target-dir target/sanitize \
		--config "target.'cfg(all())'.runner = ['env', 'LD_PRELOAD=$$(cc -print-file-name=libasan.so)']"

# llm8 with the feature `cuda`, from a toolkit that it fetches. CUDA_COMPUTE_CAP is of Candle's
# kernels, which run on chips from that one on: 80 is Ampere, 75 Turing.
cuda gpu-pack: export CUDA_COMPUTE_CAP ?= 80
cuda gpu-pack: export CUDARC_CUDA_VERSION := 13000
cuda gpu-pack: export CUDAFORGE_THREADS ?= 2
with_toolkit = CUDA_HOME="$$(kernels/toolkit.sh link)" && export CUDA_HOME PATH="$$CUDA_HOME/bin:$$PATH" &&
cuda:
	$(with_toolkit) cargo build --release --features cuda --locked

# What checks and times llm8 on a machine with a GPU, Rust or not, in target/llm8-gpu.tar.gz.
gpu-pack:
	$(with_toolkit) tests/gpu/pack.sh

# The same here, on a machine that has both.
gpu: gpu-pack
	target/llm8-gpu/run.sh

# Peak memory and load time of a model of 2.6 GB; takes 8 GB of disk meanwhile.
nightly:
	cargo test --workspace --test peak_memory -- --ignored --nocapture

bench:
	cargo bench -p int8-ops

# Makes the demonstration model and the small fixtures again; tests/reference/README.md says what they need.
golden:
	python3 tests/reference/demo_model.py
	python3 tests/reference/random_checkpoints.py

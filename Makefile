# `make check` is what CI runs.
.PHONY: check test kernels nightly bench golden

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --document-private-items --locked
	cargo test --workspace --locked
	$(MAKE) --no-print-directory kernels

test:
	cargo test --workspace

# The CUDA kernels, by NVIDIA's compiler, which it fetches; see kernels/README.md.
kernels:
	kernels/build.sh

# Peak memory and load time of a model of 2.6 GB; takes 8 GB of disk meanwhile.
nightly:
	cargo test --workspace --test peak_memory -- --ignored --nocapture

bench:
	cargo bench -p int8-ops

# Makes the demonstration model and the small fixtures again; tests/reference/README.md says what they need.
golden:
	python3 tests/reference/demo_model.py
	python3 tests/reference/random_checkpoints.py

#!/usr/bin/env bash
# Packs what checks and times llm8 on a machine with an NVIDIA GPU, where there may be neither Rust nor a network:
# the program, the tests, the fixtures and run.sh, in target/llm8-gpu.tar.gz. Called by `make gpu-pack`, which has
# set up CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=target/llm8-gpu
rm -rf "$folder" && mkdir -p "$folder"
# Of the whole workspace, so that all share one build of what they depend on.
workspace=(--release --locked --workspace --features cuda)
cargo build "${workspace[@]}" --bin llm8 --example layer_times
test=$(cargo test "${workspace[@]}" --test gpu --no-run --message-format json |
    python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable") and m["target"]["name"] == "gpu"][-1])')
cp target/release/llm8 target/release/examples/layer_times tests/gpu/run.sh "$folder"
cp "$test" "$folder/gpu-tests"
strip "$folder"/{llm8,layer_times,gpu-tests}
cp -r tests/fixtures "$folder"
# CUDA's own libraries; the driver's, libcuda.so.1, is the other machine's.
mkdir "$folder/lib"
for library in cudart cublas cublasLt curand; do cp -L "$CUDA_HOME"/lib64/lib$library.so.1[0-9] "$folder/lib"; done
tar -C target -czf target/llm8-gpu.tar.gz llm8-gpu
ls -l target/llm8-gpu.tar.gz

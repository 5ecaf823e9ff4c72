//! The CUDA kernels, run on the CPU, against the CPU's ops: codes and sums bit for bit, floats to rounding.

#[path = "cuda/matmul_many.rs"]
mod matmul_many;
#[path = "cuda/quantize.rs"]
mod quantize;
#[path = "cuda/support.rs"]
mod support;

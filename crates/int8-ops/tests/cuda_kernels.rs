//! The CUDA kernels, run on the CPU, against the CPU's ops: codes and sums bit for bit, floats to rounding.

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/quantize.rs"]
mod quantize;
#[path = "cuda/support.rs"]
mod support;

//! The CUDA kernels, run on the CPU, against the CPU's ops: codes and sums bit for bit, floats to rounding.

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/elementwise.rs"]
mod elementwise;
#[path = "cuda/matmul_few.rs"]
mod matmul_few;
#[path = "cuda/matmul_many.rs"]
mod matmul_many;
#[path = "cuda/norm.rs"]
mod norm;
#[path = "cuda/quantize.rs"]
mod quantize;
#[path = "cuda/rows.rs"]
mod rows;
#[path = "cuda/support.rs"]
mod support;

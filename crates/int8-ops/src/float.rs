//! Float activations times float weights, which are widened in registers and never in memory.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, bail};
use candle_nn::Module;

use crate::cpu::{self, Kernels, OutputColumns, Values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::elementwise::Activation;
use crate::fused::{Fused, check_residual, with_epilogue};
use crate::matmul::{bias_values, check_bias};
use crate::profile::{self, Part};

/// `x W^T + bias` for activations `x` (.., in) and a weight (out, in), each in f32, f16 or bf16; the
/// result (.., out) has the dtype of `x`. Products are summed in f32. The bias is (out), in any of the three too.
pub fn float_matmul(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    product(Kernels::active(), x, weight, bias, &Fused::default())
}

/// [`float_matmul`] with the CPU kernels of a given instruction set.
pub fn float_matmul_with(
    kernels: &'static Kernels,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    product(kernels, x, weight, bias, &Fused::default())
}

/// The product and what follows it, but not the norm before it.
fn product(
    kernels: &'static Kernels,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    fused: &Fused,
) -> Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    if !matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        bail!("float matmul: the weight must be F32, F16 or BF16, found {:?}", weight.dtype());
    }
    if x.dims().last() != Some(&cols) || rows == 0 || cols == 0 {
        bail!("float matmul: x is {:?}, but the weight ({rows}, {cols}) wants (.., {cols})", x.shape());
    }
    check_bias(bias, rows)?;
    check_residual(fused.residual, &[&x.dims()[..x.rank() - 1], &[rows]].concat())?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return by_cublas(x, weight, bias, fused);
    }
    let op = FloatMatmul {
        kernels,
        weight: weight.contiguous()?,
        bias: bias.cloned(),
        activation: fused.activation,
        residual: fused.residual.map(Tensor::contiguous).transpose()?,
    };
    x.contiguous()?.apply_op1_no_bwd(&op)
}

/// The product by Candle's matmul, which is cuBLAS's, and what follows it in one launch.
#[cfg(feature = "cuda")]
fn by_cublas(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, fused: &Fused) -> Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    dims.pop();
    let tokens: usize = dims.iter().product();
    dims.push(rows);
    let y = x.reshape((tokens, cols))?.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(x.dtype())?;
    cuda::finish(&y, bias, fused.activation, fused.residual)?;
    y.reshape(dims)
}

/// Reads every value of a matrix on the CPU once, and does nothing else: the least time that a product for
/// one token can take. Gives the number of bytes.
pub fn read_floats(matrix: &Tensor) -> Result<usize> {
    let (storage, layout) = matrix.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("wanted a contiguous matrix on the CPU, found {matrix:?}")
    };
    Ok(cpu::limits::read(match cpu::FloatSlice::of(storage)? {
        cpu::FloatSlice::F32(values) => bytemuck::cast_slice(&values[start..end]),
        cpu::FloatSlice::F16(values) => bytemuck::cast_slice(&values[start..end]),
        cpu::FloatSlice::BF16(values) => bytemuck::cast_slice(&values[start..end]),
    }))
}

struct FloatMatmul {
    kernels: &'static Kernels,
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Option<Activation>,
    residual: Option<Tensor>,
}

impl CustomOp1 for FloatMatmul {
    fn name(&self) -> &'static str {
        "float-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = Values::from_storage(x, layout)?;
        let (rows, cols) = self.weight.dims2()?;
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let range = weight_layout.start_offset()..weight_layout.start_offset() + rows * cols;
        let kernels = self.kernels;
        let fill = |matrix: &mut [MaybeUninit<f32>]| {
            with_epilogue(kernels, self.activation, self.residual.as_ref(), |epilogue| {
                bias_values(self.bias.as_ref(), |bias| {
                    let output = &mut OutputColumns { matrix, width: rows, columns: 0..rows, epilogue };
                    match &*weight {
                        Storage::Cpu(CpuStorage::F32(weight)) => {
                            cpu::float_product(kernels.f32_dots, &values, &weight[range], bias, output)
                        }
                        Storage::Cpu(CpuStorage::F16(weight)) => {
                            cpu::float_product(kernels.f16_dots, &values, &weight[range], bias, output)
                        }
                        Storage::Cpu(CpuStorage::BF16(weight)) => {
                            cpu::float_product(kernels.bf16_dots, &values, &weight[range], bias, output)
                        }
                        _ => bail!(
                            "float matmul: activations are on the CPU, but the weight is on {:?}",
                            self.weight.device()
                        ),
                    }
                    Ok(())
                })
            })
        };
        // SAFETY: the product fills its columns, which are all.
        let product =
            profile::time(Part::Products, || unsafe { cpu::written(layout.shape().elem_count() / cols * rows, fill) })?;
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = rows;
        }
        Ok((cpu::round_to_dtype_of(x, product), dims.into()))
    }
}

/// A linear layer `y = x W^T + bias` with a float weight (out, in); see [`float_matmul`].
#[derive(Debug, Clone)]
pub struct FloatLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FloatLinear {
    /// Takes a weight (out, in) in f32, f16 or bf16 and a bias (out) in any of the three.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self { weight, bias })
    }

    /// The layer between its neighbours.
    pub fn forward_fused(&self, x: &Tensor, fused: &Fused) -> Result<Tensor> {
        product(Kernels::active(), &*fused.normed(x)?, &self.weight, self.bias.as_ref(), fused)
    }

    /// The weight (out, in).
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for FloatLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        float_matmul(x, &self.weight, self.bias.as_ref())
    }
}

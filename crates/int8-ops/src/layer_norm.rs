//! Layer normalisation over the last dimension.

use std::mem::MaybeUninit;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use candle_nn::Module;

use crate::cpu::{self, Kernels, for_each_rows};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::matmul::{is_vector_dtype, vector_values};
use crate::profile::{self, Part};

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension of x (.., width), `F32` on
/// the CPU; the variance is that of the whole population.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// Takes a weight and a bias (width) in f32, f16 or bf16.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        if weight.dims1()? != bias.dims1()? || !is_vector_dtype(weight.dtype()) || !is_vector_dtype(bias.dtype()) {
            bail!("a layer norm's weight and bias must be floats (width), found {:?} and {:?}", weight, bias);
        }
        Ok(Self { weight: weight.contiguous()?, bias: bias.contiguous()?, eps: eps as f32 })
    }

    /// (width).
    #[cfg(feature = "cuda")]
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// (width).
    #[cfg(feature = "cuda")]
    pub(crate) fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// What is added to the variance.
    #[cfg(feature = "cuda")]
    pub(crate) fn eps(&self) -> f32 {
        self.eps
    }

    /// Of x (rows, width).
    fn norm_rows(&self, x: &[f32], width: usize) -> Result<Vec<f32>> {
        let kernels = Kernels::active();
        let norm = |out: &mut [MaybeUninit<f32>]| {
            vector_values(&self.weight, |weight| {
                vector_values(&self.bias, |bias| {
                    let (mut weight_room, mut bias_room) = (Vec::new(), Vec::new());
                    let weight = weight.widened(0..width, &mut weight_room);
                    let bias = bias.widened(0..width, &mut bias_room);
                    for_each_rows(out, width, |first, out| {
                        for (row, out) in (first..).zip(out.chunks_mut(width)) {
                            let x = &x[row * width..][..width];
                            // Something has to be there, and a row stays in the nearest cache.
                            (kernels.layer_norm)(x, weight, bias, self.eps, out.write_copy_of_slice(x));
                        }
                    });
                    Ok(())
                })
            })
        };
        // SAFETY: every row is written.
        unsafe { cpu::written(x.len(), norm) }
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("layer norm: x must be contiguous F32")
        };
        let (x, width) = (&x[start..end], self.weight.dim(0)?);
        if layout.dims().last() != Some(&width) {
            bail!("layer norm: x is {:?}, but the weight is ({width})", layout.shape());
        }
        let out = profile::time(Part::Norm, || self.norm_rows(x, width))?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let out = cuda::layer_norm(x, layout, &self.weight, &self.bias, self.eps)?;
        Ok((out, layout.shape().clone()))
    }
}

//! The LLM.int8() product as one Candle custom op.

use std::mem::MaybeUninit;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Error, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::{self, Activations, FloatSlice, Kernels, OutputColumns, Values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::elementwise::Activation;
use crate::fused::{Fused, check_residual, with_epilogue};
use crate::layer_norm::LayerNorm;
use crate::matrix::Int8Matrix;
use crate::outliers::check_threshold;
use crate::profile::{self, Part};

/// One weight (out, in) and its bias (out) in f32, f16 or bf16.
pub type WeightAndBias<'a> = (&'a Int8Matrix, Option<&'a Tensor>);

/// `x W^T + bias` for activations `x` (sequences, tokens, in), (tokens, in) or (in), in f32, f16 or
/// bf16, and a quantised weight (out, in); the result (.., out) has the dtype of `x`.
///
/// Outlier columns, those with any `|x| >= threshold` in a sequence, are multiplied in float with the
/// dequantised weight (LLM.int8() section 3); `None` multiplies everything in int8. The bias is (out)
/// in f32, f16 or bf16. For 3-D `x` every sequence has outlier columns of its own; 2-D `x` is one sequence.
pub fn int8_matmul(x: &Tensor, weight: &Int8Matrix, bias: Option<&Tensor>, threshold: Option<f32>) -> Result<Tensor> {
    int8_matmul_with(Kernels::active(), x, &[(weight, bias)], threshold)
}

/// [`int8_matmul`] for several weights that multiply the same `x`, which is quantised once: the
/// results side by side, (.., sum of all out).
///
/// The CPU kernels are those of a given instruction set: the integer sums, and so the result, are
/// the same for all of them.
pub fn int8_matmul_with(
    kernels: &'static Kernels,
    x: &Tensor,
    weights: &[WeightAndBias],
    threshold: Option<f32>,
) -> Result<Tensor> {
    product(kernels, x, weights, threshold, &Fused::default())
}

/// [`int8_matmul_with`] between its neighbours: on a CUDA device in the same launches; on the CPU the norm comes first,
/// and what follows is done to outputs while they are in a core's cache.
pub fn int8_matmul_fused(
    x: &Tensor,
    weights: &[WeightAndBias],
    threshold: Option<f32>,
    fused: &Fused,
) -> Result<Tensor> {
    let kernels = Kernels::active();
    if x.device().is_cuda() {
        product(kernels, x, weights, threshold, fused)
    } else {
        product(kernels, &*fused.normed(x)?, weights, threshold, &Fused { norm: None, ..*fused })
    }
}

fn product(
    kernels: &'static Kernels,
    x: &Tensor,
    weights: &[WeightAndBias],
    threshold: Option<f32>,
    fused: &Fused,
) -> Result<Tensor> {
    for (weight, bias) in weights {
        let (rows, cols) = weight.dims();
        match x.dims().last() {
            Some(&width) if width == cols && x.rank() <= 3 => {}
            _ => bail!("int8 matmul: x is {:?}, but the weight ({rows}, {cols}) wants (.., tokens, {cols})", x.shape()),
        }
        check_bias(*bias, rows)?;
    }
    check_threshold(threshold)?;
    if let Some((_, dims)) = x.dims().split_last() {
        let width = weights.iter().map(|(weight, _)| weight.dims().0).sum();
        check_residual(fused.residual, &[dims, &[width]].concat())?;
    }
    let weights = weights.iter().map(|(weight, bias)| (Int8Matrix::clone(weight), bias.cloned())).collect();
    let op = Int8Matmul {
        kernels,
        weights,
        threshold,
        norm: fused.norm.cloned(),
        activation: fused.activation,
        residual: fused.residual.map(Tensor::contiguous).transpose()?,
    };
    x.contiguous()?.apply_op1_no_bwd(&op)
}

/// An error unless the bias, if there is one, is (rows) in a float dtype.
pub(crate) fn check_bias(bias: Option<&Tensor>, rows: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [rows] || !is_vector_dtype(bias.dtype()) => {
            bail!("the bias must be F32, F16 or BF16 ({rows}), found {:?} {:?}", bias.dtype(), bias.shape())
        }
        _ => Ok(()),
    }
}

/// Whether a bias, or the weight of a norm, may be held in this dtype.
pub(crate) fn is_vector_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Calls `f` with the values of a bias where there is one.
pub(crate) fn bias_values<R>(bias: Option<&Tensor>, f: impl FnOnce(Option<FloatSlice>) -> Result<R>) -> Result<R> {
    match bias {
        Some(bias) => vector_values(bias, |values| f(Some(values))),
        None => f(None),
    }
}

/// Calls `f` with the values of a contiguous vector on the CPU.
pub(crate) fn vector_values<R>(vector: &Tensor, f: impl FnOnce(FloatSlice) -> Result<R>) -> Result<R> {
    let (storage, layout) = vector.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("wanted a contiguous vector on the CPU, found {vector:?}")
    };
    f(FloatSlice::of(storage)?.slice(start..end))
}

/// The op's parameters; the weights ride here because a Candle op takes at most three tensors.
pub(crate) struct Int8Matmul {
    kernels: &'static Kernels,
    pub(crate) weights: Vec<(Int8Matrix, Option<Tensor>)>,
    pub(crate) threshold: Option<f32>,
    /// What a CUDA device does in the same launches; on the CPU there is none.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub(crate) norm: Option<LayerNorm>,
    pub(crate) activation: Option<Activation>,
    pub(crate) residual: Option<Tensor>,
}

impl CustomOp1 for Int8Matmul {
    fn name(&self) -> &'static str {
        "int8-matmul"
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((cuda::int8_matmul(self, x, layout)?, self.shape(layout)))
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let activations = profile::time(Part::Quantize, || {
            let values = Values::from_storage(x, layout)?;
            Ok::<_, Error>(Activations::quantize(self.kernels, &values, self.threshold))
        })?;
        let width = self.width();
        let fill = |matrix: &mut [MaybeUninit<f32>]| {
            with_epilogue(self.kernels, self.activation, self.residual.as_ref(), |epilogue| {
                let mut first = 0;
                for (weight, bias) in &self.weights {
                    let columns = first..first + weight.dims().0;
                    first = columns.end;
                    let mut output = OutputColumns { matrix, width, columns, epilogue };
                    bias_values(bias.as_ref(), |bias| {
                        weight.with_slices(|codes, scales| {
                            cpu::int8_product(self.kernels, &activations, codes, scales, bias, &mut output);
                            Ok(())
                        })
                    })?;
                }
                Ok(())
            })
        };
        profile::time(Part::Products, || {
            // SAFETY: each product fills its columns, and together they are as wide as the matrix.
            let product = unsafe { cpu::written(activations.scales.len() * width, fill)? };
            Ok((cpu::round_to_dtype_of(x, product), self.shape(layout)))
        })
    }
}

impl Int8Matmul {
    /// The outputs of all weights.
    fn width(&self) -> usize {
        self.weights.iter().map(|(weight, _)| weight.dims().0).sum()
    }

    /// (.., width) for x (.., in).
    fn shape(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.width();
        }
        dims.into()
    }
}

//! Float activations times 16-bit weights, widened in registers and never in memory.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, bail};
use candle_nn::Module;

use crate::cpu::{self, Kernels, OutputColumns, Values};
use crate::matmul::check_bias;

/// `x W^T + bias` for activations `x` (.., in) in f32, f16 or bf16 and a weight (out, in) in f16 or
/// bf16; the result (.., out) has the dtype of `x`. Products are summed in f32. The bias is (out) in
/// `F32`.
pub fn half_matmul(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    half_matmul_with(Kernels::active(), x, weight, bias)
}

/// [`half_matmul`] with the CPU kernels of a given instruction set.
pub fn half_matmul_with(
    kernels: &'static Kernels,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    if !matches!(weight.dtype(), DType::F16 | DType::BF16) {
        bail!("half matmul: the weight must be F16 or BF16, found {:?}", weight.dtype());
    }
    if x.dims().last() != Some(&cols) || rows == 0 || cols == 0 {
        bail!("half matmul: x is {:?}, but the weight ({rows}, {cols}) wants (.., {cols})", x.shape());
    }
    check_bias(bias, rows)?;
    let op = HalfMatmul { kernels, weight: weight.contiguous()?, bias: bias.cloned() };
    x.contiguous()?.apply_op1_no_bwd(&op)
}

struct HalfMatmul {
    kernels: &'static Kernels,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl CustomOp1 for HalfMatmul {
    fn name(&self) -> &'static str {
        "half-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = Values::from_storage(x, layout)?;
        let bias = self.bias.as_ref().map(|bias| bias.to_vec1::<f32>()).transpose()?;
        let (rows, cols) = self.weight.dims2()?;
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let range = weight_layout.start_offset()..weight_layout.start_offset() + rows * cols;
        let mut product = vec![0f32; layout.shape().elem_count() / cols * rows];
        let output = &mut OutputColumns { matrix: &mut product, width: rows, columns: 0..rows };
        match &*weight {
            Storage::Cpu(CpuStorage::F16(weight)) => {
                cpu::half_product(self.kernels.f16_dots, &values, &weight[range], bias.as_deref(), output)
            }
            Storage::Cpu(CpuStorage::BF16(weight)) => {
                cpu::half_product(self.kernels.bf16_dots, &values, &weight[range], bias.as_deref(), output)
            }
            _ => bail!("half matmul: activations are on the CPU, but the weight is on {:?}", self.weight.device()),
        }
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = rows;
        }
        Ok((cpu::round_to_dtype_of(x, product), dims.into()))
    }
}

/// A linear layer `y = x W^T + bias` with a 16-bit weight (out, in); see [`half_matmul`].
#[derive(Debug, Clone)]
pub struct HalfLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl HalfLinear {
    /// Takes a weight (out, in) in f16 or bf16 and a bias (out) of any float dtype (kept in `F32`).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        Ok(Self { weight, bias })
    }
}

impl Module for HalfLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        half_matmul(x, &self.weight, self.bias.as_ref())
    }
}

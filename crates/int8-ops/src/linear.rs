//! The LLM.int8() product as a layer.

use candle_core::{Result, Tensor, bail};
use candle_nn::Module;

use crate::fused::Fused;
use crate::matmul::{int8_matmul, int8_matmul_fused};
use crate::matrix::Int8Matrix;

/// A linear layer `y = x W^T + bias` with an int8 weight (out, in); see [`int8_matmul`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// use int8_ops::{Int8Linear, Int8Matrix, OUTLIER_THRESHOLD};
/// let weight = Tensor::randn(0f32, 1.0, (32, 64), &Device::Cpu)?;
/// let layer = Int8Linear::new(Int8Matrix::quantize(&weight)?, None, Some(OUTLIER_THRESHOLD))?;
/// let x = Tensor::randn(0f32, 1.0, (1, 5, 64), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.dims(), [1, 5, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Int8Linear {
    weight: Int8Matrix,
    bias: Option<Tensor>,
    threshold: Option<f32>,
}

impl Int8Linear {
    /// Takes a weight (out, in), a bias (out) in f32, f16 or bf16, and the outlier
    /// threshold (`None`: no decomposition).
    pub fn new(weight: Int8Matrix, bias: Option<Tensor>, threshold: Option<f32>) -> Result<Self> {
        Ok(Self { weight, bias, threshold })
    }

    /// The layer between its neighbours.
    pub fn forward_fused(&self, x: &Tensor, fused: &Fused) -> Result<Tensor> {
        int8_matmul_fused(x, &[(&self.weight, self.bias.as_ref())], self.threshold, fused)
    }

    /// The quantised weight (out, in).
    pub fn weight(&self) -> &Int8Matrix {
        &self.weight
    }
}

impl Module for Int8Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        int8_matmul(x, &self.weight, self.bias.as_ref(), self.threshold)
    }
}

/// Linear layers that take the same input, such as the query, key and value projections: the input
/// is quantised once, and the outputs come side by side, (.., sum of all out).
#[derive(Debug, Clone)]
pub struct Int8LinearGroup {
    layers: Vec<Int8Linear>,
}

impl Int8LinearGroup {
    /// Takes at least one layer; all must have the same threshold.
    pub fn new(layers: Vec<Int8Linear>) -> Result<Self> {
        match layers.first() {
            Some(first) if layers.iter().all(|layer| layer.threshold == first.threshold) => Ok(Self { layers }),
            Some(_) => bail!("int8 layers that share an input must have the same outlier threshold"),
            None => bail!("a group of int8 layers must have at least one"),
        }
    }

    /// The layers between their neighbours: the residual is as wide as all outputs.
    pub fn forward_fused(&self, x: &Tensor, fused: &Fused) -> Result<Tensor> {
        let weights: Vec<_> = self.layers.iter().map(|layer| (&layer.weight, layer.bias.as_ref())).collect();
        int8_matmul_fused(x, &weights, self.layers[0].threshold, fused)
    }

    /// The layers, in the order of their outputs.
    pub fn layers(&self) -> &[Int8Linear] {
        &self.layers
    }
}

impl Module for Int8LinearGroup {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_fused(x, &Fused::default())
    }
}

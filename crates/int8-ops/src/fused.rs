//! What comes before and after a linear layer, so that a device can do it in the same pass over memory.

use candle_core::{Result, Tensor};
use candle_nn::Module;

use crate::elementwise::{Activation, add};
use crate::layer_norm::LayerNorm;

/// The neighbours of a linear layer `y = x W^T + bias`: `activation(linear(norm(x))) + residual`, each of them
/// where it is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fused<'a> {
    /// Of x (.., in).
    pub norm: Option<&'a LayerNorm>,
    /// Of the outputs.
    pub activation: Option<Activation>,
    /// (.., out), in the dtype of x.
    pub residual: Option<&'a Tensor>,
}

impl Fused<'_> {
    /// One after the other, around what `linear` does.
    pub(crate) fn around(&self, x: &Tensor, linear: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let y = match self.norm {
            Some(norm) => linear(&norm.forward(x)?)?,
            None => linear(x)?,
        };
        let y = match self.activation {
            Some(activation) => activation.forward(y)?,
            None => y,
        };
        match self.residual {
            Some(residual) => add(y, residual),
            None => Ok(y),
        }
    }
}

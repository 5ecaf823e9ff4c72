//! What comes before and after a linear layer, so that a device can do it in the same pass over memory.

use std::borrow::Cow;

use candle_core::{Result, Tensor, bail};
use candle_nn::Module;

use crate::cpu::{Epilogue, FloatSlice, Kernels, Residual};
use crate::elementwise::Activation;
use crate::layer_norm::LayerNorm;
use crate::matmul::vector_values;

/// The neighbours of a linear layer `y = x W^T + bias`: `activation(linear(norm(x))) + residual`, each of them
/// where it is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fused<'a> {
    /// Of x (.., in).
    pub norm: Option<&'a LayerNorm>,
    /// Of the outputs.
    pub activation: Option<Activation>,
    /// (.., out), in the dtype of x; on the CPU in F32.
    pub residual: Option<&'a Tensor>,
}

impl Fused<'_> {
    /// What the layer takes where its norm is an op of its own.
    pub(crate) fn normed<'x>(&self, x: &'x Tensor) -> Result<Cow<'x, Tensor>> {
        Ok(match self.norm {
            Some(norm) => Cow::Owned(norm.forward(x)?),
            None => Cow::Borrowed(x),
        })
    }
}

/// Calls `f` with what follows a layer's outputs, as it is done on the CPU.
pub(crate) fn with_epilogue<R>(
    kernels: &Kernels,
    activation: Option<Activation>,
    residual: Option<&Tensor>,
    f: impl FnOnce(Epilogue) -> Result<R>,
) -> Result<R> {
    let epilogue = Epilogue { activation: activation.map(|activation| activation.kernel(kernels)), residual: None };
    match residual {
        Some(residual) => vector_values(residual, |values| match values {
            FloatSlice::F32(values) => {
                f(Epilogue { residual: Some(Residual { values, add: kernels.add }), ..epilogue })
            }
            _ => bail!("a residual on the CPU must be F32, found {:?}", residual.dtype()),
        }),
        None => f(epilogue),
    }
}

/// An error unless the residual, if there is one, has the dims of the outputs.
pub(crate) fn check_residual(residual: Option<&Tensor>, dims: &[usize]) -> Result<()> {
    match residual {
        Some(residual) if residual.dims() != dims => {
            bail!("the residual is {:?}, but the outputs are {dims:?}", residual.shape())
        }
        _ => Ok(()),
    }
}

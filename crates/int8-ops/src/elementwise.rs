//! What happens between the layers of a block, value by value, in place: a layer's output is nobody
//! else's, and memory that is not taken need not be cleared.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};

use crate::cpu::{Kernels, for_each_rows};
#[cfg(feature = "cuda")]
use crate::cuda;

/// What comes between the two layers of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// GELU in the form by tanh, `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (Hendrycks and
    /// Gimpel 2016, arXiv 1606.08415).
    Gelu,
    /// GELU in the exact form, `x / 2 * (1 + erf(x / sqrt(2)))`.
    GeluErf,
}

impl Activation {
    /// Of `x`, a contiguous tensor (`F32` on the CPU), written over it; its clones see the change.
    pub fn forward(self, x: Tensor) -> Result<Tensor> {
        x.inplace_op1(&self)?;
        Ok(x)
    }

    pub(crate) fn kernel(self, kernels: &Kernels) -> fn(&mut [f32]) {
        match self {
            Self::Relu => kernels.relu,
            Self::Gelu => kernels.gelu,
            Self::GeluErf => kernels.gelu_erf,
        }
    }

    /// What device_prims.cuh calls it.
    #[cfg(feature = "cuda")]
    pub(crate) fn number(self) -> usize {
        match self {
            Self::Relu => 1,
            Self::Gelu => 2,
            Self::GeluErf => 3,
        }
    }
}

impl InplaceOp1 for Activation {
    fn name(&self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::Gelu => "gelu",
            Self::GeluErf => "gelu-erf",
        }
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("{}: x must be contiguous F32", self.name())
        };
        let kernel = self.kernel(Kernels::active());
        for_each_rows(&mut x[start..end], VALUES_PER_ROW, |_, x| kernel(x));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &mut CudaStorage, layout: &Layout) -> Result<()> {
        cuda::activate(x, layout, *self)
    }
}

/// `x + other` for contiguous tensors of one shape, `F32` on the CPU, written over `x`, whose clones see the change.
pub fn add(x: Tensor, other: &Tensor) -> Result<Tensor> {
    if x.dims() != other.dims() {
        bail!("add: {:?} and {:?} are not of one shape", x.shape(), other.shape());
    }
    x.inplace_op2(&other.contiguous()?, &Add)?;
    Ok(x)
}

/// Values of a row of the work; a thread is given several where they are few.
const VALUES_PER_ROW: usize = 1 << 10;

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout, other: &CpuStorage, other_layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("add: x must be contiguous F32")
        };
        let CpuStorage::F32(other) = other else { bail!("add: both must be F32") };
        let other = &other[other_layout.start_offset()..][..end - start];
        let kernels = Kernels::active();
        for_each_rows(&mut x[start..end], VALUES_PER_ROW, |first, x| {
            (kernels.add)(x, &other[first * VALUES_PER_ROW..][..x.len()]);
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &mut CudaStorage, layout: &Layout, other: &CudaStorage, other_layout: &Layout) -> Result<()> {
        cuda::add(x, layout, other, other_layout)
    }
}

//! What happens between the layers of a block, value by value, in place: a layer's output is nobody
//! else's, and memory that is not taken need not be cleared.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};

use crate::cpu::{Kernels, for_each_rows};

/// `max(x, 0)`, written over `x`: a contiguous `F32` tensor, whose clones see the change.
pub fn relu(x: Tensor) -> Result<Tensor> {
    in_place(x, Elementwise { name: "relu", kernel: Kernels::active().relu })
}

/// GELU in the form by tanh, `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (Hendrycks and Gimpel
/// 2016, arXiv 1606.08415), written over `x`: a contiguous `F32` tensor, whose clones see the change.
pub fn gelu(x: Tensor) -> Result<Tensor> {
    in_place(x, Elementwise { name: "gelu", kernel: Kernels::active().gelu })
}

/// GELU in the exact form, `x / 2 * (1 + erf(x / sqrt(2)))`, written over `x`: a contiguous `F32` tensor,
/// whose clones see the change.
pub fn gelu_erf(x: Tensor) -> Result<Tensor> {
    in_place(x, Elementwise { name: "gelu-erf", kernel: Kernels::active().gelu_erf })
}

/// `x + other` for contiguous `F32` tensors of one shape, written over `x`, whose clones see the change.
pub fn add(x: Tensor, other: &Tensor) -> Result<Tensor> {
    if x.dims() != other.dims() {
        bail!("add: {:?} and {:?} are not of one shape", x.shape(), other.shape());
    }
    x.inplace_op2(&other.contiguous()?, &Add)?;
    Ok(x)
}

/// Values that a thread is given at a time.
const VALUES_PER_ROW: usize = 1 << 10;

fn in_place(x: Tensor, op: Elementwise) -> Result<Tensor> {
    x.inplace_op1(&op)?;
    Ok(x)
}

struct Elementwise {
    name: &'static str,
    kernel: fn(&mut [f32]),
}

impl InplaceOp1 for Elementwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("{}: x must be contiguous F32", self.name)
        };
        for_each_rows(&mut x[start..end], VALUES_PER_ROW, |_, x| (self.kernel)(x));
        Ok(())
    }
}

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
}

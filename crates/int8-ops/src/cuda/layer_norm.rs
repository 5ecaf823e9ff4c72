//! Layer norms.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Layout, Result, Tensor, bail};

use super::{Launch, THREADS, address, suffix, uninitialized};

/// The norm of each row of x (.., width), contiguous, in the dtype of x.
pub(crate) fn layer_norm(
    x: &CudaStorage,
    layout: &Layout,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<CudaStorage> {
    let (len, width) = (layout.shape().elem_count(), weight.dim(0)?);
    if !layout.is_contiguous() || layout.dims().last() != Some(&width) {
        bail!("layer norm: x is {:?}, but the weight is ({width})", layout.shape());
    }
    let out = uninitialized(&x.device, x.dtype(), len)?;
    let launch = Launch::new(&x.device, "layer_norm", format!("layer_norm_{}", suffix(x.dtype())?))
        .pointer(address(x, layout.start_offset())?)
        .vector(Some(weight))?
        .vector(Some(bias))?
        .float(eps)
        .pointer(address(&out, 0)?)
        .int(width)?;
    // SAFETY: x and out have rows of `width` values, the weight and the bias one such row.
    unsafe { launch.run([len / width.max(1), 1, 1], THREADS, 0)? };
    Ok(out)
}

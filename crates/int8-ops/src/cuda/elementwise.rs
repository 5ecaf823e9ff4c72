//! In-place ops, value by value.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{InplaceOp1, Layout, Result, Storage, Tensor, bail};

use super::{Launch, THREADS, address, address_of, suffix};
use crate::elementwise::Activation;

/// Blocks that fill any device; values beyond their threads come in turns.
const BLOCKS: usize = 1 << 10;
/// Values that a thread does at a time: those of 16 bytes, at the least.
const PIECE: usize = 4;

/// `x = activation(x + bias) + residual` for contiguous x (.., width), in place, each of the three where it is
/// given: what follows a product of cuBLAS, in one launch.
pub(crate) fn finish(
    x: &Tensor,
    bias: Option<&Tensor>,
    activation: Option<Activation>,
    residual: Option<&Tensor>,
) -> Result<()> {
    if bias.is_none() && activation.is_none() && residual.is_none() {
        return Ok(());
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("wanted a tensor on a CUDA device, found {x:?}") };
    let residual = match residual {
        Some(residual) if residual.dtype() != x.dtype() || residual.elem_count() != x.elem_count() => {
            bail!("the residual {residual:?} is not like {x:?}")
        }
        Some(residual) => Some(residual.contiguous()?),
        None => None,
    };
    let residual = residual.as_ref().map_or(Ok(0), |residual| address_of(&storage.device, residual))?;
    launch(storage, layout, bias, activation, residual)
}

/// `x = activation(x)`, contiguous.
pub(crate) fn activate(x: &mut CudaStorage, layout: &Layout, activation: Activation) -> Result<()> {
    if !layout.is_contiguous() {
        bail!("{}: x must be contiguous", activation.name());
    }
    launch(x, layout, None, Some(activation), 0)
}

/// `x += other`, both contiguous, of one shape and dtype.
pub(crate) fn add(x: &mut CudaStorage, layout: &Layout, other: &CudaStorage, other_layout: &Layout) -> Result<()> {
    if !layout.is_contiguous() || !other_layout.is_contiguous() || other.dtype() != x.dtype() {
        bail!("add: both must be contiguous and of one dtype, found {:?} and {:?}", x.dtype(), other.dtype());
    }
    launch(x, layout, None, None, address(other, other_layout.start_offset())?)
}

fn launch(
    x: &CudaStorage,
    layout: &Layout,
    bias: Option<&Tensor>,
    activation: Option<Activation>,
    residual: u64,
) -> Result<()> {
    let (len, width) = (layout.shape().elem_count(), layout.dims().last().copied().unwrap_or(1));
    let launch = Launch::new(&x.device, "elementwise", format!("finish_{}", suffix(x.dtype())?))
        .pointer(address(x, layout.start_offset())?)
        .vector(bias)?
        .int(width)?
        .int(activation.map_or(0, Activation::number))?
        .pointer(residual)
        .long(len);
    let blocks = len.div_ceil(THREADS as usize * PIECE).min(BLOCKS);
    // SAFETY: x, and the residual where there is one, have `len` values from their offsets on, the bias `width`.
    unsafe { launch.run([blocks, 1, 1], THREADS, 0) }
}

//! In-place ops, value by value.

use candle_core::cuda_backend::CudaStorage;
use candle_core::{InplaceOp1, Layout, Result, bail};

use super::{Launch, THREADS, address, suffix};
use crate::elementwise::Activation;

/// Blocks that fill any device; values beyond their threads come in turns.
const BLOCKS: usize = 1 << 10;

fn blocks(len: usize) -> [usize; 3] {
    [len.div_ceil(THREADS as usize).min(BLOCKS), 1, 1]
}

/// `x = activation(x)`, contiguous.
pub(crate) fn activate(x: &mut CudaStorage, layout: &Layout, activation: Activation) -> Result<()> {
    let (len, dtype) = (layout.shape().elem_count(), candle_core::backend::BackendStorage::dtype(x));
    if !layout.is_contiguous() {
        bail!("{}: x must be contiguous", activation.name());
    }
    let launch = Launch::new(&x.device, "elementwise", format!("activate_{}", suffix(dtype)?))
        .pointer(address(x, layout.start_offset())?)
        .int(activation.number())?
        .long(len);
    // SAFETY: x has `len` values from its offset on.
    unsafe { launch.run(blocks(len), THREADS, 0) }
}

/// `x += other`, both contiguous, of one shape and dtype.
pub(crate) fn add(x: &mut CudaStorage, layout: &Layout, other: &CudaStorage, other_layout: &Layout) -> Result<()> {
    use candle_core::backend::BackendStorage;
    let (len, dtype) = (layout.shape().elem_count(), x.dtype());
    if !layout.is_contiguous() || !other_layout.is_contiguous() || other.dtype() != dtype {
        bail!("add: both must be contiguous and of one dtype, found {dtype:?} and {:?}", other.dtype());
    }
    let launch = Launch::new(&x.device, "elementwise", format!("add_{}", suffix(dtype)?))
        .pointer(address(x, layout.start_offset())?)
        .pointer(address(other, other_layout.start_offset())?)
        .long(len);
    // SAFETY: both have `len` values from their offsets on, as their shapes are one (the caller's check).
    unsafe { launch.run(blocks(len), THREADS, 0) }
}

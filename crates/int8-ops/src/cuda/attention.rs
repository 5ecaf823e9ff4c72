//! Attention over keys and values that lie plainly, (batch, heads, capacity, head_dim) each.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage};
use candle_core::{DType, Layout, Result, Storage, Tensor, bail};

use super::{Launch, address, address_of, constant, multiprocessors, suffix, uninitialized};
use crate::attention::head_strides;

/// Values that a thread writes to the cache.
const PIECE: usize = 8;
const WRITE_THREADS: u32 = 256;

/// Queries from which tensor cores are worth their tiles.
const MANY_QUERIES: usize = 9;
/// Queries of a block of `attention_prompt`.
const PROMPT_QUERIES: usize = 64;
const PROMPT_THREADS: u32 = 128;
/// Widths of heads that `attention_prompt` has kernels for; each takes multiples of 8 up to its own.
const PROMPT_WIDTHS: [usize; 4] = [32, 64, 80, 128];

/// Queries of a block of `attention_step`.
const STEP_QUERIES: usize = 4;
const STEP_THREADS: u32 = 128;
/// Keys that are worth a block of their own.
const KEYS_PER_SPLIT: usize = 128;
const MAX_SPLITS: usize = 64;

/// Writes keys and values (batch, heads, tokens, head_dim), whose strides are the same, to the caches, from
/// position `past` on.
pub(crate) fn write_cache(
    key_cache: &Tensor,
    value_cache: &Tensor,
    past: usize,
    keys: &Tensor,
    values: &Tensor,
) -> Result<()> {
    let (batch, heads, tokens, head_dim) = keys.dims4()?;
    // Parts of one product have the strides of the whole; others are made alike.
    let is_alike = keys.stride() == values.stride() && head_strides(keys.layout()).is_ok();
    let (keys, values) =
        if is_alike { (keys.clone(), values.clone()) } else { (keys.force_contiguous()?, values.force_contiguous()?) };
    let [batch_stride, head_stride, token_stride] = head_strides(keys.layout())?;
    let ((key_storage, key_layout), (value_storage, value_layout)) =
        (keys.storage_and_layout(), values.storage_and_layout());
    let (Storage::Cuda(new_keys), Storage::Cuda(new_values)) = (&*key_storage, &*value_storage) else {
        bail!("the cache is on a CUDA device, but the keys or values are not")
    };
    if new_keys.dtype() != new_values.dtype() {
        bail!("keys are {:?}, but values are {:?}", new_keys.dtype(), new_values.dtype());
    }
    let device = &new_keys.device;
    let name = format!("attention_write_{}_{}", suffix(new_keys.dtype())?, suffix(key_cache.dtype())?);
    let launch = Launch::new(device, "attention_cache", name)
        .pointer(address(new_keys, key_layout.start_offset())?)
        .pointer(address(new_values, value_layout.start_offset())?)
        .pointer(address_of(device, key_cache)?)
        .pointer(address_of(device, value_cache)?)
        .int(heads)?
        .int(tokens)?
        .int(head_dim)?
        .int(key_cache.dim(2)?)?
        .int(past)?
        .long(batch_stride)
        .long(head_stride)
        .long(token_stride);
    let pieces = tokens * heads * head_dim.div_ceil(PIECE);
    // SAFETY: the caches have room for `past + tokens` (the caller's check), and the strides are those of both.
    unsafe { launch.run([pieces.div_ceil(WRITE_THREADS as usize), batch, 1], WRITE_THREADS, 0) }
}

/// The op [`attention`](crate::attention()) over `keys` and `values`: (batch, tokens, heads * head_dim) in the
/// dtype of the queries.
pub(crate) fn attention(
    queries: &CudaStorage,
    layout: &Layout,
    (keys, keys_layout): (&CudaStorage, &Layout),
    (values, values_layout): (&CudaStorage, &Layout),
    past: usize,
    slopes: Option<&[f32]>,
) -> Result<CudaStorage> {
    let (batch, heads, tokens, head_dim) = layout.shape().dims4()?;
    let [batch_stride, head_stride, token_stride] = head_strides(layout)?;
    let device = &queries.device;
    let (dtype, cache_dtype) = (queries.dtype(), keys.dtype());
    let slopes = slopes.map(|slopes| constant(device, slopes)).transpose()?;
    let out = uninitialized(device, dtype, batch * tokens * heads * head_dim)?;
    let width = PROMPT_WIDTHS.into_iter().find(|&width| head_dim <= width);
    let prompt_width = match width {
        Some(width) if cache_dtype == DType::F16 && head_dim.is_multiple_of(8) && tokens >= MANY_QUERIES => Some(width),
        _ => None,
    };
    let capacity = keys_layout.dims()[2];
    let scale = 1.0 / (head_dim as f32).sqrt();
    // `attention_step` has a workspace behind the output, or none at 0.
    let launch = |file, name: String, workspace: Option<u64>| -> Result<Launch> {
        let launch = Launch::new(device, file, name)
            .pointer(address(queries, layout.start_offset())?)
            .pointer(address(keys, keys_layout.start_offset())?)
            .pointer(address(values, values_layout.start_offset())?)
            .pointer(slopes.as_ref().map_or(Ok(0), |slopes| address_of(device, slopes))?)
            .pointer(address(&out, 0)?);
        let launch = match workspace {
            Some(workspace) => launch.pointer(workspace),
            None => launch,
        };
        Ok(launch
            .int(heads)?
            .int(tokens)?
            .int(head_dim)?
            .int(capacity)?
            .int(past)?
            .float(scale)
            .long(batch_stride)
            .long(head_stride)
            .long(token_stride))
    };
    if let Some(width) = prompt_width {
        let name = format!("attention_prompt_{width}_{}_f16", suffix(dtype)?);
        let launch = launch("attention_prompt", name, None)?;
        // SAFETY: the cache holds `past + tokens` (the caller's check), and the strides are those of the queries.
        unsafe { launch.run([batch * heads, tokens.div_ceil(PROMPT_QUERIES), 1], PROMPT_THREADS, 0)? };
        return Ok(out);
    }
    let splits = splits(device, batch * heads * tokens.div_ceil(STEP_QUERIES), past + tokens)?;
    let rows = batch * tokens * heads;
    let workspace = match splits {
        1 => None,
        _ => Some(uninitialized(device, DType::F32, rows * splits * (head_dim + 2))?),
    };
    let workspace_address = workspace.as_ref().map_or(Ok(0), |workspace| address(workspace, 0))?;
    let name = format!("attention_step_{}_{}", suffix(dtype)?, suffix(cache_dtype)?);
    let launch = launch("attention_step", name, Some(workspace_address))?;
    // SAFETY: as above, and the workspace has room for every part.
    unsafe { launch.run([batch * heads, splits, tokens.div_ceil(STEP_QUERIES)], STEP_THREADS, 0)? };
    if workspace.is_some() {
        let launch = Launch::new(device, "attention_step", format!("attention_combine_{}", suffix(dtype)?))
            .pointer(workspace_address)
            .pointer(address(&out, 0)?)
            .int(head_dim)?
            .int(splits)?;
        // SAFETY: the workspace holds all parts of these rows.
        unsafe { launch.run([rows, 1, 1], STEP_THREADS, 0)? };
    }
    Ok(out)
}

/// Among how many blocks the keys of a query are split, so that the device is full with `blocks` times as many.
fn splits(device: &CudaDevice, blocks: usize, keys: usize) -> Result<usize> {
    let wanted = 4 * multiprocessors(&device.cuda_stream())? / blocks.max(1);
    Ok(wanted.min(keys / KEYS_PER_SPLIT).clamp(1, MAX_SPLITS))
}

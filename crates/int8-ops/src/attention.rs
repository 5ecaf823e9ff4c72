//! Causal attention over cached keys and values, as a Candle custom op.

mod cache;

use std::mem::MaybeUninit;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

pub use self::cache::{AttentionCache, CacheDtype};
use crate::cpu::{self, FloatCache, IntegerCache, Kernels, Queries};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::profile::{self, Part};

/// From one batch entry, head and token to the next in (batch, heads, tokens, head_dim).
pub(crate) fn head_strides(layout: &Layout) -> Result<[usize; 3]> {
    match *layout.stride() {
        [batch, head, token, 1] => Ok([batch, head, token]),
        _ => bail!("the features of a head must lie side by side, found strides {:?}", layout.stride()),
    }
}

/// softmax(q k^T / sqrt(head_dim) + slope * key position) v for queries (batch, heads, tokens, head_dim)
/// (`F32` on the CPU), which follow `past` tokens and whose own keys and values the cache holds too; every query
/// attends to the keys up to its own position. ALiBi (Press et al. 2021, arXiv 2108.12409) comes by a
/// slope for each head, or not at all. The result is (batch, tokens, heads * head_dim).
///
/// Errors name the dimensions where queries, slopes and cache do not fit together.
pub fn attention(queries: &Tensor, cache: &AttentionCache, past: usize, slopes: Option<&[f32]>) -> Result<Tensor> {
    attention_with(Kernels::active(), queries, cache, past, slopes)
}

/// [`attention`] with the CPU kernels of a given instruction set.
pub fn attention_with(
    kernels: &'static Kernels,
    queries: &Tensor,
    cache: &AttentionCache,
    past: usize,
    slopes: Option<&[f32]>,
) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = queries.dims4()?;
    let wanted = cache.dims();
    if (batch, heads, head_dim) != (wanted.0, wanted.1, wanted.3) || past + tokens > wanted.2 {
        bail!("attention: queries {:?} after {past} tokens do not fit a cache {wanted:?}", queries.shape());
    }
    if slopes.is_some_and(|slopes| slopes.len() != heads) {
        bail!("attention: {} slopes for {heads} heads", slopes.map_or(0, <[f32]>::len));
    }
    queries.apply_op3_no_bwd(
        &cache.keys,
        &cache.values,
        &Attention { kernels, dtype: cache.dtype(), past, slopes: slopes.map(<[f32]>::to_vec) },
    )
}

struct Attention {
    kernels: &'static Kernels,
    /// Of the cache.
    dtype: CacheDtype,
    past: usize,
    slopes: Option<Vec<f32>>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        queries: &CpuStorage,
        queries_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(all) = queries else { bail!("attention: queries must be F32") };
        let (batch, heads, tokens, head_dim) = queries_layout.shape().dims4()?;
        let strides = head_strides(queries_layout)?;
        let queries =
            Queries { values: &all[queries_layout.start_offset()..], batch, heads, tokens, head_dim, strides };
        let (from_key, from_value) = (keys_layout.start_offset(), values_layout.start_offset());
        // Blocks of integers, or the tokens that there is room for.
        let len = values_layout.dims()[2];
        let out = match (keys, values) {
            (CpuStorage::U32(keys), CpuStorage::U32(values)) => {
                let (keys, values) = (&keys[from_key..], &values[from_value..]);
                match self.dtype {
                    CacheDtype::Int8 => self.attend(&queries, IntegerCache::<i8>::new(keys, values, len)),
                    CacheDtype::Int16 => self.attend(&queries, IntegerCache::<i16>::new(keys, values, len)),
                    float => bail!("attention: found a cache of integers for one in {}", float.name()),
                }
            }
            (CpuStorage::F16(keys), CpuStorage::F16(values)) => self
                .attend(&queries, FloatCache { keys: &keys[from_key..], values: &values[from_value..], capacity: len }),
            (CpuStorage::F32(keys), CpuStorage::F32(values)) => self
                .attend(&queries, FloatCache { keys: &keys[from_key..], values: &values[from_value..], capacity: len }),
            _ => bail!("attention: a cache must be of integers, F16 or F32"),
        };
        Ok((CpuStorage::F32(out?), (batch, tokens, heads * head_dim).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        queries: &CudaStorage,
        queries_layout: &Layout,
        keys: &CudaStorage,
        keys_layout: &Layout,
        values: &CudaStorage,
        values_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (batch, heads, tokens, head_dim) = queries_layout.shape().dims4()?;
        let (keys, values) = ((keys, keys_layout), (values, values_layout));
        let out = cuda::attention(queries, queries_layout, keys, values, self.past, self.slopes.as_deref())?;
        Ok((out, (batch, tokens, heads * head_dim).into()))
    }
}

impl Attention {
    fn attend(&self, queries: &Queries, cache: impl cpu::Cache) -> Result<Vec<f32>> {
        let scale = 1.0 / (queries.head_dim as f32).sqrt();
        let attend = |out: &mut [MaybeUninit<f32>]| {
            cpu::attend(self.kernels, queries, cache, self.past, scale, self.slopes.as_deref(), out);
            Ok(())
        };
        let len = queries.batch * queries.tokens * queries.heads * queries.head_dim;
        // SAFETY: every head of every token is written.
        profile::time(Part::Attention, || unsafe { cpu::written(len, attend) })
    }
}

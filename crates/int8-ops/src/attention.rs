//! Causal attention over cached keys and values, as Candle custom ops.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{self, CacheValue, KEYS_PER_BLOCK, Kernels, LANES, Queries, padded, team};
#[cfg(feature = "cuda")]
use crate::cuda;

/// The keys and values of one layer, with room for more, in the layout that [`attention`] reads. On the CPU keys
/// are in groups whose like features lie side by side, so that a vector holds one feature of 16 keys; on a CUDA
/// device both are (batch, heads, capacity, head_dim).
#[derive(Debug, Clone)]
pub struct AttentionCache {
    /// (batch, heads, capacity / 16, head_dim, 16) on the CPU.
    keys: Tensor,
    /// (batch, heads, capacity, head_dim in whole vectors) on the CPU.
    values: Tensor,
    head_dim: usize,
}

impl AttentionCache {
    /// Room for at least `capacity` tokens, on the device of `like` (batch, heads, tokens, head_dim), in
    /// `F16` or `F32`.
    pub fn new(like: &Tensor, capacity: usize, dtype: DType) -> Result<Self> {
        let (batch, heads, _, head_dim) = like.dims4()?;
        Self::with_dims(batch, heads, capacity, head_dim, dtype, like.device())
    }

    fn with_dims(
        batch: usize,
        heads: usize,
        capacity: usize,
        head_dim: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if !matches!(dtype, DType::F16 | DType::F32) {
            bail!("keys and values are cached in F16 or F32, not in {dtype:?}");
        }
        let capacity = capacity.next_multiple_of(KEYS_PER_BLOCK);
        let (keys, width) = match device.is_cuda() {
            true => (Tensor::zeros((batch, heads, capacity, head_dim), dtype, device)?, head_dim),
            false => {
                (Tensor::zeros((batch, heads, capacity / LANES, head_dim, LANES), dtype, device)?, padded(head_dim))
            }
        };
        let values = Tensor::zeros((batch, heads, capacity, width), dtype, device)?;
        Ok(Self { keys, values, head_dim })
    }

    /// The number of tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.values.dims()[2]
    }

    /// Bytes taken, room for further tokens included.
    pub fn bytes(&self) -> usize {
        [&self.keys, &self.values].map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).iter().sum()
    }

    /// The first `len` tokens of this one, with room for at least `capacity`.
    pub fn grown(&self, len: usize, capacity: usize) -> Result<Self> {
        let (batch, heads, _, _) = self.values.dims4()?;
        let (dtype, device) = (self.values.dtype(), self.values.device());
        let grown = Self::with_dims(batch, heads, capacity, self.head_dim, dtype, device)?;
        let groups = len.div_ceil(LANES);
        if groups > 0 {
            let in_keys = if self.keys.device().is_cuda() { groups * LANES } else { groups };
            grown.keys.slice_set(&self.keys.narrow(2, 0, in_keys)?.contiguous()?, 2, 0)?;
            grown.values.slice_set(&self.values.narrow(2, 0, groups * LANES)?.contiguous()?, 2, 0)?;
        }
        Ok(grown)
    }

    /// Writes keys and values (batch, heads, tokens, head_dim), `F32` on the CPU, of any strides but that of the
    /// last dimension, as those of the tokens from `past` on; what was there is overwritten.
    pub fn write(&self, past: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (batch, heads, _, _) = self.values.dims4()?;
        for tensor in [keys, values] {
            let dims = tensor.dims4()?;
            if dims != (batch, heads, dims.2, self.head_dim) || past + dims.2 > self.capacity() {
                let (head_dim, capacity) = (self.head_dim, self.capacity());
                bail!("{dims:?} do not fit a cache ({batch}, {heads}, {capacity}, {head_dim}) after {past} tokens");
            }
        }
        if keys.elem_count() + values.elem_count() == 0 {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if self.keys.device().is_cuda() {
            return cuda::write_cache(&self.keys, &self.values, past, keys, values);
        }
        self.keys.inplace_op2(keys, &Write { past, place: Place::Key })?;
        self.values.inplace_op2(values, &Write { past, place: Place::Value })
    }
}

/// What is written to a cache.
enum Place {
    Key,
    Value,
}

/// Values whose writing is worth sharing among threads: a key's lie on many cache lines, which mostly come from
/// memory.
const VALUES_WORTH_SHARING: usize = 1 << 10;

struct Write {
    past: usize,
    place: Place,
}

impl InplaceOp2 for Write {
    fn name(&self) -> &'static str {
        "attention-cache-write"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, cache_layout: &Layout, new: &CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(new) = new else { bail!("keys and values must be F32") };
        let start = cache_layout.start_offset();
        match cache {
            CpuStorage::F32(cache) => self.write(&mut cache[start..], cache_layout, new, layout),
            CpuStorage::F16(cache) => self.write(&mut cache[start..], cache_layout, new, layout),
            _ => bail!("a cache must be F16 or F32"),
        }
    }
}

impl Write {
    fn write<T: CacheValue>(&self, cache: &mut [T], cache_layout: &Layout, new: &[f32], layout: &Layout) -> Result<()> {
        let (batch, heads, tokens, head_dim) = layout.shape().dims4()?;
        let strides = head_strides(layout)?;
        let per_head: usize = cache_layout.dims()[2..].iter().product();
        let kernels = Kernels::active();
        let write = |(row, cache): (usize, &mut [T])| {
            let mut narrowed = cache[..head_dim].to_vec();
            for token in 0..tokens {
                let from = layout.start_offset() + row / heads * strides[0] + row % heads * strides[1];
                let new = &new[from + token * strides[2]..][..head_dim];
                let position = self.past + token;
                match self.place {
                    Place::Key => {
                        let group = &mut cache[position / LANES * LANES * head_dim..][..LANES * head_dim];
                        T::narrow(kernels, new, &mut narrowed);
                        let places = group.iter_mut().skip(position % LANES).step_by(LANES);
                        places.zip(&narrowed).for_each(|(place, value)| *place = *value);
                    }
                    Place::Value => {
                        T::narrow(kernels, new, &mut cache[position * padded(head_dim)..][..head_dim]);
                    }
                }
            }
        };
        let rows = cache.chunks_mut(per_head).take(batch * heads).enumerate();
        if batch * heads * tokens * head_dim < VALUES_WORTH_SHARING {
            rows.for_each(write);
        } else {
            team::for_each(rows.collect(), write);
        }
        Ok(())
    }
}

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
    let (cache_batch, cache_heads, capacity, _) = cache.values.dims4()?;
    if (batch, heads, head_dim) != (cache_batch, cache_heads, cache.head_dim) || past + tokens > capacity {
        let wanted = (cache_batch, cache_heads, capacity, cache.head_dim);
        bail!("attention: queries {:?} after {past} tokens do not fit a cache {wanted:?}", queries.shape());
    }
    if slopes.is_some_and(|slopes| slopes.len() != heads) {
        bail!("attention: {} slopes for {heads} heads", slopes.map_or(0, <[f32]>::len));
    }
    queries.apply_op3_no_bwd(
        &cache.keys,
        &cache.values,
        &Attention { kernels, past, slopes: slopes.map(<[f32]>::to_vec) },
    )
}

struct Attention {
    kernels: &'static Kernels,
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
        let out = match (keys, values) {
            (CpuStorage::F16(keys), CpuStorage::F16(values)) => {
                self.attend(&queries, (keys, keys_layout), (values, values_layout))
            }
            (CpuStorage::F32(keys), CpuStorage::F32(values)) => {
                self.attend(&queries, (keys, keys_layout), (values, values_layout))
            }
            _ => bail!("attention: a cache must be F16 or F32"),
        };
        Ok((CpuStorage::F32(out), (batch, tokens, heads * head_dim).into()))
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
    fn attend<T: CacheValue>(
        &self,
        queries: &Queries,
        (keys, keys_layout): (&[T], &Layout),
        (values, values_layout): (&[T], &Layout),
    ) -> Vec<f32> {
        let cached = cpu::Cached {
            keys: &keys[keys_layout.start_offset()..],
            values: &values[values_layout.start_offset()..],
            capacity: values_layout.dims()[2],
            past: self.past,
        };
        let mut out = cpu::zeros(queries.batch * queries.tokens * queries.heads * queries.head_dim);
        let scale = 1.0 / (queries.head_dim as f32).sqrt();
        cpu::attend(self.kernels, queries, cached, scale, self.slopes.as_deref(), &mut out);
        out
    }
}

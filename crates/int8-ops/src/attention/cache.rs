//! The keys and values of one layer, in the layouts that attention reads.

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Tensor, bail};
use half::f16;

use super::head_strides;
use crate::cpu::{self, CacheCode, CacheValue, KEYS_PER_BLOCK, Kernels, LANES, Pair, padded, team};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::profile::{self, Part};

/// What keys and values are cached in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheDtype {
    /// 8-bit integers with a scale for each head's key and value, on the CPU alone: about half the bytes of 16 bits,
    /// and less exact.
    Int8,
    /// 16-bit integers with a scale for each head's key and value, on the CPU alone: as exact as f16 where the
    /// features of a head are of like size, and faster.
    Int16,
    /// 16-bit floats.
    F16,
    /// 32-bit floats, as keys and values are computed.
    F32,
}

impl CacheDtype {
    /// The one to take on a device: the fastest of those that lose nothing.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Int16 } else { Self::F16 }
    }

    /// Whether it is of integers, which are cached on the CPU alone.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::Int8 | Self::Int16)
    }

    /// `int8`, `int16`, `f16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// The bytes of the key and the value that a head caches for a token, without what pads them.
    pub fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Int8 => 2 * (head_dim + size_of::<f32>()),
            Self::Int16 => 2 * (2 * head_dim + size_of::<f32>()),
            Self::F16 => 4 * head_dim,
            Self::F32 => 8 * head_dim,
        }
    }
}

/// The keys and values of one layer, with room for more, in the layout that [`attention`](super::attention()) reads.
/// In floats on the CPU keys are in groups whose like features lie side by side, so that a vector holds one
/// feature of 16 keys; on a CUDA device both are (batch, heads, capacity, head_dim). For integers see `IntegerCache`.
#[derive(Debug, Clone)]
pub struct AttentionCache {
    /// (batch, heads, capacity / 16, head_dim, 16) of floats on the CPU; (batch, heads, capacity / 64, record) of
    /// integers.
    pub(super) keys: Tensor,
    /// (batch, heads, capacity, head_dim in whole vectors) of floats on the CPU; (batch, heads, capacity / 64,
    /// record) of integers.
    pub(super) values: Tensor,
    pub(super) head_dim: usize,
    dtype: CacheDtype,
}

impl AttentionCache {
    /// Room for at least `capacity` tokens, on the device of `like` (batch, heads, tokens, head_dim).
    ///
    /// Errors for integers on another device than the CPU.
    pub fn new(like: &Tensor, capacity: usize, dtype: CacheDtype) -> Result<Self> {
        let (batch, heads, _, head_dim) = like.dims4()?;
        Self::with_dims((batch, heads, head_dim), capacity, dtype, like.device())
    }

    fn with_dims(
        (batch, heads, head_dim): (usize, usize, usize),
        capacity: usize,
        dtype: CacheDtype,
        device: &Device,
    ) -> Result<Self> {
        let capacity = capacity.next_multiple_of(KEYS_PER_BLOCK);
        let blocks = capacity / KEYS_PER_BLOCK;
        let zeros = |dims: &[usize], dtype| Tensor::zeros([&[batch, heads], dims].concat(), dtype, device);
        let float = if dtype == CacheDtype::F16 { DType::F16 } else { DType::F32 };
        let (keys, values) = match (dtype, device.is_cpu()) {
            (CacheDtype::Int8, true) => (
                zeros(&[blocks, cpu::key_record::<i8>(head_dim)], DType::U32)?,
                zeros(&[blocks, cpu::value_record::<i8>(head_dim)], DType::U32)?,
            ),
            (CacheDtype::Int16, true) => (
                zeros(&[blocks, cpu::key_record::<i16>(head_dim)], DType::U32)?,
                zeros(&[blocks, cpu::value_record::<i16>(head_dim)], DType::U32)?,
            ),
            (CacheDtype::Int8 | CacheDtype::Int16, false) => {
                bail!("keys and values are cached in {} on the CPU alone", dtype.name())
            }
            (_, true) => {
                (zeros(&[capacity / LANES, head_dim, LANES], float)?, zeros(&[capacity, padded(head_dim)], float)?)
            }
            (_, false) => (zeros(&[capacity, head_dim], float)?, zeros(&[capacity, head_dim], float)?),
        };
        Ok(Self { keys, values, head_dim, dtype })
    }

    /// What keys and values are in.
    pub fn dtype(&self) -> CacheDtype {
        self.dtype
    }

    /// (batch, heads, capacity, head_dim).
    pub(super) fn dims(&self) -> (usize, usize, usize, usize) {
        let dims = self.values.dims();
        (dims[0], dims[1], dims[2] * self.tokens_per_entry().1, self.head_dim)
    }

    /// How many tokens lie under one index of the third dimension of keys, and of values.
    fn tokens_per_entry(&self) -> (usize, usize) {
        match self.dtype {
            dtype if dtype.is_integer() => (KEYS_PER_BLOCK, KEYS_PER_BLOCK),
            _ if self.keys.device().is_cpu() => (LANES, 1),
            _ => (1, 1),
        }
    }

    /// The number of tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.dims().2
    }

    /// Bytes taken, room for further tokens included.
    pub fn bytes(&self) -> usize {
        [&self.keys, &self.values].map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).iter().sum()
    }

    /// The first `len` tokens of this one, with room for at least `capacity`.
    pub fn grown(&self, len: usize, capacity: usize) -> Result<Self> {
        let (batch, heads, _, head_dim) = self.dims();
        let grown = Self::with_dims((batch, heads, head_dim), capacity, self.dtype, self.values.device())?;
        if len > 0 {
            let (in_keys, in_values) = self.tokens_per_entry();
            let first = |tensor: &Tensor, size| tensor.narrow(2, 0, len.div_ceil(size))?.contiguous();
            grown.keys.slice_set(&first(&self.keys, in_keys)?, 2, 0)?;
            grown.values.slice_set(&first(&self.values, in_values)?, 2, 0)?;
        }
        Ok(grown)
    }

    /// Writes keys and values (batch, heads, tokens, head_dim), `F32` on the CPU, of any strides but that of the
    /// last dimension, as those of the tokens from `past` on; what was there is overwritten.
    ///
    /// Errors where they are of other dimensions, or there is no room for them.
    pub fn write(&self, past: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (batch, heads, capacity, head_dim) = self.dims();
        let tokens = keys.dims4()?.2;
        for tensor in [keys, values] {
            let dims = tensor.dims4()?;
            if dims != (batch, heads, tokens, head_dim) || past + tokens > capacity {
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
        profile::time(Part::Cache, || {
            self.keys.inplace_op2(keys, &Write { past, place: Place::Key, dtype: self.dtype })?;
            self.values.inplace_op2(values, &Write { past, place: Place::Value, dtype: self.dtype })
        })
    }
}

/// What is written to a cache.
#[derive(Clone, Copy)]
enum Place {
    Key,
    Value,
}

/// Values that a thread is given to write at a time, of whole heads: a key's lie on many cache lines, which mostly come
/// from memory.
const VALUES_PER_PART: usize = 1 << 10;

struct Write {
    past: usize,
    place: Place,
    dtype: CacheDtype,
}

impl InplaceOp2 for Write {
    fn name(&self) -> &'static str {
        "attention-cache-write"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, cache_layout: &Layout, new: &CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(new) = new else { bail!("keys and values must be F32") };
        let start = cache_layout.start_offset();
        match cache {
            CpuStorage::F32(cache) => self.write_floats(&mut cache[start..], cache_layout, new, layout),
            CpuStorage::F16(cache) => self.write_floats::<f16>(&mut cache[start..], cache_layout, new, layout),
            CpuStorage::U32(cache) => match self.dtype {
                CacheDtype::Int8 => self.write_codes::<i8>(&mut cache[start..], cache_layout, new, layout),
                CacheDtype::Int16 => self.write_codes::<i16>(&mut cache[start..], cache_layout, new, layout),
                float => bail!("found a cache of integers for one in {}", float.name()),
            },
            _ => bail!("a cache must be of integers, F16 or F32"),
        }
    }
}

impl Write {
    fn write_floats<T: CacheValue>(
        &self,
        cache: &mut [T],
        in_cache: &Layout,
        new: &[f32],
        of_new: &Layout,
    ) -> Result<()> {
        let kernels = Kernels::active();
        self.write(cache, in_cache, new, of_new, |cache, position, new, narrowed: &mut Vec<T>| match self.place {
            Place::Key => {
                let group = &mut cache[position / LANES * LANES * new.len()..][..LANES * new.len()];
                narrowed.resize(new.len(), group[0]);
                T::narrow(kernels, new, narrowed);
                let places = group.iter_mut().skip(position % LANES).step_by(LANES);
                places.zip(narrowed).for_each(|(place, value)| *place = *value);
            }
            Place::Value => T::narrow(kernels, new, &mut cache[position * padded(new.len())..][..new.len()]),
        })
    }

    fn write_codes<C: CacheCode>(
        &self,
        cache: &mut [u32],
        in_cache: &Layout,
        new: &[f32],
        of_new: &Layout,
    ) -> Result<()> {
        let kernels = Kernels::active();
        let (record, per_head): (usize, usize) = (in_cache.dims()[3], in_cache.dims()[2..].iter().product());
        let is_one_token = of_new.dims()[2] == 1;
        self.write(cache, in_cache, new, of_new, |cache, position, new, codes: &mut Vec<Pair>| {
            let record = &mut cache[position / KEYS_PER_BLOCK * record..][..record];
            codes.resize(new.len().div_ceil(2), Pair::default());
            let index = position % KEYS_PER_BLOCK;
            let places = match self.place {
                Place::Key => cpu::write_key::<C>(kernels, new, index, record, codes),
                Place::Value => cpu::write_value::<C>(kernels, new, index, record, codes),
            };
            if is_one_token {
                // What is written comes from memory meanwhile: two heads on, as one takes less than that.
                let record = record.as_ptr().wrapping_add(2 * per_head);
                std::iter::once(index)
                    .chain(places.step_by(LANES))
                    .for_each(|place| cpu::prefetch_near(record.wrapping_add(place)));
            }
        })
    }

    /// Calls `write(cache of one head, position, new (head_dim), room)` for every token of every head.
    fn write<T: Send, R: Default>(
        &self,
        cache: &mut [T],
        in_cache: &Layout,
        new: &[f32],
        of_new: &Layout,
        write: impl Fn(&mut [T], usize, &[f32], &mut R) + Sync,
    ) -> Result<()> {
        let (batch, heads, tokens, head_dim) = of_new.shape().dims4()?;
        let strides = head_strides(of_new)?;
        let per_head: usize = in_cache.dims()[2..].iter().product();
        let heads_per_part = (VALUES_PER_PART / (tokens * head_dim)).max(1);
        let parts = cache[..batch * heads * per_head].chunks_mut(per_head * heads_per_part).enumerate();
        team::for_each(parts.collect(), |(part, cache)| {
            let mut room = R::default();
            for (row, cache) in (part * heads_per_part..).zip(cache.chunks_mut(per_head)) {
                let start = of_new.start_offset() + row / heads * strides[0] + row % heads * strides[1];
                for token in 0..tokens {
                    write(cache, self.past + token, &new[start + token * strides[2]..][..head_dim], &mut room);
                }
            }
        });
        Ok(())
    }
}

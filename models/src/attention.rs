//! Causal attention over cached keys and values, and ALiBi.

use candle_core::{Result, Tensor, bail};
use int8_ops::{AttentionCache, CacheDtype, attention};

/// The keys and values of every layer for the tokens seen so far; its length is the position.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Option<AttentionCache>>,
    /// `None`: what is best where the model runs.
    dtype: Option<CacheDtype>,
    /// Tokens that every layer holds.
    len: usize,
    /// Tokens that are expected in all; 0 where it is not known.
    expected: usize,
}

/// Room is taken for blocks of so many tokens.
const TOKENS_PER_BLOCK: usize = 64;

/// Expected tokens that room is taken for beforehand: more may never come.
const EXPECTED_AT_ONCE: usize = 2048;

impl KvCache {
    /// An empty cache for a model of `num_layers` blocks, in what is best where that runs; memory is taken as
    /// tokens come.
    pub fn new(num_layers: usize) -> Self {
        Self::with_dtype(num_layers, None)
    }

    /// The same in a dtype of choice.
    pub fn with_dtype(num_layers: usize, dtype: impl Into<Option<CacheDtype>>) -> Self {
        Self { layers: vec![None; num_layers], dtype: dtype.into(), len: 0, expected: 0 }
    }

    /// One that so many tokens are expected in: room is taken for them beforehand, for at most 2,048 more than there
    /// are, and for whole blocks of 64; if others come after all, it grows.
    pub fn expecting(self, tokens: usize) -> Self {
        Self { expected: tokens, ..self }
    }

    /// The number of layers that it is for.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The number of tokens whose keys and values every layer holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been cached yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`, whose room is kept for others.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// What keys and values are in; `None` before the first.
    pub fn dtype(&self) -> Option<CacheDtype> {
        self.layers.iter().flatten().next().map(AttentionCache::dtype)
    }

    /// Bytes that the cache has taken, room for further tokens included.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(AttentionCache::bytes).sum()
    }

    /// Bytes that the keys and values of one token take, for a model of `num_layers` blocks of `num_heads` heads
    /// that are whole vectors wide.
    pub fn bytes_per_token(num_layers: usize, num_heads: usize, head_dim: usize, dtype: CacheDtype) -> usize {
        num_layers * num_heads * dtype.bytes(head_dim)
    }

    /// The part of the cache that belongs to block `index`.
    pub(crate) fn layer(&mut self, index: usize) -> LayerCache<'_> {
        LayerCache { cache: self, index }
    }

    /// Appends keys and values (batch, heads, tokens, head_dim) of one layer, and gives what it holds and
    /// the number of tokens before these.
    ///
    /// Room doubles when it is full, if no end is expected before, so a token's share of the copying does not grow with
    /// the context.
    fn append(&mut self, index: usize, keys: &Tensor, values: &Tensor) -> Result<(&AttentionCache, usize)> {
        // A pass that failed half-way has not moved `len`: what it left is written over.
        let (past, len) = (self.len, self.len + keys.dim(2)?);
        let num_layers = self.layers.len();
        let Some(layer) = self.layers.get_mut(index) else {
            bail!("the cache is for {num_layers} layers, but the model has more")
        };
        let capacity = match len <= self.expected {
            true => (len + EXPECTED_AT_ONCE).max(2 * past).min(self.expected),
            false => len.max(2 * past),
        };
        let capacity = capacity.next_multiple_of(TOKENS_PER_BLOCK);
        let held = match layer.take() {
            Some(held) if held.capacity() >= len => held,
            Some(held) if past > 0 => held.grown(past, capacity)?,
            _ => AttentionCache::new(keys, capacity, self.dtype.unwrap_or_else(|| CacheDtype::of(keys.device())))?,
        };
        held.write(past, keys, values)?;
        if index + 1 == num_layers {
            self.len = len;
        }
        Ok((layer.insert(held), past))
    }
}

/// One block's part of a cache.
pub(crate) struct LayerCache<'a> {
    cache: &'a mut KvCache,
    index: usize,
}

/// Appends keys and values to the cache, and lets every query attend to what is there up to its own
/// position; see [`attention`]. Queries, keys and values are (batch, heads, tokens, head_dim), the result
/// is (batch, tokens, heads * head_dim).
pub(crate) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    slopes: Option<&[f32]>,
    cache: LayerCache,
) -> Result<Tensor> {
    let (held, past) = cache.cache.append(cache.index, keys, values)?;
    attention(queries, held, past, slopes)
}

/// ALiBi's slope for each head (Press et al. 2021, arXiv 2108.12409; `build_alibi_tensor` in
/// transformers/models/bloom/modeling_bloom.py): powers of 2^(-8/n) for the largest power of two n of
/// heads, and for the rest the odd powers of the root of that.
pub(crate) fn alibi_slopes(num_heads: usize) -> Vec<f32> {
    let base = |heads: usize| 2f64.powf(-8.0 / heads as f64);
    let power_of_two = if num_heads.is_power_of_two() { num_heads } else { num_heads.next_power_of_two() / 2 };
    let regular = (1..=power_of_two).map(|power| base(power_of_two).powi(power as i32));
    let between = (0..).map(|index| base(2 * power_of_two).powi(2 * index + 1));
    regular.chain(between).take(num_heads).map(|slope| slope as f32).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn slopes_of_12_heads_fill_in_between_those_of_8() {
        let slopes = alibi_slopes(12);
        assert_eq!(slopes[..8], (1..=8).map(|power| 0.5f32.powi(power)).collect::<Vec<_>>());
        let between: Vec<f32> = [1, 3, 5, 7].map(|power| 0.5f64.sqrt().powi(power) as f32).to_vec();
        assert_eq!(slopes[8..], between);
        assert_eq!(alibi_slopes(112).len(), 112);
        assert_eq!(alibi_slopes(1), [2f32.powi(-8)]);
    }

    /// Keys, values and queries (2, 3, tokens, 8).
    fn random(tokens: usize) -> Result<[Tensor; 3]> {
        let tensor = || Tensor::randn(0f32, 1.0, (2, 3, tokens, 8), &Device::Cpu);
        Ok([tensor()?, tensor()?, tensor()?])
    }

    fn values(tensor: &Tensor) -> Result<Vec<f32>> {
        tensor.flatten_all()?.to_vec1()
    }

    #[test]
    fn tokens_one_by_one_and_in_runs_attend_as_all_at_once_bit_for_bit() -> Result<()> {
        let tokens = 200;
        let [queries, keys, values_] = random(tokens)?;
        let slopes = alibi_slopes(3);
        for dtype in [CacheDtype::Int8, CacheDtype::Int16, CacheDtype::F16, CacheDtype::F32] {
            let mut whole = KvCache::with_dtype(1, dtype);
            let found = attend(&queries, &keys, &values_, Some(&slopes), whole.layer(0))?;
            for run in [1, 7, 64] {
                // The cache grows on the way, and keeps what it held.
                let mut cache = KvCache::with_dtype(1, dtype);
                for first in (0..tokens).step_by(run) {
                    let len = run.min(tokens - first);
                    let some = |tensor: &Tensor| tensor.narrow(2, first, len);
                    let step =
                        attend(&some(&queries)?, &some(&keys)?, &some(&values_)?, Some(&slopes), cache.layer(0))?;
                    assert_eq!(values(&step)?, values(&found.narrow(1, first, len)?)?, "{dtype:?} from {first} on");
                    assert_eq!(cache.len(), first + len);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_a_failed_pass_left_is_written_over() -> Result<()> {
        let mut cache = KvCache::new(2);
        // The first of two layers only, and then a longer pass through both.
        let [queries, keys, values_] = random(3)?;
        attend(&queries, &keys, &values_, None, cache.layer(0))?;
        assert!(cache.is_empty());
        let [queries, keys, values_] = random(100)?;
        let wanted = attend(&queries, &keys, &values_, None, KvCache::new(1).layer(0))?;
        for layer in 0..2 {
            let found = attend(&queries, &keys, &values_, None, cache.layer(layer))?;
            assert_eq!(values(&found)?, values(&wanted)?);
        }
        assert_eq!(cache.len(), 100);
        Ok(())
    }

    #[test]
    fn a_cache_takes_the_bytes_of_its_dtype_for_whole_blocks_of_tokens() -> Result<()> {
        // A scale comes with each integer key and value.
        let integers = [(CacheDtype::Int8, 1, 4), (CacheDtype::Int16, 2, 4)];
        for (dtype, bytes, scale) in integers.into_iter().chain([(CacheDtype::F16, 2, 0), (CacheDtype::F32, 4, 0)]) {
            let mut cache = KvCache::with_dtype(1, dtype);
            let [queries, keys, values_] = random(65)?;
            attend(&queries, &keys, &values_, None, cache.layer(0))?;
            // Keys of 8 features, and values padded to 16.
            assert_eq!(cache.bytes(), 2 * 3 * 128 * ((8 + 16) * bytes + 2 * scale));
        }
        Ok(())
    }

    #[test]
    fn room_is_taken_for_what_is_expected_and_grows_beyond_it() -> Result<()> {
        let [mut cache, mut grown] = [KvCache::new(1).expecting(250), KvCache::new(1)];
        for (tokens, bytes_of) in [(3, 256), (130, 256), (117, 256), (1, 256), (5, 256), (1, 512), (300, 576)] {
            let [queries, keys, values_] = random(tokens)?;
            let found = attend(&queries, &keys, &values_, None, cache.layer(0))?;
            let wanted = attend(&queries, &keys, &values_, None, grown.layer(0))?;
            assert_eq!(values(&found)?, values(&wanted)?);
            assert_eq!(cache.bytes(), 2 * 3 * bytes_of * ((8 + 16) * 2 + 2 * 4), "after {}", cache.len());
        }
        // Not all at once where it is much, and not beyond the end.
        let mut cache = KvCache::new(1).expecting(3000);
        for (tokens, bytes_of) in [(10, 2112), (2102, 2112), (1, 3008)] {
            let [queries, keys, values_] = random(tokens)?;
            attend(&queries, &keys, &values_, None, cache.layer(0))?;
            assert_eq!(cache.bytes(), 2 * 3 * bytes_of * ((8 + 16) * 2 + 2 * 4), "after {}", cache.len());
        }
        Ok(())
    }
}

//! Causal attention over cached keys and values, and ALiBi.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use rayon::prelude::*;

/// The keys and values of every layer for the tokens seen so far; its length is the position.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Option<Layer>>,
    /// Tokens that every layer holds.
    len: usize,
}

/// One layer's keys and values, (batch, heads, capacity, head_dim) each.
#[derive(Debug)]
struct Layer {
    keys: Tensor,
    values: Tensor,
}

/// What keys and values are kept in.
const DTYPE: DType = DType::F32;
/// Tokens that a cache has room for at first.
const FIRST_CAPACITY: usize = 64;

impl KvCache {
    /// An empty cache for a model of `num_layers` blocks; memory is taken as tokens come.
    pub fn new(num_layers: usize) -> Self {
        Self { layers: (0..num_layers).map(|_| None).collect(), len: 0 }
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

    /// Bytes that the cache has taken, room for further tokens included.
    pub fn bytes(&self) -> usize {
        let tensors = self.layers.iter().flatten().flat_map(|layer| [&layer.keys, &layer.values]);
        tensors.map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// Bytes that the keys and values of one token take, for a model of `num_layers` blocks.
    pub fn bytes_per_token(num_layers: usize, hidden_size: usize) -> usize {
        2 * num_layers * hidden_size * DTYPE.size_in_bytes()
    }

    /// The part of the cache that belongs to block `index`.
    pub(crate) fn layer(&mut self, index: usize) -> LayerCache<'_> {
        LayerCache { cache: self, index }
    }

    /// Appends keys and values (batch, heads, tokens, head_dim) of one layer, and gives all it holds:
    /// (batch, heads, past + tokens, head_dim).
    ///
    /// Room doubles when it is full, so a token's share of the copying does not grow with the context.
    fn append(&mut self, index: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, heads, tokens, head_dim) = keys.dims4()?;
        let Some(layer) = self.layers.get_mut(index) else {
            bail!("the cache is for {} layers, but the model has more", self.layers.len())
        };
        // A pass that failed half-way has not moved `len`: what it left is written over.
        let (past, len) = (self.len, self.len + tokens);
        let with_room = |held: Option<&Tensor>, capacity: usize| -> Result<Tensor> {
            let tensor = Tensor::zeros((batch, heads, capacity, head_dim), keys.dtype(), keys.device())?;
            if let Some(held) = held {
                tensor.slice_set(&held.narrow(2, 0, past)?.contiguous()?, 2, 0)?;
            }
            Ok(tensor)
        };
        if layer.as_ref().is_none_or(|held| held.keys.dims()[2] < len) {
            let capacity = len.next_multiple_of(FIRST_CAPACITY).max(2 * past);
            *layer = Some(Layer {
                keys: with_room(layer.as_ref().map(|held| &held.keys), capacity)?,
                values: with_room(layer.as_ref().map(|held| &held.values), capacity)?,
            });
        }
        let Some(Layer { keys: all_keys, values: all_values }) = layer else {
            bail!("layer {index} of the cache is empty")
        };
        all_keys.slice_set(&keys.contiguous()?, 2, past)?;
        all_values.slice_set(&values.contiguous()?, 2, past)?;
        let all = (all_keys.narrow(2, 0, len)?, all_values.narrow(2, 0, len)?);
        if index + 1 == self.layers.len() {
            self.len = len;
        }
        Ok(all)
    }
}

/// One block's part of a cache.
pub(crate) struct LayerCache<'a> {
    cache: &'a mut KvCache,
    index: usize,
}

/// Queries that attend at a time: scores take (heads, this, context) and not (heads, prompt, prompt),
/// and keys that come after all of them are left out.
const QUERIES_PER_CHUNK: usize = 128;
/// Scores that are in memory at a time, where a query's own do not take more.
const MAX_SCORES: usize = 1 << 24;

/// Appends keys and values to the cache, and lets every query attend to what is there up to its own
/// position: softmax(q k^T / sqrt(head_dim) + alibi) v. Queries, keys and values are (batch, heads,
/// tokens, head_dim), the result is (batch, tokens, heads * head_dim); ALiBi comes by a slope for
/// each head, or not at all.
pub(crate) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    slopes: Option<&[f32]>,
    cache: LayerCache,
) -> Result<Tensor> {
    let (keys, values) = cache.cache.append(cache.index, keys, values)?;
    let (batch, heads, tokens, head_dim) = queries.dims4()?;
    let past = keys.dim(2)? - tokens;
    let per_chunk = (MAX_SCORES / (batch * heads * (past + tokens))).clamp(1, QUERIES_PER_CHUNK);
    let queries = (queries * (1.0 / (head_dim as f64).sqrt()))?.contiguous()?;
    let chunks = (0..tokens).step_by(per_chunk).map(|first| {
        let len = per_chunk.min(tokens - first);
        let visible = past + first + len;
        let (keys, values) = (keys.narrow(2, 0, visible)?, values.narrow(2, 0, visible)?);
        let scores = queries.narrow(2, first, len)?.contiguous()?.matmul(&keys.t()?)?;
        scores.inplace_op1(&CausalSoftmax { slopes, past: past + first })?;
        scores.matmul(&values)
    });
    let context = Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 2)?;
    context.transpose(1, 2)?.flatten_from(2)
}

/// Turns scores (batch, heads, queries, keys) into weights: row by row the softmax over the keys up
/// to the query's own position, 0 for the later ones.
struct CausalSoftmax<'a> {
    /// ALiBi adds slope * key position to a score. What is constant over the keys changes no
    /// softmax, so the key's absolute position serves every query.
    slopes: Option<&'a [f32]>,
    /// The keys before the first query's own.
    past: usize,
}

impl InplaceOp1 for CausalSoftmax<'_> {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, heads, queries, keys) = layout.shape().dims4()?;
        let (CpuStorage::F32(scores), Some((start, end))) = (scores, layout.contiguous_offsets()) else {
            bail!("causal softmax: scores must be contiguous F32")
        };
        scores[start..end].par_chunks_mut(keys).enumerate().with_min_len(4).for_each(|(row, scores)| {
            let (head, query) = (row / queries % heads, row % queries);
            let (seen, later) = scores.split_at_mut(self.past + query + 1);
            if let Some(slopes) = self.slopes {
                let slope = slopes[head];
                seen.iter_mut().enumerate().for_each(|(key, score)| *score += slope * key as f32);
            }
            let max = seen.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
            seen.iter_mut().for_each(|score| *score = (*score - max).exp());
            let sum: f32 = seen.iter().sum();
            seen.iter_mut().for_each(|weight| *weight /= sum);
            later.fill(0.0);
        });
        Ok(())
    }
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

    #[test]
    fn long_prompts_attend_in_chunks_as_if_at_once() -> Result<()> {
        let (heads, tokens, head_dim) = (3, 2 * QUERIES_PER_CHUNK + 7, 8);
        let tensor = || Tensor::randn(0f32, 1.0, (2, heads, tokens, head_dim), &Device::Cpu);
        let (queries, keys, values) = (tensor()?, tensor()?, tensor()?);
        let slopes = alibi_slopes(heads);
        let mut whole = KvCache::new(1);
        let found = attend(&queries, &keys, &values, Some(&slopes), whole.layer(0))?;
        // One token at a time: no later key is ever there, and each chunk is a single query.
        let mut cache = KvCache::new(1);
        for token in 0..tokens {
            let one = |tensor: &Tensor| tensor.narrow(2, token, 1);
            let step = attend(&one(&queries)?, &one(&keys)?, &one(&values)?, Some(&slopes), cache.layer(0))?;
            let difference = (step - found.narrow(1, token, 1)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(difference < 1e-5, "token {token}: {difference}");
        }
        Ok(())
    }

    #[test]
    fn what_a_failed_pass_left_is_written_over() -> Result<()> {
        let mut cache = KvCache::new(2);
        let tokens = |count: usize, value: f32| Tensor::full(value, (1, 1, count, 2), &Device::Cpu);
        // The first of two layers only, and then a longer pass through both.
        cache.append(0, &tokens(3, 1.0)?, &tokens(3, 1.0)?)?;
        assert!(cache.is_empty());
        for layer in 0..2 {
            let (keys, values) = cache.append(layer, &tokens(100, 2.0)?, &tokens(100, 3.0)?)?;
            assert_eq!(keys.flatten_all()?.to_vec1::<f32>()?, [2.0; 200]);
            assert_eq!(values.flatten_all()?.to_vec1::<f32>()?, [3.0; 200]);
        }
        assert_eq!(cache.len(), 100);
        Ok(())
    }

    #[test]
    fn a_cache_keeps_what_was_appended_while_it_grows() -> Result<()> {
        let mut cache = KvCache::new(1);
        let token = |value: f32| Tensor::full(value, (2, 3, 1, 4), &Device::Cpu);
        for position in 0..200 {
            let value = position as f32;
            let (keys, values) = cache.append(0, &token(value)?, &token(-value)?)?;
            assert_eq!(cache.len(), position + 1);
            assert_eq!((keys.dims(), values.dims()), (&[2, 3, position + 1, 4][..], &[2, 3, position + 1, 4][..]));
            let wanted: Vec<f32> = (0..=position).map(|p| p as f32).collect();
            assert_eq!(keys.get(1)?.get(2)?.narrow(1, 3, 1)?.flatten_all()?.to_vec1::<f32>()?, wanted);
        }
        // Two sequences, and room for 256 tokens.
        assert_eq!(cache.bytes(), 2 * 256 * KvCache::bytes_per_token(1, 3 * 4));
        Ok(())
    }
}

//! Attention over cached keys and values: the cache, the causal mask, ALiBi.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::ops::softmax_last_dim;

/// The keys and values of every layer for the tokens seen so far; its length is the position.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Option<Layer>>,
    /// Tokens that every layer holds.
    len: usize,
}

/// One layer's keys and values, (batch, heads, capacity, head_dim) each, and how many are filled.
#[derive(Debug)]
struct Layer {
    keys: Tensor,
    values: Tensor,
    len: usize,
}

/// Tokens that a cache has room for at first.
const FIRST_CAPACITY: usize = 64;

impl KvCache {
    /// An empty cache for a model of `num_layers` blocks; memory is taken as tokens come.
    pub fn new(num_layers: usize) -> Self {
        Self { layers: (0..num_layers).map(|_| None).collect(), len: 0 }
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
            bail!("the cache has {} layers, but the model has more", self.layers.len())
        };
        let past = layer.as_ref().map_or(0, |layer| layer.len);
        let len = past + tokens;
        let with_room = |held: Option<&Tensor>, capacity: usize| -> Result<Tensor> {
            let tensor = Tensor::zeros((batch, heads, capacity, head_dim), keys.dtype(), keys.device())?;
            if let Some(held) = held {
                tensor.slice_set(&held.narrow(2, 0, past)?.contiguous()?, 2, 0)?;
            }
            Ok(tensor)
        };
        let layer = match layer {
            Some(held) if held.keys.dim(2)? >= len => held,
            _ => {
                let capacity = len.next_multiple_of(FIRST_CAPACITY).max(2 * past);
                let keys = with_room(layer.as_ref().map(|held| &held.keys), capacity)?;
                let values = with_room(layer.as_ref().map(|held| &held.values), capacity)?;
                layer.insert(Layer { keys, values, len: past })
            }
        };
        layer.keys.slice_set(&keys.contiguous()?, 2, past)?;
        layer.values.slice_set(&values.contiguous()?, 2, past)?;
        layer.len = len;
        if index + 1 == self.layers.len() {
            self.len = len;
        }
        let layer = self.layers[index].as_ref();
        let Some(Layer { keys, values, .. }) = layer else { bail!("layer {index} of the cache is empty") };
        Ok((keys.narrow(2, 0, len)?, values.narrow(2, 0, len)?))
    }
}

/// One block's part of a cache.
pub(crate) struct LayerCache<'a> {
    cache: &'a mut KvCache,
    index: usize,
}

/// What is added to attention scores: made once for all blocks of a forward pass.
#[derive(Debug)]
pub struct AttentionBias {
    /// ALiBi, (heads, 1, past + tokens): each head's slope times the key's position.
    alibi: Option<Tensor>,
    /// (tokens, past + tokens): 0 where a query may see a key, else the most negative finite number,
    /// which unlike infinity can never make a NaN. None for a single token, which sees all.
    causal: Option<Tensor>,
}

impl AttentionBias {
    /// For `tokens` queries that follow `past` others, with ALiBi where the model has `slopes` (one
    /// for each head).
    pub(crate) fn new(slopes: Option<&[f32]>, tokens: usize, past: usize) -> Result<Self> {
        let keys = past + tokens;
        // A bias that is constant over the keys changes no softmax, so a key's absolute position
        // serves every query.
        let alibi = slopes.map(|slopes| {
            let bias = slopes.iter().flat_map(|slope| (0..keys).map(move |key| slope * key as f32)).collect();
            Tensor::from_vec(bias, (slopes.len(), 1, keys), &Device::Cpu)
        });
        let causal = (tokens > 1).then(|| {
            let row = |query| (0..keys).map(move |key| if key <= past + query { 0.0 } else { f32::MIN });
            Tensor::from_vec((0..tokens).flat_map(row).collect::<Vec<f32>>(), (tokens, keys), &Device::Cpu)
        });
        Ok(Self { alibi: alibi.transpose()?, causal: causal.transpose()? })
    }
}

/// Appends keys and values to the cache, and lets the queries attend to all it holds:
/// softmax(q k^T / sqrt(head_dim) + bias) v. Queries, keys and values are (batch, heads, tokens,
/// head_dim), the result is (batch, tokens, heads * head_dim).
pub(crate) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    bias: &AttentionBias,
    cache: LayerCache,
) -> Result<Tensor> {
    let (keys, values) = cache.cache.append(cache.index, keys, values)?;
    let scale = 1.0 / (queries.dim(3)? as f64).sqrt();
    let mut scores = (queries * scale)?.contiguous()?.matmul(&keys.t()?)?;
    for bias in [&bias.alibi, &bias.causal].into_iter().flatten() {
        scores = scores.broadcast_add(bias)?;
    }
    let context = softmax_last_dim(&scores)?.matmul(&values)?;
    context.transpose(1, 2)?.flatten_from(2)
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
        assert_eq!(cache.bytes(), 2 * 2 * 3 * 256 * 4 * 4);
        Ok(())
    }
}

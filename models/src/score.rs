//! The logits at every position of a text.

use candle_core::{Device, Tensor};
use int8_ops::CacheDtype;

use crate::attention::KvCache;
use crate::causal_lm::CausalLm;
use crate::error::{Error, Result};

/// Positions that the head runs on at a time: all at once would take vocabulary times positions.
const POSITIONS: usize = 16;

/// Calls `each` with the logits (vocabulary) at every position of `ids`, in order: those of the token
/// that follows it. Keys and values are in `cache_dtype`, or in what is best on the model's device.
/// `is_interrupted` is asked now and then, and ends it early.
///
/// Errors when there are no ids, and what `each` returns.
pub fn score<E: From<Error>>(
    model: &dyn CausalLm,
    ids: &[u32],
    cache_dtype: Option<CacheDtype>,
    is_interrupted: fn() -> bool,
    mut each: impl FnMut(&[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let tokens = Tensor::new(ids, &Device::Cpu).and_then(|ids| ids.unsqueeze(0)).map_err(Error::from)?;
    let mut cache = KvCache::with_dtype(model.num_layers(), cache_dtype);
    let hidden = model.hidden_states(&tokens, &mut cache, is_interrupted).map_err(Error::from)?;
    let Some(hidden) = hidden else { return Ok(()) };
    for start in (0..ids.len()).step_by(POSITIONS) {
        if is_interrupted() {
            break;
        }
        let count = POSITIONS.min(ids.len() - start);
        let logits = hidden.narrow(1, start, count).and_then(|hidden| model.head(&hidden)?.flatten_all()?.to_vec1());
        let logits: Vec<f32> = logits.map_err(Error::from)?;
        logits.chunks(model.vocab_size()).try_for_each(&mut each)?;
    }
    Ok(())
}

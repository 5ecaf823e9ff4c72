//! What every causal language model here is made of.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::attention::KvCache;

/// A decoder-only language model: an embedding, blocks, a final norm and a head.
///
/// A batch holds sequences of one length, each with outlier columns of its own, so that what shares
/// a batch with a sequence never changes its result.
///
/// Token ids come in on the CPU, and logits go out there; what is in between is on the model's device, in
/// [`activation_dtype`](Self::activation_dtype).
pub trait CausalLm: Send + Sync {
    /// The number of token ids, and the width of the logits.
    fn vocab_size(&self) -> usize;

    /// The number of blocks.
    fn num_layers(&self) -> usize;

    /// The longest sequence the model can hold; `None` where positions have no end.
    fn max_positions(&self) -> Option<usize>;

    /// Where the weights are, and the model runs.
    fn device(&self) -> &Device;

    /// What it computes in between its layers: `F32` on the CPU; on a CUDA device the 16-bit dtype of the weights
    /// that are not quantised, unless the precision is `F32`.
    fn activation_dtype(&self) -> DType;

    /// The input of the first block (batch, tokens, hidden) for token ids (batch, tokens) in `U32`
    /// that follow `past` tokens.
    fn embed(&self, tokens: &Tensor, past: usize) -> Result<Tensor>;

    /// The output of block `index` (batch, tokens, hidden); appends the block's keys and values to
    /// the cache.
    fn block(&self, index: usize, hidden: &Tensor, cache: &mut KvCache) -> Result<Tensor>;

    /// What goes into the head: the last block's output (.., hidden), normed.
    fn final_norm(&self, hidden: &Tensor) -> Result<Tensor>;

    /// The logits (.., vocabulary), in `F32` on the CPU, of normed hidden states (.., hidden).
    fn head(&self, hidden: &Tensor) -> Result<Tensor>;

    /// Reads every matrix that a step of one token reads, once, and does nothing else: the least time that a
    /// step can take on the CPU. Gives the number of bytes; an error when the model is on another device.
    fn read_weights(&self) -> Result<usize>;

    /// The normed hidden states (batch, tokens, hidden) of token ids (batch, tokens) in `U32` that
    /// follow what is in the cache; `None` when `is_interrupted`, asked before every block, ends the
    /// pass, which leaves the cache as it was.
    fn hidden_states(
        &self,
        tokens: &Tensor,
        cache: &mut KvCache,
        is_interrupted: fn() -> bool,
    ) -> Result<Option<Tensor>> {
        let (layers, held) = (self.num_layers(), cache.num_layers());
        if layers != held {
            bail!("the model has {layers} layers, but the cache is for {held}");
        }
        if tokens.elem_count() == 0 {
            bail!("no tokens: a pass needs at least one");
        }
        let mut hidden = self.embed(tokens, cache.len())?;
        for index in 0..layers {
            if is_interrupted() {
                return Ok(None);
            }
            hidden = self.block(index, &hidden, cache)?;
        }
        self.final_norm(&hidden).map(Some)
    }

    /// The logits (batch, 1, vocabulary) of what comes after `batch` sequences of one length, whose ids follow
    /// one another in `ids` and what is in the cache; `None` as above. The head runs on last positions only.
    fn next_logits(
        &self,
        ids: &[u32],
        batch: usize,
        cache: &mut KvCache,
        is_interrupted: fn() -> bool,
    ) -> Result<Option<Tensor>> {
        let tokens = Tensor::from_slice(ids, (batch, ids.len() / batch.max(1)), &Device::Cpu)?;
        let Some(hidden) = self.hidden_states(&tokens, cache, is_interrupted)? else { return Ok(None) };
        self.head(&hidden.narrow(1, hidden.dim(1)? - 1, 1)?).map(Some)
    }

    /// The logits (batch, tokens, vocabulary) at every position of token ids (batch, tokens) in `U32`
    /// that follow what is in the cache.
    fn forward(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        match self.hidden_states(tokens, cache, || false)? {
            Some(hidden) => self.head(&hidden),
            None => bail!("the pass was interrupted"),
        }
    }
}

/// An error unless a model is on the CPU, whose reading of weights can be measured.
pub(crate) fn check_on_cpu(device: &Device) -> Result<()> {
    match device.is_cpu() {
        true => Ok(()),
        false => bail!("weights can be read on the CPU only, but the model is on {:?}", device.location()),
    }
}

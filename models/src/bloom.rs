//! BLOOM (BigScience 2022, arXiv 2211.05100), from config to logits; the reference is
//! transformers/models/bloom/modeling_bloom.py.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use int8_ops::{Activation, Fused, LayerNorm};

use crate::attention::{KvCache, LayerCache, alibi_slopes, attend};
use crate::causal_lm::{CausalLm, check_on_cpu};
use crate::config::Config;
use crate::error;
use crate::layers::{Embedding, Linear};
use crate::outline::{Component, LongestContext, Outline, Parameters};
use crate::weights::{Loader, Weights};

/// What config.json says of the model.
struct Shape {
    vocab_size: usize,
    hidden_size: usize,
    num_layers: usize,
    num_heads: usize,
    layer_norm_epsilon: f64,
    /// The residual is the layer norm's output instead of its input.
    residual_after_layernorm: bool,
    /// The head is the embedding.
    tie_word_embeddings: bool,
    /// Whether attention's `dense` and `dense_4h_to_h` add their biases; in the reference they do
    /// not with `slow_but_exact` and `pretraining_tp > 1`.
    output_biases: bool,
}

impl Shape {
    fn read(config: &Config) -> error::Result<Self> {
        // Published configs use either name; where both stand, the reference takes the first.
        let hidden_size = config.size(&["n_embed", "hidden_size"])?;
        Ok(Self {
            vocab_size: config.size(&["vocab_size"])?,
            hidden_size,
            num_layers: config.size(&["num_hidden_layers", "n_layer"])?,
            num_heads: config.heads(&["num_attention_heads", "n_head"], hidden_size)?,
            layer_norm_epsilon: config.positive("layer_norm_epsilon", 1e-5)?,
            residual_after_layernorm: config.flag("apply_residual_connection_post_layernorm", false)?,
            tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
            output_biases: !(config.flag("slow_but_exact", false)? && config.positive("pretraining_tp", 1.0)? > 1.0),
        })
    }
}

/// What the names of the model's tensors may stand under.
const PREFIXES: &[&str] = &["transformer.", ""];
/// The tensor by which the prefix is found.
const PROBE: &str = "word_embeddings.weight";

/// The tokens that the published models were trained on; not every config says so.
const TRAINED_CONTEXT: usize = 2048;

/// The model; fields bear the checkpoint's names.
pub(crate) struct Bloom {
    word_embeddings: Embedding,
    word_embeddings_layernorm: LayerNorm,
    h: Vec<Block>,
    ln_f: LayerNorm,
    /// None: the head is the embedding.
    lm_head: Option<Embedding>,
    vocab_size: usize,
    slopes: Vec<f32>,
}

impl Bloom {
    pub(crate) const MODEL_TYPE: &str = "bloom";

    pub(crate) fn load(config: &Config, loader: &Loader) -> error::Result<Self> {
        let shape = Shape::read(config)?;
        let weights = loader.weights(PREFIXES, PROBE)?;
        let (hidden, eps) = (shape.hidden_size, shape.layer_norm_epsilon);
        let lm_head = || loader.weights(&["lm_head."], "weight")?.embedding(shape.vocab_size, hidden);
        Ok(Self {
            word_embeddings: weights.pp("word_embeddings").embedding(shape.vocab_size, hidden)?,
            word_embeddings_layernorm: weights.pp("word_embeddings_layernorm").layer_norm(hidden, eps)?,
            h: weights
                .blocks("h", shape.num_layers)?
                .map(|weights| Block::load(&shape, &weights))
                .collect::<error::Result<_>>()?,
            ln_f: weights.pp("ln_f").layer_norm(hidden, eps)?,
            lm_head: if shape.tie_word_embeddings { None } else { Some(lm_head()?) },
            vocab_size: shape.vocab_size,
            slopes: alibi_slopes(shape.num_heads),
        })
    }

    /// The tensors that [`Bloom::load`] reads.
    pub(crate) fn outline(config: &Config) -> error::Result<Outline> {
        let shape = Shape::read(config)?;
        let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
        let mut outside = Parameters::default();
        outside.embedding("word_embeddings", vocab, hidden);
        outside.layer_norm("word_embeddings_layernorm", hidden);
        outside.layer_norm("ln_f", hidden);
        let mut block = Parameters::default();
        block.layer_norm("input_layernorm", hidden);
        block.linear(Component::Attention, "self_attention.query_key_value", hidden, 3 * hidden, true);
        block.linear(Component::Attention, "self_attention.dense", hidden, hidden, shape.output_biases);
        block.layer_norm("post_attention_layernorm", hidden);
        block.linear(Component::Mlp, "mlp.dense_h_to_4h", hidden, 4 * hidden, true);
        block.linear(Component::Mlp, "mlp.dense_4h_to_h", 4 * hidden, hidden, shape.output_biases);
        let mut head = Parameters::default();
        if !shape.tie_word_embeddings {
            head.embedding("lm_head", vocab, hidden);
        }
        Ok(Outline {
            prefixes: PREFIXES,
            probe: PROBE,
            outside,
            blocks: "h",
            block,
            num_layers: shape.num_layers,
            head,
            hidden_size: hidden,
            num_heads: shape.num_heads,
            context: LongestContext::Trained(config.size_or(&["seq_length", "n_positions"], TRAINED_CONTEXT)?),
        })
    }
}

impl CausalLm for Bloom {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn num_layers(&self) -> usize {
        self.h.len()
    }

    fn max_positions(&self) -> Option<usize> {
        None
    }

    fn device(&self) -> &Device {
        self.word_embeddings.device()
    }

    fn activation_dtype(&self) -> DType {
        self.word_embeddings.activation_dtype()
    }

    fn embed(&self, tokens: &Tensor, _past: usize) -> Result<Tensor> {
        self.word_embeddings_layernorm.forward(&self.word_embeddings.lookup(tokens)?)
    }

    fn block(&self, index: usize, hidden: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.h[index].forward(hidden, &self.slopes, cache.layer(index))
    }

    fn final_norm(&self, hidden: &Tensor) -> Result<Tensor> {
        self.ln_f.forward(hidden)
    }

    fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.as_ref().unwrap_or(&self.word_embeddings).logits(hidden)
    }

    fn read_weights(&self) -> Result<usize> {
        check_on_cpu(self.device())?;
        let blocks: usize = self.h.iter().map(Block::read).sum::<Result<_>>()?;
        Ok(blocks + self.lm_head.as_ref().unwrap_or(&self.word_embeddings).read()?)
    }
}

struct Block {
    input_layernorm: LayerNorm,
    self_attention: Attention,
    post_attention_layernorm: LayerNorm,
    mlp: Mlp,
    residual_after_layernorm: bool,
}

impl Block {
    fn load(shape: &Shape, weights: &Weights) -> error::Result<Self> {
        let (hidden, eps) = (shape.hidden_size, shape.layer_norm_epsilon);
        Ok(Self {
            input_layernorm: weights.pp("input_layernorm").layer_norm(hidden, eps)?,
            self_attention: Attention::load(shape, &weights.pp("self_attention"))?,
            post_attention_layernorm: weights.pp("post_attention_layernorm").layer_norm(hidden, eps)?,
            mlp: Mlp::load(shape, &weights.pp("mlp"))?,
            residual_after_layernorm: shape.residual_after_layernorm,
        })
    }

    /// Reads the linear layers' weights once; gives their bytes.
    fn read(&self) -> Result<usize> {
        let Self { self_attention, mlp, .. } = self;
        let layers = [&self_attention.query_key_value, &self_attention.dense, &mlp.dense_h_to_4h, &mlp.dense_4h_to_h];
        layers.into_iter().map(Linear::read).sum()
    }

    /// (batch, tokens, hidden) to the same.
    fn forward(&self, hidden: &Tensor, slopes: &[f32], cache: LayerCache) -> Result<Tensor> {
        let attention = |x: &Tensor, norm: Option<&LayerNorm>| self.self_attention.forward(x, norm, slopes, cache);
        let hidden = self.with_residual(hidden, &self.input_layernorm, attention)?;
        self.with_residual(&hidden, &self.post_attention_layernorm, |x, norm| self.mlp.forward(x, norm))
    }

    /// `residual + part(norm(hidden))`, where the residual is `hidden` or its norm: the part is given its
    /// residual, which it adds, and what is left to do of the norm.
    fn with_residual(
        &self,
        hidden: &Tensor,
        norm: &LayerNorm,
        part: impl FnOnce(&Tensor, Option<&LayerNorm>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if self.residual_after_layernorm { part(&norm.forward(hidden)?, None) } else { part(hidden, Some(norm)) }
    }
}

struct Attention {
    query_key_value: Linear,
    dense: Linear,
    num_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(shape: &Shape, weights: &Weights) -> error::Result<Self> {
        let hidden = shape.hidden_size;
        Ok(Self {
            query_key_value: weights.pp("query_key_value").linear(hidden, 3 * hidden, true)?,
            dense: weights.pp("dense").linear(hidden, hidden, shape.output_biases)?,
            num_heads: shape.num_heads,
            head_dim: hidden / shape.num_heads,
        })
    }

    /// `x + attention(norm(x))`.
    fn forward(&self, x: &Tensor, norm: Option<&LayerNorm>, slopes: &[f32], cache: LayerCache) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        // The rows of query_key_value are head-major: each head's query, key and value in turn.
        let fused = self.query_key_value.forward_fused(x, &Fused { norm, ..Fused::default() })?;
        let fused = fused.reshape((batch, tokens, self.num_heads, 3, self.head_dim))?;
        // (batch, heads, tokens, head_dim)
        let part = |index| fused.narrow(3, index, 1)?.squeeze(3)?.transpose(1, 2);
        let attended = attend(&part(0)?, &part(1)?, &part(2)?, Some(slopes), cache)?;
        self.dense.forward_fused(&attended, &Fused { residual: Some(x), ..Fused::default() })
    }
}

struct Mlp {
    dense_h_to_4h: Linear,
    dense_4h_to_h: Linear,
}

impl Mlp {
    fn load(shape: &Shape, weights: &Weights) -> error::Result<Self> {
        let hidden = shape.hidden_size;
        Ok(Self {
            dense_h_to_4h: weights.pp("dense_h_to_4h").linear(hidden, 4 * hidden, true)?,
            dense_4h_to_h: weights.pp("dense_4h_to_h").linear(4 * hidden, hidden, shape.output_biases)?,
        })
    }

    /// `x + mlp(norm(x))`.
    fn forward(&self, x: &Tensor, norm: Option<&LayerNorm>) -> Result<Tensor> {
        // The form by tanh is BLOOM's (`bloom_gelu_forward`).
        let activation = Some(Activation::Gelu);
        let wide = self.dense_h_to_4h.forward_fused(x, &Fused { norm, activation, residual: None })?;
        self.dense_4h_to_h.forward_fused(&wide, &Fused { residual: Some(x), ..Fused::default() })
    }
}

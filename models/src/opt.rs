//! OPT (Zhang et al. 2022, arXiv 2205.01068) and Galactica (arXiv 2211.09085), from config to logits;
//! the reference is transformers/models/opt/modeling_opt.py.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use int8_ops::{Activation, Fused, LayerNorm};

use crate::attention::{KvCache, LayerCache, attend};
use crate::causal_lm::{CausalLm, check_on_cpu};
use crate::config::Config;
use crate::error;
use crate::layers::{Embedding, Linear, Linears};
use crate::outline::{Component, LongestContext, Outline, Parameters};
use crate::weights::{Loader, Weights};

/// The position table's first row that belongs to a position; the ones before it are for padding.
const POSITION_OFFSET: usize = 2;

/// What the names of the decoder's tensors may stand under.
const PREFIXES: &[&str] = &["model.decoder.", "decoder.", ""];
/// The tensor by which the prefix is found.
const PROBE: &str = "embed_tokens.weight";

/// What `torch.nn.LayerNorm` uses; configs do not say.
const LAYER_NORM_EPSILON: f64 = 1e-5;

/// What config.json says of the model.
struct Shape {
    vocab_size: usize,
    hidden_size: usize,
    /// Width of the embedding and the head; projected to the hidden size where it is another.
    word_embed_proj_dim: usize,
    ffn_dim: usize,
    num_layers: usize,
    num_heads: usize,
    max_positions: usize,
    activation: Activation,
    /// Norms come before attention and the MLP, not after their residuals.
    do_layer_norm_before: bool,
    /// Whether a norm follows the last block.
    final_layer_norm: bool,
    /// Whether the linear layers of the blocks have biases.
    enable_bias: bool,
    /// Whether norms have weights and biases.
    layer_norm_affine: bool,
    tie_word_embeddings: bool,
}

impl Shape {
    fn read(config: &Config) -> error::Result<Self> {
        let hidden_size = config.size(&["hidden_size"])?;
        let do_layer_norm_before = config.flag("do_layer_norm_before", true)?;
        Ok(Self {
            vocab_size: config.size(&["vocab_size"])?,
            hidden_size,
            word_embed_proj_dim: config.size_or(&["word_embed_proj_dim"], hidden_size)?,
            ffn_dim: config.size(&["ffn_dim"])?,
            num_layers: config.size(&["num_hidden_layers"])?,
            num_heads: config.heads(&["num_attention_heads"], hidden_size)?,
            max_positions: config.size(&["max_position_embeddings"])?,
            activation: read_activation(config)?,
            do_layer_norm_before,
            final_layer_norm: do_layer_norm_before && !config.flag("_remove_final_layer_norm", false)?,
            enable_bias: config.flag("enable_bias", true)?,
            layer_norm_affine: config.flag("layer_norm_elementwise_affine", true)?,
            tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        })
    }

    fn layer_norm(&self, weights: &Weights) -> error::Result<LayerNorm> {
        let width = self.hidden_size;
        if self.layer_norm_affine {
            return weights.layer_norm(width, LAYER_NORM_EPSILON);
        }
        let device = weights.device();
        let (ones, zeros) = (Tensor::ones(width, DType::F32, device)?, Tensor::zeros(width, DType::F32, device)?);
        Ok(LayerNorm::new(ones, zeros, LAYER_NORM_EPSILON)?)
    }
}

/// What comes between the two layers of the MLP.
fn read_activation(config: &Config) -> error::Result<Activation> {
    let name = config.choice("activation_function", &["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])?;
    Ok(match name {
        "relu" => Activation::Relu,
        "gelu" => Activation::GeluErf,
        _ => Activation::Gelu,
    })
}

/// The model; fields bear the checkpoint's names.
pub(crate) struct Opt {
    embed_tokens: Embedding,
    embed_positions: Embedding,
    project_in: Option<Linear>,
    layers: Vec<Block>,
    final_layer_norm: Option<LayerNorm>,
    project_out: Option<Linear>,
    /// None: the head is the embedding.
    lm_head: Option<Embedding>,
    vocab_size: usize,
    max_positions: usize,
}

impl Opt {
    pub(crate) const MODEL_TYPE: &str = "opt";

    pub(crate) fn load(config: &Config, loader: &Loader) -> error::Result<Self> {
        let shape = Shape::read(config)?;
        let weights = loader.weights(PREFIXES, PROBE)?;
        let (hidden, width) = (shape.hidden_size, shape.word_embed_proj_dim);
        let projection = |name: &str, inputs, outputs| match inputs == outputs {
            true => Ok(None),
            false => weights.pp(name).linear(inputs, outputs, false).map(Some),
        };
        let lm_head = || loader.weights(&["lm_head."], "weight")?.embedding(shape.vocab_size, width);
        Ok(Self {
            embed_tokens: weights.pp("embed_tokens").embedding(shape.vocab_size, width)?,
            embed_positions: weights.pp("embed_positions").table(shape.max_positions + POSITION_OFFSET, hidden)?,
            project_in: projection("project_in", width, hidden)?,
            layers: weights
                .blocks("layers", shape.num_layers)?
                .map(|weights| Block::load(&shape, &weights))
                .collect::<error::Result<_>>()?,
            final_layer_norm: match shape.final_layer_norm {
                true => Some(shape.layer_norm(&weights.pp("final_layer_norm"))?),
                false => None,
            },
            project_out: projection("project_out", hidden, width)?,
            lm_head: if shape.tie_word_embeddings { None } else { Some(lm_head()?) },
            vocab_size: shape.vocab_size,
            max_positions: shape.max_positions,
        })
    }

    /// The tensors that [`Opt::load`] reads.
    pub(crate) fn outline(config: &Config) -> error::Result<Outline> {
        let shape = Shape::read(config)?;
        let (hidden, width, bias) = (shape.hidden_size, shape.word_embed_proj_dim, shape.enable_bias);
        let layer_norm = |list: &mut Parameters, name: &str| {
            if shape.layer_norm_affine {
                list.layer_norm(name, hidden);
            }
        };
        let mut outside = Parameters::default();
        outside.embedding("embed_tokens", shape.vocab_size, width);
        outside.table("embed_positions", shape.max_positions + POSITION_OFFSET, hidden);
        if width != hidden {
            outside.linear(Component::Embedding, "project_in", width, hidden, false);
            outside.linear(Component::Embedding, "project_out", hidden, width, false);
        }
        if shape.final_layer_norm {
            layer_norm(&mut outside, "final_layer_norm");
        }
        let mut block = Parameters::default();
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            block.linear(Component::Attention, &format!("self_attn.{projection}"), hidden, hidden, bias);
        }
        layer_norm(&mut block, "self_attn_layer_norm");
        block.linear(Component::Mlp, "fc1", hidden, shape.ffn_dim, bias);
        block.linear(Component::Mlp, "fc2", shape.ffn_dim, hidden, bias);
        layer_norm(&mut block, "final_layer_norm");
        let mut head = Parameters::default();
        if !shape.tie_word_embeddings {
            head.embedding("lm_head", shape.vocab_size, width);
        }
        Ok(Outline {
            prefixes: PREFIXES,
            probe: PROBE,
            outside,
            blocks: "layers",
            block,
            num_layers: shape.num_layers,
            head,
            hidden_size: hidden,
            num_heads: shape.num_heads,
            context: LongestContext::Positions(shape.max_positions),
        })
    }
}

impl CausalLm for Opt {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn max_positions(&self) -> Option<usize> {
        Some(self.max_positions)
    }

    fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    fn activation_dtype(&self) -> DType {
        self.embed_tokens.activation_dtype()
    }

    fn embed(&self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        let (_, new) = tokens.dims2()?;
        if past + new > self.max_positions {
            candle_core::bail!("{} tokens, but the model has only {} positions", past + new, self.max_positions);
        }
        let mut hidden = self.embed_tokens.lookup(tokens)?;
        if let Some(project_in) = &self.project_in {
            hidden = project_in.forward(&hidden)?;
        }
        let first = (past + POSITION_OFFSET) as u32;
        let positions = Tensor::arange(first, first + new as u32, &Device::Cpu)?;
        hidden.broadcast_add(&self.embed_positions.lookup(&positions)?)
    }

    fn block(&self, index: usize, hidden: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.layers[index].forward(hidden, cache.layer(index))
    }

    fn final_norm(&self, hidden: &Tensor) -> Result<Tensor> {
        match &self.final_layer_norm {
            Some(norm) => norm.forward(hidden),
            None => Ok(hidden.clone()),
        }
    }

    fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        match &self.project_out {
            Some(project_out) => head.logits(&project_out.forward(hidden)?),
            None => head.logits(hidden),
        }
    }

    fn read_weights(&self) -> Result<usize> {
        check_on_cpu(self.device())?;
        let blocks: usize = self.layers.iter().map(Block::read).sum::<Result<_>>()?;
        let projections: usize =
            self.project_in.iter().chain(&self.project_out).map(Linear::read).sum::<Result<_>>()?;
        Ok(blocks + projections + self.lm_head.as_ref().unwrap_or(&self.embed_tokens).read()?)
    }
}

struct Block {
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
    final_layer_norm: LayerNorm,
    do_layer_norm_before: bool,
}

impl Block {
    fn load(shape: &Shape, weights: &Weights) -> error::Result<Self> {
        let (hidden, ffn) = (shape.hidden_size, shape.ffn_dim);
        Ok(Self {
            self_attn: Attention::load(shape, &weights.pp("self_attn"))?,
            self_attn_layer_norm: shape.layer_norm(&weights.pp("self_attn_layer_norm"))?,
            fc1: weights.pp("fc1").linear(hidden, ffn, shape.enable_bias)?,
            activation: shape.activation,
            fc2: weights.pp("fc2").linear(ffn, hidden, shape.enable_bias)?,
            final_layer_norm: shape.layer_norm(&weights.pp("final_layer_norm"))?,
            do_layer_norm_before: shape.do_layer_norm_before,
        })
    }

    /// Reads the linear layers' weights once; gives their bytes.
    fn read(&self) -> Result<usize> {
        let others: usize =
            [&self.self_attn.out_proj, &self.fc1, &self.fc2].into_iter().map(Linear::read).sum::<Result<_>>()?;
        Ok(self.self_attn.projections.read()? + others)
    }

    /// (batch, tokens, hidden) to the same.
    fn forward(&self, hidden: &Tensor, cache: LayerCache) -> Result<Tensor> {
        let attention = |x: &Tensor, norm: Option<&LayerNorm>| self.self_attn.forward(x, norm, cache);
        let hidden = self.with_residual(hidden, &self.self_attn_layer_norm, attention)?;
        self.with_residual(&hidden, &self.final_layer_norm, |x, norm| self.mlp(x, norm))
    }

    /// `x + mlp(norm(x))`.
    fn mlp(&self, x: &Tensor, norm: Option<&LayerNorm>) -> Result<Tensor> {
        let wide = self.fc1.forward_fused(x, &Fused { norm, activation: Some(self.activation), residual: None })?;
        self.fc2.forward_fused(&wide, &Fused { residual: Some(x), ..Fused::default() })
    }

    /// `hidden + part(norm(hidden))`, or `norm(hidden + part(hidden))` where norms come after: the part adds
    /// its input, and is given a norm that comes before.
    fn with_residual(
        &self,
        hidden: &Tensor,
        norm: &LayerNorm,
        part: impl FnOnce(&Tensor, Option<&LayerNorm>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if self.do_layer_norm_before { part(hidden, Some(norm)) } else { norm.forward(&part(hidden, None)?) }
    }
}

struct Attention {
    /// `q_proj`, `k_proj` and `v_proj`.
    projections: Linears,
    out_proj: Linear,
    num_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(shape: &Shape, weights: &Weights) -> error::Result<Self> {
        let hidden = shape.hidden_size;
        Ok(Self {
            projections: weights.linears(&["q_proj", "k_proj", "v_proj"], hidden, hidden, shape.enable_bias)?,
            out_proj: weights.pp("out_proj").linear(hidden, hidden, shape.enable_bias)?,
            num_heads: shape.num_heads,
            head_dim: hidden / shape.num_heads,
        })
    }

    /// `x + attention(norm(x))`.
    fn forward(&self, x: &Tensor, norm: Option<&LayerNorm>, cache: LayerCache) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let projected = self.projections.forward(x, norm)?;
        let projected = projected.reshape((batch, tokens, 3, self.num_heads, self.head_dim))?;
        // (batch, heads, tokens, head_dim)
        let part = |index| projected.narrow(2, index, 1)?.squeeze(2)?.transpose(1, 2);
        let attended = attend(&part(0)?, &part(1)?, &part(2)?, None, cache)?;
        self.out_proj.forward_fused(&attended, &Fused { residual: Some(x), ..Fused::default() })
    }
}

//! What a config.json alone says of a model: its tensors and the sizes of its cache. The tensors are
//! listed beside the code that loads them, in `bloom.rs` and `opt.rs`.

use crate::config::Config;
use crate::error::Result;

/// The part of a model that bytes are counted under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Component {
    /// The embedding, the positions, the head, and the projections between them and the blocks.
    Embedding,
    /// The linear layers of attention.
    Attention,
    /// The linear layers of the MLP.
    Mlp,
    /// Layer norms, and the biases of all linear layers.
    NormsAndBiases,
    /// The scales of int8 weights, one for each row.
    Scales,
}

impl Component {
    /// All of them, in the order of a report.
    pub const ALL: [Self; 5] = [Self::Embedding, Self::Attention, Self::Mlp, Self::NormsAndBiases, Self::Scales];

    /// The key in JSON: `embedding`, `attention`, `mlp`, `norms_and_biases` or `scales`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Mlp => "mlp",
            Self::NormsAndBiases => "norms_and_biases",
            Self::Scales => "scales",
        }
    }

    /// The name in text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding and head",
            Self::Attention => "attention",
            Self::Mlp => "MLP",
            Self::NormsAndBiases => "norms and biases",
            Self::Scales => "scales",
        }
    }
}

/// The module of the head, which stands under no prefix.
pub(crate) const HEAD: &str = "lm_head";

/// How a tensor is loaded, which decides what it is held in: the constructor of `Weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The weight of a linear layer.
    Linear,
    /// The embedding or the head.
    Embedding,
    /// A table that is only looked up, such as positions.
    Table,
    /// A bias, or a weight or bias of a norm.
    Vector,
}

/// A tensor that a config calls for.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    /// The module's name, below a prefix or a block.
    pub(crate) module: String,
    /// `weight` or `bias`.
    pub(crate) tensor: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) role: Role,
    pub(crate) component: Component,
}

impl Parameter {
    /// The tensor's name under `path`.
    pub(crate) fn name_under(&self, path: &str) -> String {
        format!("{path}{}.{}", self.module, self.tensor)
    }

    pub(crate) fn values(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// A list of parameters under one prefix; its methods are those that `Weights` loads layers with.
#[derive(Debug, Default)]
pub(crate) struct Parameters(Vec<Parameter>);

impl Parameters {
    fn push(&mut self, component: Component, role: Role, module: &str, tensor: &'static str, shape: &[usize]) {
        self.0.push(Parameter { module: module.to_string(), tensor, shape: shape.to_vec(), role, component });
    }

    pub(crate) fn linear(&mut self, component: Component, module: &str, inputs: usize, outputs: usize, bias: bool) {
        self.push(component, Role::Linear, module, "weight", &[outputs, inputs]);
        if bias {
            self.push(Component::NormsAndBiases, Role::Vector, module, "bias", &[outputs]);
        }
    }

    pub(crate) fn embedding(&mut self, module: &str, rows: usize, width: usize) {
        self.push(Component::Embedding, Role::Embedding, module, "weight", &[rows, width]);
    }

    pub(crate) fn table(&mut self, module: &str, rows: usize, width: usize) {
        self.push(Component::Embedding, Role::Table, module, "weight", &[rows, width]);
    }

    pub(crate) fn layer_norm(&mut self, module: &str, width: usize) {
        self.push(Component::NormsAndBiases, Role::Vector, module, "weight", &[width]);
        self.push(Component::NormsAndBiases, Role::Vector, module, "bias", &[width]);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.0.iter()
    }
}

/// Every tensor of a model, and what its cache grows with.
#[derive(Debug)]
pub(crate) struct Outline {
    /// What the names below may stand under, as published first.
    pub(crate) prefixes: &'static [&'static str],
    /// The tensor by which the prefix is found.
    pub(crate) probe: &'static str,
    /// The tensors outside of the blocks.
    pub(crate) outside: Parameters,
    /// The name that blocks are counted under.
    pub(crate) blocks: &'static str,
    /// The tensors of one block; all blocks are alike.
    pub(crate) block: Parameters,
    pub(crate) num_layers: usize,
    /// The head, where it is not the embedding; under no prefix.
    pub(crate) head: Parameters,
    pub(crate) hidden_size: usize,
    pub(crate) num_heads: usize,
    pub(crate) context: LongestContext,
}

impl Outline {
    /// Every tensor, and its name where the names stand under `prefix`.
    pub(crate) fn tensors<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (String, &'a Parameter)> {
        let named = |path: String, list: &'a Parameters| {
            list.iter().map(move |parameter| (parameter.name_under(&path), parameter))
        };
        let block = move |index| named(format!("{prefix}{}.{index}.", self.blocks), &self.block);
        let blocks = (0..self.num_layers).flat_map(block);
        named(prefix.to_string(), &self.outside).chain(blocks).chain(named(String::new(), &self.head))
    }

    /// An error when a config calls for more parameters than are believed: each size was, but sums in 64
    /// bits would overflow.
    pub(crate) fn check_size(&self, config: &Config) -> Result<()> {
        let parameters = |list: &Parameters| list.iter().map(|p| u128::from(p.values())).sum::<u128>();
        let blocks = parameters(&self.block) * self.num_layers as u128;
        let all = parameters(&self.outside) + parameters(&self.head) + blocks;
        if all > MAX_PARAMETERS {
            return Err(config.problem(format!("calls for {all} parameters, wanted {MAX_PARAMETERS} at most")));
        }
        Ok(())
    }
}

/// The most parameters that are believed; the largest published models have 1e12.
const MAX_PARAMETERS: u128 = 1 << 48;

/// The longest sequence of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongestContext {
    /// The model has so many positions.
    Positions(usize),
    /// Positions have no end, but the model was trained on so many tokens.
    Trained(usize),
}

impl LongestContext {
    /// The tokens of it.
    pub fn tokens(self) -> usize {
        match self {
            Self::Positions(tokens) | Self::Trained(tokens) => tokens,
        }
    }
}

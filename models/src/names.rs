//! The names of a family's tensors: what each is to the model.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::stored_int8::{ABSMAX, FORMAT};
use crate::error::Result;

/// How a family names its tensors.
pub(crate) struct TensorNames {
    /// What the names of all tensors but the head's begin with; the first as the whole language model
    /// is saved, the others as parts of it are.
    pub(crate) prefixes: &'static [&'static str],
    /// The module of the token embedding.
    pub(crate) embedding: &'static str,
    /// The last parts of the names of the linear layers, those of the head aside.
    pub(crate) linear_layers: &'static [&'static str],
}

/// The module of the head, which has no prefix.
pub(crate) const HEAD: &str = "lm_head";

/// What a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The weight of the token embedding.
    Embedding,
    /// The weight of the head.
    Head,
    /// The weight of a linear layer.
    Linear,
    /// What goes with a weight in int8.
    Int8Part,
    /// A bias, a norm's parameter, a table of positions.
    Other,
}

impl TensorNames {
    /// The one of the prefixes that the checkpoint's names have.
    pub(crate) fn prefix_in(&self, checkpoint: &Checkpoint) -> Result<&'static str> {
        checkpoint.prefix_of(self.prefixes, &format!("{}.weight", self.embedding))
    }

    /// The name as the whole language model has it, of a name in a checkpoint whose names have this
    /// prefix.
    pub(crate) fn full_name(&self, prefix: &str, name: &str) -> String {
        match name.strip_prefix(prefix) {
            Some(rest) if !name.starts_with(&format!("{HEAD}.")) => format!("{}{rest}", self.prefixes[0]),
            _ => name.to_string(),
        }
    }

    /// What the tensor of this name is.
    pub(crate) fn role(&self, name: &str) -> Role {
        let Some((module, part)) = name.rsplit_once('.') else { return Role::Other };
        let layer = module.rsplit('.').next().unwrap_or(module);
        match part {
            ABSMAX | FORMAT => Role::Int8Part,
            "weight" if module == HEAD => Role::Head,
            "weight" if layer == self.embedding => Role::Embedding,
            "weight" if self.linear_layers.contains(&layer) => Role::Linear,
            _ => Role::Other,
        }
    }
}

//! What weights are held in.

use int8_ops::OUTLIER_THRESHOLD;

use crate::error::{Error, Result};
use crate::outline::HEAD;

/// What the weights of the linear layers are held in.
#[derive(Debug, Clone, PartialEq)]
pub enum Precision {
    /// 32-bit floats, the embedding and the head too.
    F32,
    /// IEEE 16-bit floats, the embedding and the head too.
    F16,
    /// bfloat16, the embedding and the head too.
    BF16,
    /// LLM.int8(): the linear layers of the blocks in int8, the embedding and the head in 16 bits.
    Int8(Int8Options),
}

/// How LLM.int8() is applied.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Options {
    /// The magnitude from which activations are outliers; `None` for no decomposition.
    pub threshold: Option<f32>,
    /// Linear layers to keep in 16 bits: names of modules, or whole parts of their names
    /// (`h.0`, `mlp.dense_h_to_4h`, `dense`).
    pub skip_modules: Vec<String>,
    /// Whether the embedding and the head are int8 too.
    pub head: bool,
}

impl Default for Int8Options {
    fn default() -> Self {
        Self { threshold: Some(OUTLIER_THRESHOLD), skip_modules: Vec::new(), head: false }
    }
}

impl Int8Options {
    /// Whether the linear layer of this full name is to be kept in 16 bits.
    pub(crate) fn skips(&self, module: &str) -> bool {
        is_skipped(module, &self.skip_modules)
    }

    /// Whether the embedding and the head are held in int8, given whether the checkpoint has them so.
    pub(crate) fn has_int8_head(&self, is_stored_int8: bool) -> bool {
        (self.head || is_stored_int8) && !self.skip_modules.iter().any(|skip| skip == HEAD)
    }

    /// An error when a module to skip is none of the linear layers of these full names. The head may be
    /// named, as is usual with Transformers, though it is no linear layer of the blocks.
    pub(crate) fn check_skip_modules(&self, names: &[impl AsRef<str>]) -> Result<()> {
        let is_known = |skip: &str| skip == HEAD || names.iter().any(|name| matches(name.as_ref(), skip));
        let Some(name) = self.skip_modules.iter().find(|skip| !is_known(skip)) else { return Ok(()) };
        let examples = names.iter().take(4).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
        Err(Error::SkipModule { name: name.clone(), examples })
    }
}

/// Whether the linear layer of this full name is one of `skip_modules`.
pub(crate) fn is_skipped(module: &str, skip_modules: &[String]) -> bool {
    skip_modules.iter().any(|skip| matches(module, skip))
}

/// Whether `skip` is the module's name or a run of whole parts of it.
fn matches(module: &str, skip: &str) -> bool {
    format!(".{module}.").contains(&format!(".{skip}."))
}

impl Default for Precision {
    fn default() -> Self {
        Self::Int8(Int8Options::default())
    }
}

impl Precision {
    /// `f32`, `f16`, `bf16` or `int8`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Int8(_) => "int8",
        }
    }
}

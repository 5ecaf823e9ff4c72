//! Where the tensors of a model come from: the files of a checkpoint, or a generator of random numbers.

use candle_core::{DType, Device, Tensor};
use int8_ops::Int8Matrix;
use safetensors::Dtype;

use crate::error::Result;

/// The tensors of a model by their full names.
pub(crate) trait Source {
    /// The first of `prefixes` under which there is the tensor `probe`.
    fn find_prefix<'p>(&self, prefixes: &[&'p str], probe: &str) -> Result<&'p str>;

    /// An error when there is a block beyond the `count` that config.json calls for; `path` is what the names
    /// of its tensors would begin with.
    fn check_blocks_end(&self, path: &str, count: usize) -> Result<()>;

    /// The tensor of that full name, which must have the given shape.
    fn find_tensor<'a>(&'a self, name: &str, shape: &[usize]) -> Result<Box<dyn SourceTensor + 'a>>;

    /// Bytes of all tensors as they are stored.
    fn stored_bytes(&self) -> usize;

    /// Whether tensors are stored in what config.json says, which may be int8.
    fn is_as_config_says(&self) -> bool;

    /// Whether any tensor is stored in BF16.
    fn has_bf16(&self) -> bool;
}

/// A tensor that has yet to be brought into the form that a layer holds it in.
pub(crate) trait SourceTensor {
    /// The full name.
    fn name(&self) -> &str;

    fn shape(&self) -> &[usize];

    /// What the values are stored in; I8 for the codes of an int8 checkpoint.
    fn dtype(&self) -> Dtype;

    /// Bytes as it is stored.
    fn stored_bytes(&self) -> usize;

    /// A vector in F32, F16 or BF16, on the CPU.
    fn vector(&self, dtype: DType) -> Result<Tensor>;

    /// A matrix (rows, cols) in int8, on `device`, which quantises it where that is to be done.
    fn int8_matrix(&self, device: &Device) -> Result<Int8Matrix>;

    /// A matrix (rows, cols) in F32, F16 or BF16, on the CPU.
    fn float_matrix(&self, dtype: DType) -> Result<Tensor>;
}

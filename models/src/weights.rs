//! Tensors by name to layers in the chosen precision, and the ledger of the bytes they take.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};
use int8_ops::{FloatLinear, Int8Linear, Int8LinearGroup, LayerNorm};
use safetensors::Dtype;

use crate::error::Result;
use crate::layers::{Embedding, Linear, Linears, Table};
use crate::ledger::{Ledger, LedgerEntry};
use crate::load::LoadOptions;
use crate::outline::HEAD;
use crate::precision::{Int8Options, Precision};
use crate::source::{Source, SourceTensor};

/// The weights of a model under one prefix of names.
#[derive(Clone)]
pub(crate) struct Weights<'a> {
    loader: &'a Loader<'a>,
    path: String,
}

/// What all parts of a model are loaded with.
pub(crate) struct Loader<'a> {
    source: &'a dyn Source,
    precision: &'a Precision,
    device: &'a Device,
    /// Whether the checkpoint says that it was saved in int8.
    is_stored_int8: bool,
    /// Whether the head is the embedding.
    is_head_tied: bool,
    /// Called with the bytes of every tensor that has been loaded.
    loaded: &'a dyn Fn(usize),
    ledger: RefCell<Ledger>,
    /// The full name of every linear layer.
    linear_names: RefCell<Vec<String>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        source: &'a dyn Source,
        options: &'a LoadOptions,
        is_stored_int8: bool,
        is_head_tied: bool,
        loaded: &'a dyn Fn(usize),
    ) -> Self {
        let (ledger, linear_names) = (RefCell::default(), RefCell::default());
        let LoadOptions { precision, device, .. } = options;
        Self { source, precision, device, is_stored_int8, is_head_tied, loaded, ledger, linear_names }
    }

    /// What the model computes in between its layers: `F32` on the CPU; elsewhere what the weights that are not
    /// quantised are held in.
    pub(crate) fn activation_dtype(&self) -> DType {
        match self.precision {
            _ if self.device.is_cpu() => DType::F32,
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::BF16 => DType::BF16,
            Precision::Int8(_) => {
                if self.source.has_bf16() {
                    DType::BF16
                } else {
                    DType::F16
                }
            }
        }
    }

    /// The weights under the first of `prefixes` that has the tensor `probe`.
    pub(crate) fn weights(&'a self, prefixes: &[&str], probe: &str) -> Result<Weights<'a>> {
        let path = self.source.find_prefix(prefixes, probe)?.to_string();
        Ok(Weights { loader: self, path })
    }

    /// The ledger, once the model is loaded; an error when a module to skip was not met.
    pub(crate) fn finish(self) -> Result<Ledger> {
        if let Precision::Int8(options) = self.precision {
            options.check_skip_modules(&self.linear_names.into_inner())?;
        }
        Ok(self.ledger.into_inner())
    }

    /// Enters what a tensor takes as it was loaded, and what of it a step of one token reads.
    fn enter(&self, tensor: &dyn SourceTensor, bytes: usize, step: Step) {
        let values = tensor.shape().iter().product();
        self.ledger.borrow_mut().enter(LedgerEntry {
            name: tensor.name().to_string(),
            values,
            bytes,
            bytes_per_token: match step {
                Step::All | Step::Int8Products => bytes,
                Step::Row => bytes / tensor.shape()[0],
            },
            int8_products_per_token: if step == Step::Int8Products { values } else { 0 },
        });
        (self.loaded)(tensor.stored_bytes());
    }
}

/// What a step of one token does with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Reads all of it.
    All,
    /// Reads all of it, and multiplies it in int8 with each token.
    Int8Products,
    /// Looks up one row.
    Row,
}

impl<'a> Weights<'a> {
    /// The weights one level down: those whose names go on with `.name`.
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = format!("{}{name}.", self.path);
        Self { loader: self.loader, path }
    }

    /// The weights of each of `count` blocks, `name.0` and so on; an error when there are
    /// more.
    pub(crate) fn blocks(&self, name: &str, count: usize) -> Result<impl Iterator<Item = Self>> {
        let blocks = self.pp(name);
        self.loader.source.check_blocks_end(&blocks.pp(count).path, count)?;
        Ok((0..count).map(move |index| blocks.pp(index)))
    }

    /// The device that the model is loaded to.
    pub(crate) fn device(&self) -> &'a Device {
        self.loader.device
    }

    /// The module's full name.
    fn module(&self) -> &str {
        self.path.trim_end_matches('.')
    }

    /// The tensor `name` of this module, which must have the given shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Box<dyn SourceTensor + 'a>> {
        self.loader.source.find_tensor(&format!("{}{name}", self.path), shape)
    }

    /// A linear layer: `weight` (out, in) and, if `bias`, `bias` (out).
    pub(crate) fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.loader.linear_names.borrow_mut().push(self.module().to_string());
        let weight = self.tensor("weight", &[outputs, inputs])?;
        let bias = bias.then(|| self.vector("bias", outputs)).transpose()?;
        // What an int8 checkpoint keeps in 16 bits stays so.
        let stays = |options: &Int8Options| {
            options.skips(self.module()) || self.loader.is_stored_int8 && weight.dtype() != Dtype::I8
        };
        Ok(match self.loader.precision {
            Precision::Int8(options) if !stays(options) => {
                let matrix = weight.int8_matrix(self.device())?;
                self.loader.enter(&*weight, matrix.bytes(), Step::Int8Products);
                Linear::Int8(Int8Linear::new(matrix, bias, options.threshold)?)
            }
            _ => Linear::Float(FloatLinear::new(self.float_matrix(&*weight, Step::All)?, bias)?),
        })
    }

    /// Linear layers of this module, each (out, in), that take the same input: their outputs come
    /// side by side, and int8 layers quantise the input once.
    pub(crate) fn linears(&self, names: &[&str], inputs: usize, outputs: usize, bias: bool) -> Result<Linears> {
        let layers =
            names.iter().map(|name| self.pp(name).linear(inputs, outputs, bias)).collect::<Result<Vec<_>>>()?;
        let int8 = layers.iter().map(|layer| match layer {
            Linear::Int8(layer) => Some(layer.clone()),
            _ => None,
        });
        Ok(match int8.collect::<Option<Vec<_>>>() {
            Some(layers) => Linears::Int8(Int8LinearGroup::new(layers)?),
            None => Linears::Apart(layers),
        })
    }

    /// An embedding: `weight` (rows, width), which is the head too where the two are tied.
    pub(crate) fn embedding(&self, rows: usize, width: usize) -> Result<Embedding> {
        let weight = self.tensor("weight", &[rows, width])?;
        let step = if self.loader.is_head_tied || self.module() == HEAD { Step::All } else { Step::Row };
        let table = match self.loader.precision {
            Precision::Int8(options) if options.has_int8_head(weight.dtype() == Dtype::I8) => {
                let matrix = weight.int8_matrix(self.device())?;
                self.loader.enter(&*weight, matrix.bytes(), step);
                Table::Int8 { matrix, threshold: options.threshold }
            }
            _ => Table::Float(self.float_matrix(&*weight, step)?),
        };
        Ok(Embedding::new(table, self.loader.activation_dtype()))
    }

    /// A table (rows, width) of vectors that are only looked up, such as positions: in 16 bits beside
    /// int8 layers.
    pub(crate) fn table(&self, rows: usize, width: usize) -> Result<Embedding> {
        let weight = self.tensor("weight", &[rows, width])?;
        let table = Table::Float(self.float_matrix(&*weight, Step::Row)?);
        Ok(Embedding::new(table, self.loader.activation_dtype()))
    }

    /// A layer norm: `weight` and `bias` (width).
    pub(crate) fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm::new(self.vector("weight", width)?, self.vector("bias", width)?, eps)?)
    }

    /// A vector (len), in 16 bits unless the precision is `F32`.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let tensor = self.tensor(name, &[len])?;
        let vector = tensor.vector(float_dtype(self.loader.precision, &*tensor))?.to_device(self.device())?;
        self.loader.enter(&*tensor, len * vector.dtype().size_in_bytes(), Step::All);
        Ok(vector)
    }

    /// A weight (rows, cols) that is not quantised, entered in the ledger.
    fn float_matrix(&self, weight: &dyn SourceTensor, step: Step) -> Result<Tensor> {
        let matrix = weight.float_matrix(float_dtype(self.loader.precision, weight))?.to_device(self.device())?;
        self.loader.enter(weight, matrix.elem_count() * matrix.dtype().size_in_bytes(), step);
        Ok(matrix)
    }
}

/// The dtype of a tensor that is not quantised: the precision's own, and beside int8 layers the 16-bit one
/// that it is stored in.
fn float_dtype(precision: &Precision, tensor: &dyn SourceTensor) -> DType {
    match (precision, tensor.dtype()) {
        (Precision::F32, _) => DType::F32,
        (Precision::BF16, _) | (Precision::Int8(_), Dtype::BF16) => DType::BF16,
        _ => DType::F16,
    }
}

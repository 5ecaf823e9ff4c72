//! Checkpoint names to layers in the chosen precision, and the ledger of the bytes they take.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use int8_ops::{FloatLinear, Int8Linear, Int8LinearGroup, Int8Matrix, LayerNorm, MAX_CODE};
use safetensors::Dtype;

use crate::bytes;
use crate::checkpoint::rows::Float;
use crate::checkpoint::{Checkpoint, RawTensor};
use crate::error::{Error, NOT_FOUND, Result, first_line};
use crate::layers::{Embedding, Linear, Linears};
use crate::ledger::Ledger;
use crate::precision::{Int8Options, Precision};

/// The weights of a checkpoint under one prefix of names.
#[derive(Clone)]
pub(crate) struct Weights<'a> {
    loader: &'a Loader<'a>,
    path: String,
}

/// What all parts of a model are loaded with.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    precision: &'a Precision,
    /// Whether the checkpoint says that it was saved in int8.
    is_stored_int8: bool,
    /// Called with the bytes of every tensor that has been loaded.
    loaded: &'a dyn Fn(usize),
    ledger: RefCell<Ledger>,
    /// The full name of every linear layer.
    linear_names: RefCell<Vec<String>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        precision: &'a Precision,
        is_stored_int8: bool,
        loaded: &'a dyn Fn(usize),
    ) -> Self {
        let (ledger, linear_names) = (RefCell::default(), RefCell::default());
        Self { checkpoint, precision, is_stored_int8, loaded, ledger, linear_names }
    }

    /// The weights under the first of `prefixes` that has the tensor `probe`.
    pub(crate) fn weights(&'a self, prefixes: &[&str], probe: &str) -> Result<Weights<'a>> {
        let path = self.checkpoint.prefix_of(prefixes, probe)?.to_string();
        Ok(Weights { loader: self, path })
    }

    /// The ledger, once the model is loaded; an error when a module to skip was not met.
    pub(crate) fn finish(self) -> Result<Ledger> {
        if let Precision::Int8(options) = self.precision {
            options.check_skip_modules(&self.linear_names.into_inner())?;
        }
        Ok(self.ledger.into_inner())
    }

    fn enter(&self, tensor: &RawTensor, bytes: usize) {
        self.ledger.borrow_mut().enter(tensor.name, tensor.shape.iter().product(), bytes);
        (self.loaded)(tensor.range.len());
    }
}

impl<'a> Weights<'a> {
    /// The weights one level down: those whose names go on with `.name`.
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = format!("{}{name}.", self.path);
        Self { loader: self.loader, path }
    }

    /// The weights of each of `count` blocks, `name.0` and so on; an error when the checkpoint has
    /// more.
    pub(crate) fn blocks(&self, name: &str, count: usize) -> Result<impl Iterator<Item = Self>> {
        let blocks = self.pp(name);
        if let Some(tensor) = self.loader.checkpoint.first_below(&blocks.pp(count).path) {
            return Err(Error::extra_block(tensor.file, tensor.name, count));
        }
        Ok((0..count).map(move |index| blocks.pp(index)))
    }

    /// The module's full name in the checkpoint.
    fn module(&self) -> &str {
        self.path.trim_end_matches('.')
    }

    /// The tensor `name` of this module, which must have the given shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'a>> {
        let full = format!("{}{name}", self.path);
        let Some(tensor) = self.loader.checkpoint.tensor(&full) else {
            return Err(self.loader.checkpoint.missing(full, NOT_FOUND));
        };
        if tensor.shape != shape {
            return Err(Error::wrong_shape(tensor.file, tensor.name, tensor.shape, shape));
        }
        Ok(tensor)
    }

    /// A linear layer: `weight` (out, in) and, if `bias`, `bias` (out).
    pub(crate) fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.loader.linear_names.borrow_mut().push(self.module().to_string());
        let weight = self.tensor("weight", &[outputs, inputs])?;
        let bias = bias.then(|| self.vector("bias", outputs)).transpose()?;
        // What an int8 checkpoint keeps in 16 bits stays so.
        let stays = |options: &Int8Options| {
            options.skips(self.module()) || self.loader.is_stored_int8 && weight.dtype != Dtype::I8
        };
        Ok(match self.loader.precision {
            Precision::Int8(options) if !stays(options) => {
                let matrix = self.int8_matrix(&weight)?;
                self.loader.enter(&weight, matrix.bytes());
                Linear::Int8(Int8Linear::new(matrix, bias, options.threshold)?)
            }
            precision => {
                let weight = self.float_matrix(&weight, float_dtype(precision, &weight))?;
                Linear::Float(FloatLinear::new(weight, bias)?)
            }
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

    /// An embedding: `weight` (rows, width).
    pub(crate) fn embedding(&self, rows: usize, width: usize) -> Result<Embedding> {
        let weight = self.tensor("weight", &[rows, width])?;
        match self.loader.precision {
            Precision::Int8(options) if options.has_int8_head(weight.dtype == Dtype::I8) => {
                let matrix = self.int8_matrix(&weight)?;
                self.loader.enter(&weight, matrix.bytes());
                Ok(Embedding::Int8 { matrix, threshold: options.threshold })
            }
            _ => self.table(rows, width),
        }
    }

    /// A table (rows, width) of vectors that are only looked up, such as positions: in 16 bits beside
    /// int8 layers.
    pub(crate) fn table(&self, rows: usize, width: usize) -> Result<Embedding> {
        let weight = self.tensor("weight", &[rows, width])?;
        Ok(Embedding::Float(self.float_matrix(&weight, float_dtype(self.loader.precision, &weight))?))
    }

    /// A layer norm: `weight` and `bias` (width).
    pub(crate) fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm::new(self.vector("weight", width)?, self.vector("bias", width)?, eps)?)
    }

    /// A vector (len), in 16 bits unless the precision is `F32`.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let raw = self.tensor(name, &[len])?;
        raw.check_float()?;
        let mut values = vec![0f32; len];
        raw.widen(0, &mut values);
        raw.check_finite(0, &values)?;
        raw.bytes.give_back(&raw.range);
        let vector = match float_dtype(self.loader.precision, &raw) {
            DType::F16 => vector_tensor::<f16>(&raw, values),
            DType::BF16 => vector_tensor::<bf16>(&raw, values),
            _ => vector_tensor::<f32>(&raw, values),
        }?;
        self.loader.enter(&raw, len * vector.dtype().size_in_bytes());
        Ok(vector)
    }

    /// A weight (out, in) as int8: quantised row by row from the file, or used in place where the file
    /// holds int8.
    fn int8_matrix(&self, weight: &RawTensor) -> Result<Int8Matrix> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        if weight.dtype == Dtype::I8 {
            let scales = Tensor::from_vec(self.loader.checkpoint.stored_scales(weight)?, rows, &Device::Cpu)?;
            return Int8Matrix::from_shared(weight.shared(), cols, scales)
                .map_err(|error| weight.problem(first_line(&error)));
        }
        let mut codes = bytes::zeros(rows * cols).map_err(|_| no_memory(weight, rows * cols))?;
        let mut scales = vec![0f32; rows];
        weight.quantize_rows(0..rows, &mut codes, &mut scales)?;
        scales.iter_mut().for_each(|absmax| *absmax /= MAX_CODE);
        Int8Matrix::from_shared(Arc::new(codes), cols, Tensor::from_vec(scales, rows, &Device::Cpu)?)
            .map_err(|error| weight.problem(first_line(&error)))
    }

    /// A weight (rows, cols) in a float dtype, entered in the ledger; int8 weights are dequantised.
    fn float_matrix(&self, weight: &RawTensor, dtype: DType) -> Result<Tensor> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        let scales = if weight.dtype == Dtype::I8 {
            Some(self.loader.checkpoint.stored_scales(weight)?)
        } else {
            weight.check_float()?;
            None
        };
        let matrix = match dtype {
            DType::F16 => float_tensor::<f16>(weight, scales.as_deref()),
            DType::BF16 => float_tensor::<bf16>(weight, scales.as_deref()),
            _ => float_tensor::<f32>(weight, scales.as_deref()),
        }?;
        self.loader.enter(weight, rows * cols * dtype.size_in_bytes());
        Ok(matrix)
    }
}

/// A weight (rows, cols) in memory as floats.
fn float_tensor<T: Float>(weight: &RawTensor, scales: Option<&[f32]>) -> Result<Tensor> {
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    let bytes = rows * cols * T::DTYPE.size_in_bytes();
    // Asked for beforehand, because a vector that gets no memory ends the program.
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| no_memory(weight, bytes))?;
    let mut matrix = T::zeros(rows * cols);
    weight.narrow_rows(0..rows, scales, &mut matrix)?;
    Ok(Tensor::from_vec(matrix, (rows, cols), &Device::Cpu)?)
}

/// Finite values (len) in memory as floats of another dtype.
fn vector_tensor<T: Float>(raw: &RawTensor, values: Vec<f32>) -> Result<Tensor> {
    if values.iter().any(|value| value.abs() >= T::LIMIT) {
        return Err(raw.too_large::<T>(0, &values));
    }
    let len = values.len();
    Ok(Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(T::DTYPE)?)
}

/// The error of a weight that the system has no memory for.
fn no_memory(weight: &RawTensor, bytes: usize) -> Error {
    weight.problem(format!("there is no memory for the {bytes} bytes that it takes"))
}

/// The dtype of a weight that is not quantised: the precision's own, and beside int8 layers the 16-bit
/// one that the file has.
pub(crate) fn float_dtype(precision: &Precision, weight: &RawTensor) -> DType {
    match (precision, weight.dtype) {
        (Precision::F32, _) => DType::F32,
        (Precision::BF16, _) | (Precision::Int8(_), Dtype::BF16) => DType::BF16,
        _ => DType::F16,
    }
}

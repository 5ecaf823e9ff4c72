//! Checkpoint names to layers in the chosen precision, and the ledger of the bytes they take.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor, WithDType};
use candle_nn::LayerNorm;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use int8_ops::{HalfLinear, Int8Linear, Int8LinearGroup, Int8Matrix, MAX_CODE};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, RawTensor};
use crate::error::{Error, NO_KNOWN_PREFIX, NOT_FOUND, Result, first_line};
use crate::layers::{Embedding, Linear, Linears};
use crate::ledger::Ledger;
use crate::precision::{Precision, VECTOR_DTYPE, matches};

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
    /// Called with the bytes of every tensor that has been loaded.
    loaded: &'a dyn Fn(usize),
    ledger: RefCell<Ledger>,
    /// The full name of every linear layer.
    linear_names: RefCell<Vec<String>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, precision: &'a Precision, loaded: &'a dyn Fn(usize)) -> Self {
        Self { checkpoint, precision, loaded, ledger: RefCell::default(), linear_names: RefCell::default() }
    }

    /// The weights under the first of `prefixes` that has the tensor `probe`: checkpoints are saved
    /// with and without the name of the model inside the language model.
    pub(crate) fn weights(&'a self, prefixes: &[&str], probe: &str) -> Result<Weights<'a>> {
        let found = prefixes.iter().find(|prefix| self.checkpoint.tensor(&format!("{prefix}{probe}")).is_some());
        match found {
            Some(prefix) => Ok(Weights { loader: self, path: prefix.to_string() }),
            None => Err(self.missing(format!("{}{probe}", prefixes[0]), NO_KNOWN_PREFIX)),
        }
    }

    /// The ledger, once the model is loaded; an error when a module to skip was not met. The head may be
    /// named, as is usual with Transformers, though it is no linear layer of the blocks.
    pub(crate) fn finish(self) -> Result<Ledger> {
        let names = self.linear_names.into_inner();
        if let Precision::Int8(options) = self.precision
            && let Some(name) = options
                .skip_modules
                .iter()
                .find(|skip| *skip != "lm_head" && !names.iter().any(|name| matches(name, skip)))
        {
            let examples = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
            return Err(Error::SkipModule { name: name.clone(), examples });
        }
        Ok(self.ledger.into_inner())
    }

    fn missing(&self, tensor: String, problem: &str) -> Error {
        Error::missing_tensor(self.checkpoint.first_file(), tensor, problem)
    }

    fn enter(&self, tensor: &RawTensor, bytes: usize) {
        self.ledger.borrow_mut().enter(tensor.name, tensor.shape.iter().product(), bytes);
        (self.loaded)(tensor.data.len());
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
            return Err(self.loader.missing(full, NOT_FOUND));
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
        Ok(match self.loader.precision {
            Precision::Int8(options) if options.quantizes(self.module()) => {
                let matrix = self.int8_matrix(&weight)?;
                self.loader.enter(&weight, matrix.bytes());
                Linear::Int8(Int8Linear::new(matrix, bias, options.threshold)?)
            }
            Precision::F32 => Linear::Float(candle_nn::Linear::new(self.float_matrix(&weight, DType::F32)?, bias)),
            precision => {
                let weight = self.float_matrix(&weight, half_dtype(precision, &weight))?;
                Linear::Half(HalfLinear::new(weight, bias)?)
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
        match self.loader.precision {
            Precision::Int8(options) if options.quantizes_head() => {
                let weight = self.tensor("weight", &[rows, width])?;
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
        Ok(match self.loader.precision {
            Precision::F32 => Embedding::Float(self.float_matrix(&weight, DType::F32)?),
            precision => Embedding::Half(self.float_matrix(&weight, half_dtype(precision, &weight))?),
        })
    }

    /// A layer norm: `weight` and `bias` (width).
    pub(crate) fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm::new(self.vector("weight", width)?, self.vector("bias", width)?, eps))
    }

    /// A vector (len), in [`VECTOR_DTYPE`].
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let raw = self.tensor(name, &[len])?;
        raw.check_float()?;
        let mut values = vec![0f32; len];
        raw.widen(0, &mut values);
        raw.check_finite(0, &values)?;
        self.loader.enter(&raw, len * VECTOR_DTYPE.size_in_bytes());
        Ok(Tensor::from_vec(values, len, &Device::Cpu)?)
    }

    /// A weight (out, in) as int8: quantised row by row from the file, or as the file has it.
    fn int8_matrix(&self, weight: &RawTensor) -> Result<Int8Matrix> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        if weight.dtype == Dtype::I8 {
            let codes = Tensor::from_slice(weight.data, (rows, cols), &Device::Cpu)?;
            let scales = Tensor::from_vec(self.stored_scales(rows)?, rows, &Device::Cpu)?;
            return Int8Matrix::new(codes, scales).map_err(|error| weight.problem(first_line(&error)));
        }
        weight.check_float()?;
        Int8Matrix::quantize_rows(rows, cols, |row, values| weight.widen(row * cols, values))
            .map_err(|error| weight.problem(first_line(&error)))
    }

    /// The scales (out) of a weight stored in int8 by bitsandbytes: `SCB / 127`.
    fn stored_scales(&self, rows: usize) -> Result<Vec<f32>> {
        if let Some(format) = self.loader.checkpoint.tensor(&format!("{}weight_format", self.path))
            && format.data.iter().any(|&byte| byte != 0)
        {
            let hint = "save it again with a current bitsandbytes, which stores rows (weight_format 0)";
            let problem = format!("is {:?}, a layout for particular GPUs, wanted 0 (rows)", format.data);
            return Err(format.problem_with_hint(problem, Some(hint.to_string())));
        }
        let absmax = self.tensor("SCB", &[rows])?;
        if absmax.dtype != Dtype::F32 {
            return Err(Error::wrong_dtype(absmax.file, absmax.name, absmax.dtype, "F32"));
        }
        let mut scales = vec![0f32; rows];
        absmax.widen(0, &mut scales);
        absmax.check_finite(0, &scales)?;
        if let Some(row) = scales.iter().position(|scale| *scale < 0.0) {
            return Err(absmax.problem(format!("value [{row}] is {}, wanted a magnitude", scales[row])));
        }
        scales.iter_mut().for_each(|scale| *scale /= MAX_CODE);
        Ok(scales)
    }

    /// A weight (rows, cols) in a float dtype, entered in the ledger; int8 weights are dequantised.
    fn float_matrix(&self, weight: &RawTensor, dtype: DType) -> Result<Tensor> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        let scales = if weight.dtype == Dtype::I8 {
            Some(self.stored_scales(rows)?)
        } else {
            weight.check_float()?;
            None
        };
        let read = |row: usize, values: &mut [f32]| {
            weight.widen(row * cols, values);
            if let Some(scales) = &scales {
                values.iter_mut().for_each(|value| *value *= scales[row]);
            }
            weight.check_finite(row * cols, values)
        };
        let matrix = match dtype {
            DType::F16 => matrix_of(weight, read, |values, row: &mut [f16]| row.convert_from_f32_slice(values)),
            DType::BF16 => matrix_of(weight, read, |values, row: &mut [bf16]| row.convert_from_f32_slice(values)),
            _ => matrix_of(weight, read, |values, row: &mut [f32]| row.copy_from_slice(values)),
        }?;
        self.loader.enter(weight, rows * cols * dtype.size_in_bytes());
        Ok(matrix)
    }
}

/// A matrix in memory, made from several threads: `read(row, values)` gives a row in f32, and
/// `narrow` writes it in the matrix's own dtype.
fn matrix_of<T: WithDType + Default>(
    weight: &RawTensor,
    read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    narrow: impl Fn(&[f32], &mut [T]) + Sync,
) -> Result<Tensor> {
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    let mut matrix = Vec::new();
    if matrix.try_reserve_exact(rows * cols).is_err() {
        let bytes = rows * cols * T::DTYPE.size_in_bytes();
        return Err(weight.problem(format!("there is no memory for the {bytes} bytes that it takes")));
    }
    matrix.resize(rows * cols, T::default());
    matrix.par_chunks_mut(cols).enumerate().try_for_each_init(
        || vec![0f32; cols],
        |values, (row, out)| {
            read(row, values)?;
            narrow(values, out);
            // A finite value may lie beyond the range of a narrower dtype.
            match out.iter().position(|value| !value.to_f64().is_finite()) {
                None => Ok(()),
                Some(at) => {
                    let place = weight.place(row * cols + at);
                    let problem = format!("value {place} is {}, too large for {:?}", values[at], T::DTYPE);
                    let wider = if T::DTYPE == DType::F16 { "bf16" } else { "f32" };
                    Err(weight.problem_with_hint(problem, Some(format!("load the model with --precision {wider}"))))
                }
            }
        },
    )?;
    Ok(Tensor::from_vec(matrix, (rows, cols), &Device::Cpu)?)
}

/// The 16-bit dtype of a weight that is not quantised: the precision's own, and beside int8 layers
/// the one that the file has.
fn half_dtype(precision: &Precision, weight: &RawTensor) -> DType {
    match (precision, weight.dtype) {
        (Precision::BF16, _) | (Precision::Int8(_), Dtype::BF16) => DType::BF16,
        _ => DType::F16,
    }
}

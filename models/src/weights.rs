//! Checkpoint names to layers in the chosen precision, and the ledger of the bytes they take.

use std::cell::RefCell;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{LayerNorm, Module};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use int8_ops::{
    HalfLinear, Int8Linear, Int8LinearGroup, Int8Matrix, MAX_CODE, OUTLIER_THRESHOLD, half_matmul, int8_matmul,
};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, RawTensor};
use crate::error::{Error, Result};

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

/// The bytes of every tensor of a model as it was loaded.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Vec<LedgerEntry>,
}

/// What one tensor takes.
#[derive(Debug, Clone)]
pub struct LedgerEntry {
    /// The tensor's full name in the checkpoint.
    pub name: String,
    /// How many values it has.
    pub values: usize,
    /// The bytes it takes as it was loaded, scales included.
    pub bytes: usize,
}

impl Ledger {
    /// One entry a tensor, in the order of loading.
    pub fn entries(&self) -> &[LedgerEntry] {
        &self.entries
    }

    /// The bytes of all weights as they were loaded.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// The bytes that the same weights take with 16 bits each.
    pub fn bytes_at_16_bits(&self) -> usize {
        self.entries.iter().map(|entry| entry.values * DType::F16.size_in_bytes()).sum()
    }
}

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
            None => Err(self.missing(format!("{}{probe}", prefixes[0]), "not found, with any known prefix")),
        }
    }

    /// The ledger, once the model is loaded; an error when a module to skip was not met.
    pub(crate) fn finish(self) -> Result<Ledger> {
        let names = self.linear_names.into_inner();
        if let Precision::Int8(options) = self.precision
            && let Some(name) = options.skip_modules.iter().find(|skip| !names.iter().any(|name| matches(name, skip)))
        {
            let examples = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
            return Err(Error::SkipModule { name: name.clone(), examples });
        }
        Ok(self.ledger.into_inner())
    }

    fn missing(&self, tensor: String, problem: &str) -> Error {
        let file = self.checkpoint.first_file().to_path_buf();
        let hint = "the checkpoint is incomplete, or of another model than its config.json";
        Error::Tensor { file, tensor, problem: problem.to_string(), hint: Some(hint.to_string()) }
    }

    fn enter(&self, tensor: &RawTensor, bytes: usize) {
        let entry = LedgerEntry { name: tensor.name.to_string(), values: tensor.shape.iter().product(), bytes };
        self.ledger.borrow_mut().entries.push(entry);
        (self.loaded)(tensor.data.len());
    }
}

/// Whether `skip` is the module's name or a run of whole parts of it.
fn matches(module: &str, skip: &str) -> bool {
    format!(".{module}.").contains(&format!(".{skip}."))
}

impl<'a> Weights<'a> {
    /// The weights one level down: those whose names go on with `.name`.
    pub(crate) fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = format!("{}{name}.", self.path);
        Self { loader: self.loader, path }
    }

    /// The module's full name in the checkpoint.
    fn module(&self) -> &str {
        self.path.trim_end_matches('.')
    }

    /// The tensor `name` of this module, which must have the given shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'a>> {
        let full = format!("{}{name}", self.path);
        let Some(tensor) = self.loader.checkpoint.tensor(&full) else {
            return Err(self.loader.missing(full, "not found"));
        };
        if tensor.shape != shape {
            let problem = format!("has shape {:?}, but config.json calls for {shape:?}", tensor.shape);
            return Err(tensor.problem(problem));
        }
        Ok(tensor)
    }

    /// A linear layer: `weight` (out, in) and, if `bias`, `bias` (out).
    pub(crate) fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.loader.linear_names.borrow_mut().push(self.module().to_string());
        let weight = self.tensor("weight", &[outputs, inputs])?;
        let bias = bias.then(|| self.vector("bias", outputs)).transpose()?;
        let skipped = |options: &Int8Options| options.skip_modules.iter().any(|skip| matches(self.module(), skip));
        Ok(match self.loader.precision {
            Precision::Int8(options) if !skipped(options) => {
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
            Precision::Int8(options) if options.head => {
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

    /// A vector (len), in f32 whatever the precision: it takes next to nothing.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let raw = self.tensor(name, &[len])?;
        let mut values = vec![0f32; len];
        widen(&raw, 0, &mut values)?;
        check_finite(&raw, &values, 0, len)?;
        self.loader.enter(&raw, len * DType::F32.size_in_bytes());
        Ok(Tensor::from_vec(values, len, &Device::Cpu)?)
    }

    /// A weight (out, in) as int8: quantised row by row from the file, or as the file has it.
    fn int8_matrix(&self, weight: &RawTensor) -> Result<Int8Matrix> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        if weight.dtype == Dtype::I8 {
            let codes = Tensor::from_slice(weight.data, (rows, cols), &Device::Cpu)?;
            let scales = Tensor::from_vec(self.stored_scales(weight, rows)?, rows, &Device::Cpu)?;
            return Ok(Int8Matrix::new(codes, scales)?);
        }
        check_float(weight)?;
        Int8Matrix::quantize_rows(rows, cols, |row, values| widen_floats(weight, row * cols, values))
            .map_err(|error| weight.problem(first_line(&error)))
    }

    /// The scales (out) of a weight stored in int8 by bitsandbytes: `SCB / 127`.
    fn stored_scales(&self, weight: &RawTensor, rows: usize) -> Result<Vec<f32>> {
        if let Some(format) = self.loader.checkpoint.tensor(&format!("{}weight_format", self.path))
            && format.data.iter().any(|&byte| byte != 0)
        {
            let hint = "save it again with a current bitsandbytes, which stores rows (weight_format 0)";
            let problem = format!("is {:?}, a layout for particular GPUs, wanted 0 (rows)", format.data);
            return Err(format.problem_with_hint(problem, Some(hint.to_string())));
        }
        let absmax = self.tensor("SCB", &[rows])?;
        if absmax.dtype != Dtype::F32 {
            return Err(absmax.problem(format!("is {:?}, wanted F32", absmax.dtype)));
        }
        let mut scales = vec![0f32; rows];
        widen_floats(&absmax, 0, &mut scales);
        check_finite(&absmax, &scales, 0, rows)?;
        if weight.data.contains(&(i8::MIN as u8)) {
            return Err(weight.problem("holds the code -128, wanted codes from -127 to 127".to_string()));
        }
        scales.iter_mut().for_each(|scale| *scale /= MAX_CODE);
        Ok(scales)
    }

    /// A weight (rows, cols) in a float dtype, entered in the ledger; int8 weights are dequantised.
    fn float_matrix(&self, weight: &RawTensor, dtype: DType) -> Result<Tensor> {
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        self.loader.enter(weight, rows * cols * dtype.size_in_bytes());
        let scales = match weight.dtype {
            Dtype::I8 => Some(self.stored_scales(weight, rows)?),
            _ => None,
        };
        check_float_or_int8(weight)?;
        let read = |row: usize, values: &mut [f32]| {
            widen_any(weight, row * cols, values);
            if let Some(scales) = &scales {
                values.iter_mut().for_each(|value| *value *= scales[row]);
            }
            check_finite(weight, values, row, cols)
        };
        match dtype {
            DType::F16 => {
                let narrow = |values: &[f32], out: &mut [f16]| {
                    out.convert_from_f32_slice(values);
                    // A finite f32 or bf16 value may lie beyond f16's range.
                    out.iter().position(|value| !value.is_finite())
                };
                matrix_of(weight, read, narrow, "--precision bf16")
            }
            DType::BF16 => {
                let narrow = |values: &[f32], out: &mut [bf16]| {
                    out.convert_from_f32_slice(values);
                    out.iter().position(|value| !value.is_finite())
                };
                matrix_of(weight, read, narrow, "--precision f32")
            }
            _ => {
                let copy = |values: &[f32], out: &mut [f32]| {
                    out.copy_from_slice(values);
                    None
                };
                matrix_of(weight, read, copy, "")
            }
        }
    }
}

/// A matrix in memory whose rows `read` widens and `narrow` writes, in parallel; `narrow` tells the
/// column of a value that its type cannot hold.
fn matrix_of<T: candle_core::WithDType + Default>(
    weight: &RawTensor,
    read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    narrow: impl Fn(&[f32], &mut [T]) -> Option<usize> + Sync,
    wider: &str,
) -> Result<Tensor> {
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    let mut matrix = vec![T::default(); rows * cols];
    matrix.par_chunks_mut(cols).enumerate().try_for_each_init(
        || vec![0f32; cols],
        |values, (row, out)| {
            read(row, values)?;
            match narrow(values, out) {
                None => Ok(()),
                Some(col) => {
                    let problem = format!("value [{row}, {col}] is {}, too large for {:?}", values[col], T::DTYPE);
                    Err(weight.problem_with_hint(problem, Some(format!("load the model with {wider}"))))
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

/// A linear layer in the precision it was loaded in.
#[derive(Debug)]
pub(crate) enum Linear {
    Float(candle_nn::Linear),
    Half(HalfLinear),
    Int8(Int8Linear),
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Float(layer) => layer.forward(x),
            Self::Half(layer) => layer.forward(x),
            Self::Int8(layer) => layer.forward(x),
        }
    }
}

/// Linear layers that take the same input; their outputs come side by side.
#[derive(Debug)]
pub(crate) enum Linears {
    Int8(Int8LinearGroup),
    Apart(Vec<Linear>),
}

impl Module for Linears {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Int8(layers) => layers.forward(x),
            Self::Apart(layers) => {
                let outputs = layers.iter().map(|layer| layer.forward(x)).collect::<candle_core::Result<Vec<_>>>()?;
                Tensor::cat(&outputs, D::Minus1)
            }
        }
    }
}

/// The token embedding (vocabulary, width), which is the head too where the two are tied.
#[derive(Debug)]
pub(crate) enum Embedding {
    Float(Tensor),
    Half(Tensor),
    Int8 { matrix: Int8Matrix, threshold: Option<f32> },
}

impl Embedding {
    /// The rows (.., width) in `F32` of token ids (..) in `U32`.
    pub(crate) fn lookup(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let ids = tokens.flatten_all()?;
        let rows = match self {
            Self::Float(table) | Self::Half(table) => table.index_select(&ids, 0)?.to_dtype(DType::F32)?,
            Self::Int8 { matrix, .. } => matrix.dequantize_rows(&ids)?,
        };
        let mut dims = tokens.dims().to_vec();
        dims.push(rows.dim(1)?);
        rows.reshape(dims)
    }

    /// The logits (.., vocabulary) of hidden states (.., width): their products with every row.
    pub(crate) fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Float(table) => candle_nn::Linear::new(table.clone(), None).forward(hidden),
            Self::Half(table) => half_matmul(hidden, table, None),
            Self::Int8 { matrix, threshold } => int8_matmul(hidden, matrix, None, *threshold),
        }
    }
}

fn check_float(tensor: &RawTensor) -> Result<()> {
    match tensor.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
        other => Err(tensor.problem(format!("is {other:?}, wanted F32, F16 or BF16"))),
    }
}

fn check_float_or_int8(tensor: &RawTensor) -> Result<()> {
    if tensor.dtype == Dtype::I8 { Ok(()) } else { check_float(tensor) }
}

fn check_finite(tensor: &RawTensor, values: &[f32], row: usize, cols: usize) -> Result<()> {
    let Some(at) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let place = if tensor.shape.len() == 1 { format!("[{at}]") } else { format!("[{row}, {}]", at % cols) };
    Err(tensor.problem(format!("value {place} is {}: only finite values can be used", values[at])))
}

/// Copies values from index `start` on into `out`, as f32; an error when they are not floats.
fn widen(tensor: &RawTensor, start: usize, out: &mut [f32]) -> Result<()> {
    check_float(tensor)?;
    widen_floats(tensor, start, out);
    Ok(())
}

fn widen_any(tensor: &RawTensor, start: usize, out: &mut [f32]) {
    if tensor.dtype == Dtype::I8 {
        let codes = &tensor.data[start..start + out.len()];
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code as i8));
    } else {
        widen_floats(tensor, start, out);
    }
}

/// Copies values from index `start` on into `out`, as f32, from data of any alignment.
fn widen_floats(tensor: &RawTensor, start: usize, out: &mut [f32]) {
    let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
    let bytes = &tensor.data[start * size..(start + out.len()) * size];
    match tensor.dtype {
        Dtype::F32 => {
            let values = bytes.as_chunks::<4>().0;
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from_le_bytes(*value));
        }
        Dtype::BF16 => {
            let values = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_le_bytes(*value).to_f32());
        }
        _ => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(values) if cfg!(target_endian = "little") => values.convert_to_f32_slice(out),
            _ => {
                let values = bytes.as_chunks::<2>().0;
                out.iter_mut().zip(values).for_each(|(out, value)| *out = f16::from_le_bytes(*value).to_f32());
            }
        },
    }
}

/// A Candle error's message without the backtrace that may follow it.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

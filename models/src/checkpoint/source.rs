//! A checkpoint as the source of a model's tensors.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use int8_ops::{Int8Matrix, MAX_CODE};
use safetensors::Dtype;

use super::rows::Float;
use super::{Checkpoint, RawTensor};
use crate::bytes;
use crate::error::{Error, NOT_FOUND, Result, first_line};
use crate::source::{Source, SourceTensor};

impl Source for Checkpoint {
    fn find_prefix<'p>(&self, prefixes: &[&'p str], probe: &str) -> Result<&'p str> {
        self.prefix_of(prefixes, probe)
    }

    fn check_blocks_end(&self, path: &str, count: usize) -> Result<()> {
        match self.first_below(path) {
            Some(tensor) => Err(Error::extra_block(tensor.file, tensor.name, count)),
            None => Ok(()),
        }
    }

    fn find_tensor<'a>(&'a self, name: &str, shape: &[usize]) -> Result<Box<dyn SourceTensor + 'a>> {
        let Some(raw) = self.tensor(name) else { return Err(self.missing(name.to_string(), NOT_FOUND)) };
        if raw.shape != shape {
            return Err(Error::wrong_shape(raw.file, raw.name, raw.shape, shape));
        }
        Ok(Box::new(StoredTensor { raw, checkpoint: self }))
    }

    fn stored_bytes(&self) -> usize {
        self.bytes()
    }

    fn is_as_config_says(&self) -> bool {
        true
    }
}

/// A tensor of a checkpoint.
struct StoredTensor<'a> {
    raw: RawTensor<'a>,
    checkpoint: &'a Checkpoint,
}

impl SourceTensor for StoredTensor<'_> {
    fn name(&self) -> &str {
        self.raw.name
    }

    fn shape(&self) -> &[usize] {
        self.raw.shape
    }

    fn dtype(&self) -> Dtype {
        self.raw.dtype
    }

    fn stored_bytes(&self) -> usize {
        self.raw.range.len()
    }

    fn vector(&self, dtype: DType) -> Result<Tensor> {
        let raw = &self.raw;
        raw.check_float()?;
        let mut values = vec![0f32; raw.shape.iter().product()];
        raw.widen(0, &mut values);
        raw.check_finite(0, &values)?;
        raw.bytes.give_back(&raw.range);
        match dtype {
            DType::F16 => vector_tensor::<f16>(raw, values),
            DType::BF16 => vector_tensor::<bf16>(raw, values),
            _ => vector_tensor::<f32>(raw, values),
        }
    }

    /// Quantised row by row from the file, or used in place where the file holds int8.
    fn int8_matrix(&self) -> Result<Int8Matrix> {
        let weight = &self.raw;
        let (rows, cols) = (weight.shape[0], weight.shape[1]);
        if weight.dtype == Dtype::I8 {
            let scales = Tensor::from_vec(self.checkpoint.stored_scales(weight)?, rows, &Device::Cpu)?;
            return Int8Matrix::from_shared(weight.shared(), cols, scales)
                .map_err(|error| weight.problem(first_line(&error)));
        }
        let no_memory = |_| Error::no_memory(weight.file, weight.name, rows * cols);
        let mut codes = bytes::zeros(rows * cols).map_err(no_memory)?;
        let mut scales = vec![0f32; rows];
        weight.quantize_rows(0..rows, &mut codes, &mut scales)?;
        scales.iter_mut().for_each(|absmax| *absmax /= MAX_CODE);
        Int8Matrix::from_shared(Arc::new(codes), cols, Tensor::from_vec(scales, rows, &Device::Cpu)?)
            .map_err(|error| weight.problem(first_line(&error)))
    }

    /// Int8 weights are dequantised.
    fn float_matrix(&self, dtype: DType) -> Result<Tensor> {
        let weight = &self.raw;
        let scales = if weight.dtype == Dtype::I8 {
            Some(self.checkpoint.stored_scales(weight)?)
        } else {
            weight.check_float()?;
            None
        };
        match dtype {
            DType::F16 => float_tensor::<f16>(weight, scales.as_deref()),
            DType::BF16 => float_tensor::<bf16>(weight, scales.as_deref()),
            _ => float_tensor::<f32>(weight, scales.as_deref()),
        }
    }
}

/// A weight (rows, cols) in memory as floats.
fn float_tensor<T: Float>(weight: &RawTensor, scales: Option<&[f32]>) -> Result<Tensor> {
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    let mut matrix = T::try_zeros(rows * cols).map_err(|bytes| Error::no_memory(weight.file, weight.name, bytes))?;
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

//! A checkpoint as the source of a model's tensors.

use std::sync::Arc;

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use int8_ops::{Int8Matrix, MAX_CODE, device};
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

    fn has_bf16(&self) -> bool {
        self.has_dtype(Dtype::BF16)
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

    /// On the CPU quantised row by row from the file, or used in place where the file holds int8; on another
    /// device quantised there, from a copy of what the file holds.
    fn int8_matrix(&self, device: &Device) -> Result<Int8Matrix> {
        let weight = &self.raw;
        if !device.is_cpu() {
            return self.int8_matrix_on(device);
        }
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

    /// Int8 weights are dequantised, on the CPU.
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

impl StoredTensor<'_> {
    /// The weight in int8 on a device that is not the CPU.
    fn int8_matrix_on(&self, device: &Device) -> Result<Int8Matrix> {
        let weight = &self.raw;
        let told = |error: candle_core::Error| match device::is_out_of_memory(&error) {
            true => Error::Candle(error),
            false => weight.problem(first_line(&error)),
        };
        let matrix = match weight.dtype {
            Dtype::I8 => {
                let scales = self.checkpoint.stored_scales(weight)?;
                let scales = Tensor::from_vec(scales, weight.shape[0], device).map_err(told)?;
                upload::<u8>(weight, device).and_then(|codes| Int8Matrix::new(codes, scales)).map_err(told)?
            }
            _ => {
                weight.check_float()?;
                let floats = match weight.dtype {
                    Dtype::F16 => upload::<f16>(weight, device),
                    Dtype::BF16 => upload::<bf16>(weight, device),
                    _ => upload::<f32>(weight, device),
                };
                floats.and_then(|floats| Int8Matrix::quantize(&floats)).map_err(told)?
            }
        };
        weight.bytes.give_back(&weight.range);
        Ok(matrix)
    }
}

/// The values (rows, cols) as they stand in the file, of which nothing else is copied on the way if they are
/// aligned there.
fn upload<T: WithDType + Pod>(weight: &RawTensor, device: &Device) -> candle_core::Result<Tensor> {
    weight.bytes.read_ahead(&weight.range);
    match bytemuck::try_cast_slice::<u8, T>(weight.data()) {
        Ok(values) => Tensor::from_slice(values, weight.shape, device),
        Err(_) => {
            let mut values = vec![T::zeroed(); weight.shape.iter().product()];
            bytemuck::cast_slice_mut::<T, u8>(&mut values).copy_from_slice(weight.data());
            Tensor::from_slice(&values, weight.shape, device)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::folder::ModelFolder;

    /// What a device is given is tried on the CPU, in the same code.
    #[test]
    fn weights_that_a_device_quantises_are_those_of_the_file() -> Result<()> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let names = ["tiny-bloom", "random/bloom-residual", "random/bloom-bin", "bnb/bloom/bnb_int8"];
        for name in names {
            let checkpoint = Checkpoint::open(&ModelFolder::open(fixtures.join(name))?)?;
            let matrices = checkpoint.tensors.keys().filter_map(|name| checkpoint.tensor(name));
            let matrices: Vec<_> = matrices.filter(|raw| raw.shape.len() == 2).collect();
            assert!(matrices.len() > 4, "{name}");
            for raw in matrices {
                let label = format!("{name}: {} {:?}", raw.name, raw.dtype);
                let tensor = StoredTensor { raw, checkpoint: &checkpoint };
                let (found, wanted) = (tensor.int8_matrix_on(&Device::Cpu)?, tensor.int8_matrix(&Device::Cpu)?);
                assert_eq!(found.codes()?.to_vec2::<u8>()?, wanted.codes()?.to_vec2::<u8>()?, "{label}");
                assert_eq!(found.scales().to_vec1::<f32>()?, wanted.scales().to_vec1::<f32>()?, "{label}");
            }
        }
        Ok(())
    }
}

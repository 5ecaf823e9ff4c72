//! The values of a tensor in a file, as f32.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use super::RawTensor;
use crate::error::{Error, Result};

/// The dtypes of the values that a model may hold, besides int8 codes.
pub(super) const FLOATS: &str = "F32, F16 or BF16";

pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

impl RawTensor<'_> {
    /// An error unless the values are floats that a model may hold.
    pub(crate) fn check_float(&self) -> Result<()> {
        match is_float(self.dtype) {
            true => Ok(()),
            false => Err(Error::wrong_dtype(self.file, self.name, self.dtype, FLOATS)),
        }
    }

    /// An error that names the place of the first of `values`, which begin at index `start` of the
    /// tensor, that is NaN or infinite.
    pub(crate) fn check_finite(&self, start: usize, values: &[f32]) -> Result<()> {
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (place, value) = (self.place(start + at), values[at]);
                Err(self.problem(format!("value {place} is {value}: only finite values can be used")))
            }
        }
    }

    /// An index as row and column: `[3, 17]`; a vector's as it is: `[3]`.
    pub(crate) fn place(&self, index: usize) -> String {
        match self.shape {
            [_, cols] => format!("[{}, {}]", index / cols, index % cols),
            _ => format!("[{index}]"),
        }
    }

    /// Copies values from index `start` on into `out`; int8 codes become whole numbers. The dtype has
    /// been checked, and the data may have any alignment.
    pub(crate) fn widen(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.data()[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::I8 => out.iter_mut().zip(bytes).for_each(|(out, &code)| *out = f32::from(code as i8)),
            Dtype::F32 => {
                let values = bytes.as_chunks::<4>().0;
                out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from_le_bytes(*value));
            }
            Dtype::BF16 => {
                let values = bytes.as_chunks::<2>().0;
                out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_le_bytes(*value).to_f32());
            }
            _ => {
                // The processor converts f16, from memory that is aligned.
                let mut aligned = [f16::ZERO; 512];
                for (out, bytes) in out.chunks_mut(aligned.len()).zip(bytes.chunks(size_of_val(&aligned))) {
                    let aligned = &mut aligned[..out.len()];
                    bytemuck::cast_slice_mut::<f16, u8>(aligned).copy_from_slice(bytes);
                    aligned.iter_mut().for_each(|value| *value = f16::from_bits(u16::from_le(value.to_bits())));
                    aligned.convert_to_f32_slice(out);
                }
            }
        }
    }
}

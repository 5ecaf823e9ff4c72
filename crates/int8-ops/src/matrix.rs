//! The one quantised type: int8 codes and one scale per row.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use crate::MAX_CODE;
use crate::cpu::{self, Kernels};

/// A matrix of int8 codes with one f32 scale per row; `code * scale` is the value.
///
/// A weight (rows = outputs) and a batch of activations (rows = tokens) are both this.
#[derive(Debug, Clone)]
pub struct Int8Matrix {
    /// (rows, cols), `U8` holding the bits of `i8`, contiguous.
    codes: Tensor,
    /// (rows), `F32`.
    scales: Tensor,
}

impl Int8Matrix {
    /// Takes codes (rows, cols) as `U8` (the bits of `i8`) and scales (rows) as `F32`.
    ///
    /// Errors when a dtype or a shape is another, when a code is -128, or when a row is too long for
    /// its sums to fit 32-bit integers.
    pub fn new(codes: Tensor, scales: Tensor) -> Result<Self> {
        let (rows, cols) = codes.dims2()?;
        if rows == 0 || cols == 0 {
            bail!("int8 matrix: ({rows}, {cols}) holds nothing, wanted at least one row and one column");
        }
        if codes.dtype() != DType::U8 {
            bail!("int8 matrix: codes must be U8 (the bits of i8), found {:?}", codes.dtype());
        }
        if scales.dtype() != DType::F32 || scales.dims() != [rows] {
            bail!("int8 matrix: scales must be F32 ({rows}), found {:?} {:?}", scales.dtype(), scales.shape());
        }
        if cols > cpu::MAX_COLS {
            bail!("int8 matrix: {cols} columns, but a row's integer sum is only exact up to {}", cpu::MAX_COLS);
        }
        let matrix = Self { codes: codes.contiguous()?, scales: scales.contiguous()? };
        if matrix.codes.device().is_cpu() && matrix.with_slices(|codes, _| Ok(codes.contains(&i8::MIN)))? {
            bail!("int8 matrix: holds the code -128, wanted codes from -127 to 127");
        }
        Ok(matrix)
    }

    /// Quantises each row of a float matrix (rows, cols) by its largest magnitude
    /// (paper section 2.1, row-wise): `code = round_half_even(w * (127 / absmax))`.
    ///
    /// Errors when a value is NaN or infinite, naming its row and column.
    pub fn quantize(matrix: &Tensor) -> Result<Self> {
        let (rows, cols) = matrix.dims2()?;
        let matrix = matrix.contiguous()?;
        let (storage, layout) = matrix.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("int8 matrix: quantising on {:?} is not supported", matrix.device())
        };
        let start = layout.start_offset();
        let read = cpu::FloatSlice::of(storage)?;
        Self::quantize_rows(rows, cols, |row, values| read.widen(start + row * cols, values))
    }

    /// Quantises a matrix whose rows `fill(row, values)` writes one at a time, from several threads:
    /// no float copy of the whole is ever made.
    ///
    /// Errors when a value is NaN or infinite, naming its row and column.
    pub fn quantize_rows(rows: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Result<Self> {
        let kernels = Kernels::active();
        let mut codes = Vec::new();
        if codes.try_reserve_exact(rows * cols).is_err() {
            bail!("there is no memory for its {rows} x {cols} codes");
        }
        codes.resize(rows * cols, 0i8);
        let mut scales = vec![0f32; rows];
        codes.par_chunks_mut(cols.max(1)).zip(scales.par_iter_mut()).enumerate().try_for_each_init(
            || vec![0f32; cols],
            |values, (row, (codes, scale))| {
                fill(row, values);
                if let Some(col) = values.iter().position(|value| !value.is_finite()) {
                    return not_finite(row, col, values[col]);
                }
                let absmax = (kernels.absmax)(values, None);
                *scale = cpu::quantize_row(kernels, values, absmax, codes);
                Ok(())
            },
        )?;
        Self::from_vecs(codes, scales, cols)
    }

    /// From codes (rows, cols) and scales (rows).
    pub(crate) fn from_vecs(codes: Vec<i8>, scales: Vec<f32>, cols: usize) -> Result<Self> {
        // Collected in place: the bytes stay where they are.
        let codes: Vec<u8> = codes.into_iter().map(|code| code as u8).collect();
        let rows = scales.len();
        Self::new(Tensor::from_vec(codes, (rows, cols), &Device::Cpu)?, Tensor::from_vec(scales, rows, &Device::Cpu)?)
    }

    /// (rows, cols).
    pub fn dims(&self) -> (usize, usize) {
        let dims = self.codes.dims();
        (dims[0], dims[1])
    }

    /// (rows, cols), `U8` holding the bits of `i8`.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// (rows), `F32`: `absmax / 127`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// Bytes that the codes and the scales take.
    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.dims();
        rows * cols + rows * DType::F32.size_in_bytes()
    }

    /// The float matrix (rows, cols), `F32`: `code * scale`.
    pub fn dequantize(&self) -> Result<Tensor> {
        signed(&self.codes)?.broadcast_mul(&self.scales.unsqueeze(1)?)
    }

    /// The rows at `indices` (n), `U32`, dequantised: (n, cols), `F32`.
    pub fn dequantize_rows(&self, indices: &Tensor) -> Result<Tensor> {
        let codes = self.codes.index_select(indices, 0)?;
        let scales = self.scales.index_select(indices, 0)?;
        Self { codes, scales }.dequantize()
    }

    /// Calls `f(codes, scales)` with the matrix's slices on the CPU: (rows * cols) and (rows).
    pub(crate) fn with_slices<R>(&self, f: impl FnOnce(&[i8], &[f32]) -> Result<R>) -> Result<R> {
        let (codes, codes_layout) = self.codes.storage_and_layout();
        let (scales, scales_layout) = self.scales.storage_and_layout();
        match (&*codes, &*scales) {
            (Storage::Cpu(CpuStorage::U8(codes)), Storage::Cpu(CpuStorage::F32(scales))) => {
                let (rows, cols) = self.dims();
                let codes = &codes[codes_layout.start_offset()..][..rows * cols];
                let scales = &scales[scales_layout.start_offset()..][..rows];
                f(bytemuck::cast_slice(codes), scales)
            }
            _ => bail!("int8 matrix: activations are on the CPU, but the weight is on {:?}", self.codes.device()),
        }
    }
}

/// The error of quantising what is no finite number.
pub(crate) fn not_finite<T>(row: usize, col: usize, value: f32) -> Result<T> {
    bail!("value [{row}, {col}] is {value}: only finite values can be quantised")
}

/// Codes as floats: a `U8` tensor's bytes read as `i8`.
pub(crate) fn signed(codes: &Tensor) -> Result<Tensor> {
    let codes = codes.to_dtype(DType::F32)?;
    // Bytes above 127 are the negative codes: i8 = u8 - 256.
    let negative = codes.gt(MAX_CODE as f64)?.to_dtype(DType::F32)?;
    codes - (negative * 256.0)?
}

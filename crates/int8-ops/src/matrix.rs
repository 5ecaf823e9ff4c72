//! The one quantised type: int8 codes and one scale per row.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use crate::MAX_CODE;
use crate::cpu::{self, Kernels};
#[cfg(feature = "cuda")]
use crate::cuda;

/// A matrix of int8 codes with one f32 scale per row; `code * scale` is the value.
///
/// A weight (rows = outputs) and a batch of activations (rows = tokens) are both this.
#[derive(Debug, Clone)]
pub struct Int8Matrix {
    codes: Codes,
    /// (rows), `F32`.
    scales: Tensor,
    rows: usize,
    cols: usize,
}

/// Bytes that something else owns, such as a file mapped into memory.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Where the codes (rows, cols) are: the bits of `i8`, row-major.
#[derive(Clone)]
enum Codes {
    /// `U8`, contiguous.
    Tensor(Tensor),
    /// Used in place; they take no memory of their own.
    Shared(SharedBytes),
}

impl fmt::Debug for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor(codes) => codes.fmt(f),
            Self::Shared(bytes) => write!(f, "{} shared bytes", (**bytes).as_ref().len()),
        }
    }
}

impl Int8Matrix {
    /// Takes codes (rows, cols) as `U8` (the bits of `i8`) and scales (rows) as `F32`. Quantising gives
    /// codes from -127 to 127; every kernel is as exact for a stored -128.
    ///
    /// Errors when a dtype or a shape is another, or when a row is too long for its sums to fit 32-bit
    /// integers.
    pub fn new(codes: Tensor, scales: Tensor) -> Result<Self> {
        let (rows, cols) = codes.dims2()?;
        if codes.dtype() != DType::U8 {
            bail!("int8 matrix: codes must be U8 (the bits of i8), found {:?}", codes.dtype());
        }
        let codes = codes.contiguous()?;
        // A product may load weights before earlier work of the device has ended (programmatic dependent launch).
        #[cfg(feature = "cuda")]
        if codes.device().is_cuda() {
            codes.device().synchronize()?;
        }
        Self::checked(Codes::Tensor(codes), scales, cols, rows)
    }

    /// The same for codes on the CPU that something else owns: they are used where they are, and not
    /// read here. `codes` holds as many rows of `cols` codes as there are scales.
    pub fn from_shared(codes: SharedBytes, cols: usize, scales: Tensor) -> Result<Self> {
        let (len, rows) = ((*codes).as_ref().len(), scales.elem_count());
        if rows.checked_mul(cols) != Some(len) {
            bail!("int8 matrix: {rows} rows of {cols} codes are not {len} bytes");
        }
        Self::checked(Codes::Shared(codes), scales, cols, rows)
    }

    fn checked(codes: Codes, scales: Tensor, cols: usize, rows: usize) -> Result<Self> {
        if rows == 0 || cols == 0 {
            bail!("int8 matrix: ({rows}, {cols}) holds nothing, wanted at least one row and one column");
        }
        if scales.dtype() != DType::F32 || scales.dims() != [rows] {
            bail!("int8 matrix: scales must be F32 ({rows}), found {:?} {:?}", scales.dtype(), scales.shape());
        }
        if cols > cpu::MAX_COLS {
            bail!("int8 matrix: {cols} columns, but a row's integer sum is only exact up to {}", cpu::MAX_COLS);
        }
        Ok(Self { codes, scales: scales.contiguous()?, rows, cols })
    }

    /// Quantises each row of a float matrix (rows, cols) by its largest magnitude
    /// (paper section 2.1, row-wise): `code = round_half_even(w * (127 / absmax))`.
    ///
    /// Errors when a value is NaN or infinite, naming its row and column.
    pub fn quantize(matrix: &Tensor) -> Result<Self> {
        let (rows, cols) = matrix.dims2()?;
        let matrix = matrix.contiguous()?;
        #[cfg(feature = "cuda")]
        if matrix.device().is_cuda() {
            return match cuda::quantize_weight(&matrix)? {
                Ok((codes, scales)) => Self::new(codes, scales),
                Err(row) => {
                    let values = matrix.narrow(0, row, 1)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                    let col = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
                    not_finite(row, col, values[col])
                }
            };
        }
        let (storage, layout) = matrix.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("int8 matrix: quantising on {:?} is not supported", matrix.device())
        };
        let start = layout.start_offset();
        let read = cpu::FloatSlice::of(storage)?;
        let mut codes = vec![0i8; rows * cols];
        let mut scales = vec![0f32; rows];
        codes.par_chunks_mut(cols.max(1)).zip(scales.par_iter_mut()).enumerate().try_for_each_init(
            || vec![0f32; cols],
            |values, (row, (codes, scale))| {
                read.widen(start + row * cols, values);
                let absmax = quantize_row(values, codes);
                if !absmax.is_finite() {
                    let col = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
                    return not_finite(row, col, values[col]);
                }
                *scale = absmax / MAX_CODE;
                Ok(())
            },
        )?;
        Self::from_vecs(codes, scales, cols)
    }

    /// From codes (rows, cols) and scales (rows).
    pub(crate) fn from_vecs(codes: Vec<i8>, scales: Vec<f32>, cols: usize) -> Result<Self> {
        let rows = scales.len();
        // Collected in place: the bytes stay where they are.
        let codes: Vec<u8> = codes.into_iter().map(|code| code as u8).collect();
        Self::new(Tensor::from_vec(codes, (rows, cols), &Device::Cpu)?, Tensor::from_vec(scales, rows, &Device::Cpu)?)
    }

    /// (rows, cols).
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// (rows, cols), `U8` holding the bits of `i8`; shared codes are copied.
    pub fn codes(&self) -> Result<Tensor> {
        match &self.codes {
            Codes::Tensor(codes) => Ok(codes.clone()),
            Codes::Shared(bytes) => Tensor::from_slice((**bytes).as_ref(), (self.rows, self.cols), &Device::Cpu),
        }
    }

    /// (rows), `F32`: `absmax / 127`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// Bytes that the codes and the scales take.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols + self.rows * DType::F32.size_in_bytes()
    }

    /// Reads every code once, and does nothing else: the least time that a product for one token can take.
    /// Gives the number of bytes.
    pub fn read(&self) -> Result<usize> {
        self.with_slices(|codes, _| Ok(cpu::limits::read(bytemuck::cast_slice(codes))))
    }

    /// The float matrix (rows, cols), `F32`: `code * scale`.
    pub fn dequantize(&self) -> Result<Tensor> {
        signed(&self.codes()?)?.broadcast_mul(&self.scales.unsqueeze(1)?)
    }

    /// The same on another device; shared codes are copied.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Self::new(self.codes()?.to_device(device)?, self.scales.to_device(device)?)
    }

    /// The device that the matrix is on.
    pub fn device(&self) -> &Device {
        self.scales.device()
    }

    /// Where the codes lie on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(crate) fn codes_address(&self, device: &candle_core::CudaDevice) -> Result<u64> {
        match &self.codes {
            Codes::Tensor(codes) => cuda::address_of(device, codes),
            Codes::Shared(_) => bail!("int8 matrix: activations are on a CUDA device, but the weight is on the CPU"),
        }
    }

    /// The rows at `indices` (n), `U32` on the CPU, dequantised: (n, cols), in `dtype`, on the device of the
    /// matrix.
    ///
    /// Errors when there is no such row.
    pub fn dequantize_rows(&self, indices: &Tensor, dtype: DType) -> Result<Tensor> {
        let indices = indices.to_vec1::<u32>()?;
        if let Some(index) = indices.iter().find(|&&index| index as usize >= self.rows) {
            bail!("int8 matrix: no row {index} among {}", self.rows);
        }
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), Codes::Tensor(codes)) = (self.device(), &self.codes) {
            return cuda::dequantize_rows(device, codes, &self.scales, &indices, dtype);
        }
        let mut values = Vec::with_capacity(indices.len() * self.cols);
        self.with_slices(|codes, scales| {
            for &index in &indices {
                let row = index as usize;
                let codes = &codes[row * self.cols..][..self.cols];
                values.extend(codes.iter().map(|&code| f32::from(code) * scales[row]));
            }
            Ok(())
        })?;
        Tensor::from_vec(values, (indices.len(), self.cols), &Device::Cpu)?.to_dtype(dtype)
    }

    /// Calls `f(codes, scales)` with the matrix's slices on the CPU: (rows * cols) and (rows).
    pub(crate) fn with_slices<R>(&self, f: impl FnOnce(&[i8], &[f32]) -> Result<R>) -> Result<R> {
        let (scales, layout) = self.scales.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(scales)) = &*scales else {
            bail!("int8 matrix: activations are on the CPU, but the weight is on {:?}", self.scales.device())
        };
        let scales = &scales[layout.start_offset()..][..self.rows];
        match &self.codes {
            Codes::Shared(bytes) => f(bytemuck::cast_slice((**bytes).as_ref()), scales),
            Codes::Tensor(codes) => {
                let (storage, layout) = codes.storage_and_layout();
                let Storage::Cpu(CpuStorage::U8(codes)) = &*storage else {
                    bail!("int8 matrix: scales are on the CPU, but the codes are on {:?}", codes.device())
                };
                f(bytemuck::cast_slice(&codes[layout.start_offset()..][..self.rows * self.cols]), scales)
            }
        }
    }
}

/// Quantises one row by its largest magnitude, which it gives; the row's scale is that over 127. Where
/// the row holds a NaN or an infinity, so does the result, and the codes mean nothing.
///
/// `values` and `codes` are of one length.
pub fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let kernels = Kernels::active();
    // The magnitude bits of NaN and infinity are the largest there are.
    let absmax = (kernels.absmax)(values, None);
    if absmax.is_finite() {
        cpu::quantize_row(kernels, values, absmax, codes);
    }
    absmax
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

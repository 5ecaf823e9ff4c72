//! The rows of a matrix in a file, turned into what a model holds: by several threads, a block of rows
//! at a time, whose pages are given back when it is done.

use std::ops::Range;

use candle_core::{DType, WithDType};
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use int8_ops::quantize_row;
use rayon::prelude::*;

use super::RawTensor;
use crate::error::Result;

/// Bytes of a file that a task reads before it gives their pages back: so many that asking the system
/// costs nothing beside reading them, so few that all threads' blocks together are small.
const BLOCK_BYTES: usize = 1 << 18;

/// A float that weights are held in.
pub(crate) trait Float: WithDType {
    /// Magnitudes from here on round to infinity.
    const LIMIT: f32;

    /// `len` zeros, which take memory only as they are written.
    fn zeros(len: usize) -> Vec<Self>;

    /// Rounds `values` into `out`, which is as long.
    fn narrow(values: &[f32], out: &mut [Self]);

    /// `len` zeros; where the system has no memory for them, which would end the program, their bytes.
    fn try_zeros(len: usize) -> Result<Vec<Self>, usize> {
        let bytes = len * Self::DTYPE.size_in_bytes();
        match Vec::<u8>::new().try_reserve_exact(bytes) {
            Ok(()) => Ok(Self::zeros(len)),
            Err(_) => Err(bytes),
        }
    }
}

impl Float for f32 {
    const LIMIT: f32 = f32::INFINITY;

    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    fn narrow(values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }
}

impl Float for f16 {
    const LIMIT: f32 = 65520.0;

    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    fn narrow(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
}

impl Float for bf16 {
    // Halfway between the largest value, 0x7f7f, and the power of two above it.
    const LIMIT: f32 = f32::from_bits(0x7f7f_8000);

    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    fn narrow(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
}

impl RawTensor<'_> {
    /// Quantises `rows` of a float matrix (.., cols): the codes (rows, cols), the bits of `i8`, and the
    /// largest magnitude of each row.
    pub(crate) fn quantize_rows(&self, rows: Range<usize>, codes: &mut [u8], absmax: &mut [f32]) -> Result<()> {
        self.check_float()?;
        let (cols, block) = (self.shape[1], self.rows_per_block());
        self.bytes.read_ahead(&self.range_of(&rows));
        codes.par_chunks_mut(block * cols).zip(absmax.par_chunks_mut(block)).enumerate().try_for_each(
            |(index, (codes, absmax))| {
                let first = rows.start + index * block;
                let block_rows = first..first + absmax.len();
                let mut out = codes.chunks_mut(cols).zip(absmax.iter_mut());
                self.read_rows(block_rows, |row, values| {
                    let Some((codes, absmax)) = out.next() else { return Ok(()) };
                    *absmax = quantize_row(values, bytemuck::cast_slice_mut(codes));
                    if absmax.is_finite() { Ok(()) } else { self.check_finite(row * cols, values) }
                })
            },
        )
    }

    /// Rounds `rows` of a matrix (.., cols) to floats (rows, cols); codes are first multiplied by the
    /// `scales` of all rows.
    pub(crate) fn narrow_rows<T: Float>(
        &self,
        rows: Range<usize>,
        scales: Option<&[f32]>,
        out: &mut [T],
    ) -> Result<()> {
        let (cols, block) = (self.shape[1], self.rows_per_block());
        self.bytes.read_ahead(&self.range_of(&rows));
        out.par_chunks_mut(block * cols).enumerate().try_for_each(|(index, out)| {
            let first = rows.start + index * block;
            let block_rows = first..first + out.len() / cols;
            let mut out = out.chunks_mut(cols);
            self.read_rows(block_rows, |row, values| {
                if let Some(scales) = scales {
                    values.iter_mut().for_each(|value| *value *= scales[row]);
                }
                // Without an early exit the loop is vectorised; a NaN is not below the limit either.
                if !values.iter().fold(true, |fits, value| fits & (value.abs() < T::LIMIT)) {
                    self.check_finite(row * cols, values)?;
                    return Err(self.too_large::<T>(row * cols, values));
                }
                if let Some(out) = out.next() {
                    T::narrow(values, out);
                }
                Ok(())
            })
        })
    }

    /// Calls `each(row, values)` for `rows` of a matrix in turn, and gives their pages back.
    fn read_rows(&self, rows: Range<usize>, mut each: impl FnMut(usize, &mut [f32]) -> Result<()>) -> Result<()> {
        let cols = self.shape[1];
        let mut values = vec![0f32; cols];
        for row in rows.clone() {
            self.widen(row * cols, &mut values);
            each(row, &mut values)?;
        }
        self.give_back(&rows);
        Ok(())
    }

    /// Gives the pages of rows of a matrix back.
    pub(crate) fn give_back(&self, rows: &Range<usize>) {
        self.bytes.give_back(&self.range_of(rows));
    }

    /// How many rows of a matrix make a block.
    fn rows_per_block(&self) -> usize {
        let row_bytes = self.range_of(&(0..1)).len();
        (BLOCK_BYTES / row_bytes.max(1)).max(1)
    }

    /// Where in the file rows of a matrix are.
    pub(crate) fn range_of(&self, rows: &Range<usize>) -> Range<usize> {
        let row_bytes = self.shape[1] * self.dtype.bitsize() / 8;
        self.range.start + rows.start * row_bytes..self.range.start + rows.end * row_bytes
    }

    /// The error of finite values of which one lies beyond the range of `T`; they begin at index `start`.
    pub(crate) fn too_large<T: Float>(&self, start: usize, values: &[f32]) -> crate::error::Error {
        let at = values.iter().position(|value| value.abs() >= T::LIMIT).unwrap_or_default();
        let problem = format!("value {} is {}, too large for {:?}", self.place(start + at), values[at], T::DTYPE);
        let wider = if T::DTYPE == DType::F16 { "bf16" } else { "f32" };
        self.problem_with_hint(problem, Some(format!("load the model with --precision {wider}")))
    }
}

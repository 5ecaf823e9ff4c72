//! Floats to int8 codes and back: absmax and zero-point, per tensor or per row (LLM.int8() section 2.1).

use candle_core::{Device, Result, Tensor};

use crate::MAX_CODE;
use crate::cpu::{self, Activations, Kernels, Values};
use crate::matrix::{Int8Matrix, not_finite, signed};
use crate::outliers::check_threshold;

/// How many values share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// One scale for the whole matrix.
    Tensor,
    /// One scale for each row.
    Row,
}

/// Absmax quantisation of a float matrix (rows, cols): `code = round_half_even(x * (127 / absmax))`.
///
/// Per tensor, every row has the same scale. Errors when a value is NaN or infinite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use int8_ops::{Granularity, quantize_absmax};
/// let x = Tensor::new(&[[1.2f32, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]], &Device::Cpu)?;
/// let quantized = quantize_absmax(&x, Granularity::Row)?;
/// let codes: Vec<i8> = quantized.codes()?.flatten_all()?.to_vec1::<u8>()?.iter().map(|&c| c as i8).collect();
/// assert_eq!(codes, [28, -12, -101, 28, -73, 19, 56, 127]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn quantize_absmax(x: &Tensor, granularity: Granularity) -> Result<Int8Matrix> {
    let (rows, cols) = x.dims2()?;
    match granularity {
        Granularity::Row => Int8Matrix::quantize(x),
        Granularity::Tensor => {
            let kernels = Kernels::active();
            let values = Values::read(x)?.values;
            check_finite(&values, cols)?;
            let absmax = (kernels.absmax)(&values, None);
            let mut codes = vec![0i8; values.len()];
            let scale = cpu::quantize_row(kernels, &values, absmax, &mut codes);
            Int8Matrix::from_vecs(codes, vec![scale; rows], cols)
        }
    }
}

/// Steps 2 and 3 of the method for activations `x` (sequences, tokens, in) or (tokens, in):
/// one row of codes and one scale for every token, the sequence's outlier columns zero.
///
/// The absmax of a token is taken over its values below the threshold; `None` leaves nothing out.
pub fn quantize_activations(x: &Tensor, threshold: Option<f32>) -> Result<Int8Matrix> {
    check_threshold(threshold)?;
    let values = Values::read(x)?;
    let Activations { codes, scales, .. } = Activations::quantize(Kernels::active(), &values, threshold);
    Int8Matrix::from_vecs(codes.to_vec(), scales, values.cols)
}

/// Codes that use the whole int8 range of an asymmetric distribution: `(code - zero_point) * scale`
/// is the value.
#[derive(Debug, Clone)]
pub struct ZeroPointMatrix {
    /// (rows, cols), `U8` holding the bits of `i8`.
    pub codes: Tensor,
    /// (rows), `F32`: `(max - min) / 254`.
    pub scales: Tensor,
    /// (rows), `F32`: the code of zero, a whole number from -127 to 127.
    pub zero_points: Tensor,
}

/// Zero-point quantisation of a float matrix (rows, cols), LLM.int8() equations 1 to 3: the range
/// from the smallest to the largest value, widened to hold zero, is mapped onto -127 to 127.
///
/// Per tensor, every row has the same scale and zero point. Errors when a value is NaN or infinite.
pub fn quantize_zero_point(x: &Tensor, granularity: Granularity) -> Result<ZeroPointMatrix> {
    let (rows, cols) = x.dims2()?;
    let values = Values::read(x)?.values;
    check_finite(&values, cols)?;
    let group = match granularity {
        Granularity::Tensor => rows * cols,
        Granularity::Row => cols,
    };
    let (mut codes, mut scales, mut zero_points) = (Vec::with_capacity(values.len()), Vec::new(), Vec::new());
    for values in values.chunks(group.max(1)) {
        let (scale, zero_point) = zero_point_of(values);
        // In f64, where neither the widest range of f32 nor the narrowest overflows.
        let inverse = 1.0 / scale as f64;
        codes.extend(values.iter().map(|&v| {
            let code = if scale == 0.0 { 0.0 } else { (v as f64 * inverse).round_ties_even() + zero_point as f64 };
            code.clamp(-(MAX_CODE as f64), MAX_CODE as f64) as i8 as u8
        }));
        scales.push(scale);
        zero_points.push(zero_point);
    }
    let per_row = |values: Vec<f32>| {
        let count = values.len();
        Tensor::from_vec(values, count, &Device::Cpu)?.broadcast_as(rows)?.contiguous()
    };
    Ok(ZeroPointMatrix {
        codes: Tensor::from_vec(codes, (rows, cols), &Device::Cpu)?,
        scales: per_row(scales)?,
        zero_points: per_row(zero_points)?,
    })
}

/// An error that names the place of the first value of a matrix (.., cols) that is NaN or infinite.
fn check_finite(values: &[f32], cols: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => not_finite(at / cols, at % cols, values[at]),
        None => Ok(()),
    }
}

/// The scale and the zero point of a group of finite values.
fn zero_point_of(values: &[f32]) -> (f32, f32) {
    let low = values.iter().fold(0f32, |low, &v| low.min(v)) as f64;
    let high = values.iter().fold(0f32, |high, &v| high.max(v)) as f64;
    let scale = ((high - low) / (2.0 * MAX_CODE as f64)) as f32;
    if scale == 0.0 {
        return (0.0, 0.0);
    }
    (scale, (-(MAX_CODE as f64) - low / scale as f64).round_ties_even() as f32)
}

impl ZeroPointMatrix {
    /// The float matrix (rows, cols), `F32`: `(code - zero_point) * scale`.
    pub fn dequantize(&self) -> Result<Tensor> {
        signed(&self.codes)?.broadcast_sub(&self.zero_points.unsqueeze(1)?)?.broadcast_mul(&self.scales.unsqueeze(1)?)
    }
}

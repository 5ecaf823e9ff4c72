//! Activations on their way into the int8 product: outlier columns apart, the rest as codes.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{FloatSlice, Kernels, quantize_row};

/// Values below which the rows of activations are not worth sharing among threads.
const MIN_PARALLEL_VALUES: usize = 1 << 15;

/// Float activations of a batch: `sequences` of `tokens` rows of `cols` values.
pub(crate) struct Values<'a> {
    pub(crate) values: Cow<'a, [f32]>,
    pub(crate) tokens: usize,
    pub(crate) cols: usize,
}

impl<'a> Values<'a> {
    /// Of a tensor (sequences, tokens, cols), (tokens, cols) or (cols), which is copied.
    pub(crate) fn read(x: &Tensor) -> Result<Values<'static>> {
        if !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            bail!("int8 ops take F32, F16 or BF16 values, found {:?}", x.dtype());
        }
        let (tokens, cols) = tokens_and_cols(x.dims())?;
        let values = x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        Ok(Values { values: values.into(), tokens, cols })
    }

    /// Of a contiguous tensor's storage; f32 is borrowed.
    pub(crate) fn from_storage(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (tokens, cols) = tokens_and_cols(layout.dims())?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("int8 ops want contiguous activations, found strides {:?}", layout.stride())
        };
        let values = match FloatSlice::of(storage)? {
            FloatSlice::F32(values) => Cow::Borrowed(&values[start..end]),
            narrow => {
                let mut values = vec![0f32; end - start];
                narrow.widen(start, &mut values);
                Cow::Owned(values)
            }
        };
        Ok(Values { values, tokens, cols })
    }
}

/// Tokens of one sequence, and columns, of activations' dimensions.
fn tokens_and_cols(dims: &[usize]) -> Result<(usize, usize)> {
    match *dims {
        [cols] => Ok((1, cols)),
        [.., tokens, cols] => Ok((tokens, cols)),
        [] => bail!("activations must have at least one dimension, found a scalar"),
    }
}

/// Activations ready for the int8 product.
pub(crate) struct Activations {
    /// (rows, cols): the codes of every token of every sequence, outlier columns zero.
    pub(crate) codes: Vec<i8>,
    /// (rows): what turns a token's codes back into floats.
    pub(crate) scales: Vec<f32>,
    /// (rows): the sum of each token's codes.
    pub(crate) code_sums: Vec<i32>,
    /// Tokens in each sequence.
    pub(crate) tokens: usize,
    pub(crate) cols: usize,
    pub(crate) sequences: Vec<Outliers>,
}

/// The part of one sequence that stays in float.
pub(crate) struct Outliers {
    /// The outlier columns, ascending.
    pub(crate) columns: Vec<u32>,
    /// (tokens, columns): the sequence's values in those columns.
    pub(crate) values: Vec<f32>,
}

impl Activations {
    /// Steps 2 and 3 of LLM.int8(): finds each sequence's outlier columns, and quantises every token
    /// by the largest magnitude of its values below the threshold.
    pub(crate) fn quantize(kernels: &Kernels, x: &Values, threshold: Option<f32>) -> Self {
        let (tokens, cols) = (x.tokens, x.cols);
        let rows = x.values.len().checked_div(cols).unwrap_or_default();
        let mut codes = vec![0i8; rows * cols];
        let mut scales = vec![0f32; rows];
        let mut code_sums = vec![0i32; rows];
        let mut sequences = Vec::new();
        for start in (0..rows).step_by(tokens.max(1)) {
            let values = &x.values[start * cols..][..tokens * cols];
            let outliers = Outliers::of(kernels, values, cols, threshold);
            let quantize = |values: &[f32], codes: &mut [i8], scale: &mut f32, sum: &mut i32| {
                let absmax = (kernels.absmax)(values, threshold);
                *scale = quantize_row(kernels, values, absmax, codes);
                for &column in &outliers.columns {
                    codes[column as usize] = 0;
                }
                *sum = codes.iter().map(|&code| i32::from(code)).sum();
            };
            let codes = &mut codes[start * cols..][..tokens * cols];
            let scales = &mut scales[start..][..tokens];
            let code_sums = &mut code_sums[start..][..tokens];
            let rows = (values.par_chunks(cols), codes.par_chunks_mut(cols), scales, code_sums);
            rows.into_par_iter()
                .with_min_len(MIN_PARALLEL_VALUES.div_ceil(cols))
                .for_each(|(values, codes, scale, sum)| quantize(values, codes, scale, sum));
            sequences.push(outliers);
        }
        Self { codes, scales, code_sums, tokens, cols, sequences }
    }
}

impl Outliers {
    /// Of one sequence's values (tokens, cols).
    fn of(kernels: &Kernels, values: &[f32], cols: usize, threshold: Option<f32>) -> Self {
        let Some(threshold) = threshold else {
            return Self { columns: Vec::new(), values: Vec::new() };
        };
        let flags = values
            .par_chunks(cols)
            .with_min_len(MIN_PARALLEL_VALUES.div_ceil(cols))
            .fold(
                || vec![0u8; cols],
                |mut flags, row| {
                    (kernels.flag_outliers)(row, threshold, &mut flags);
                    flags
                },
            )
            .reduce_with(|mut flags, others| {
                flags.iter_mut().zip(others).for_each(|(flag, other)| *flag |= other);
                flags
            })
            .unwrap_or_default();
        let columns: Vec<u32> = (0..).zip(flags).filter_map(|(column, flag)| (flag != 0).then_some(column)).collect();
        let values = values.chunks(cols).flat_map(|row| columns.iter().map(|&column| row[column as usize])).collect();
        Self { columns, values }
    }
}

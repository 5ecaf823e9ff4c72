//! Activations on their way into the int8 product: outlier columns apart, the rest as codes.

use std::borrow::Cow;
use std::cell::Cell;
use std::mem;
use std::ops::{Deref, DerefMut, Range};

use candle_core::{CpuStorage, DType, Layout, Result, Tensor, bail};

use super::{FloatSlice, Kernels, VALUES_PER_PART, quantize_row, rows_per_part, team, zeros};

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

/// Codes that begin on a cache line, so that vectors of them do not lie across two.
pub(crate) struct Codes {
    buffer: Vec<i8>,
    range: Range<usize>,
}

thread_local! {
    /// The buffer of the codes before: many tokens' would be megabytes to clear for every layer.
    static BUFFER: Cell<Vec<i8>> = const { Cell::new(Vec::new()) };
}

/// The longest buffer that is kept: 2,048 tokens of the widest layer of a model of 7 billion parameters.
const LONGEST_KEPT: usize = (1 << 25) + Codes::LINE;

impl Codes {
    const LINE: usize = 64;

    /// Room for `len` codes, which hold anything.
    fn unwritten(len: usize) -> Self {
        let mut buffer = BUFFER.take();
        if buffer.len() < len + Self::LINE {
            drop(buffer);
            buffer = zeros(len + Self::LINE);
        }
        let start = buffer.as_ptr().align_offset(Self::LINE).min(Self::LINE);
        Self { buffer, range: start..start + len }
    }
}

impl Drop for Codes {
    fn drop(&mut self) {
        if self.buffer.len() <= LONGEST_KEPT {
            BUFFER.set(mem::take(&mut self.buffer));
        }
    }
}

impl Deref for Codes {
    type Target = [i8];

    fn deref(&self) -> &[i8] {
        &self.buffer[self.range.clone()]
    }
}

impl DerefMut for Codes {
    fn deref_mut(&mut self) -> &mut [i8] {
        &mut self.buffer[self.range.clone()]
    }
}

/// Activations ready for the int8 product.
pub(crate) struct Activations {
    /// (rows, cols): the codes of every token of every sequence, outlier columns zero.
    pub(crate) codes: Codes,
    /// (rows): what turns a token's codes back into floats.
    pub(crate) scales: Vec<f32>,
    /// (rows): the sum of each token's codes.
    pub(crate) code_sums: Vec<i32>,
    pub(crate) cols: usize,
    /// The outlier columns of each sequence, ascending.
    pub(crate) sequences: Vec<Vec<u32>>,
    /// The outlier columns of any sequence, ascending.
    pub(crate) outliers: Vec<u32>,
    /// (rows, outliers): what stays in float, 0 where a column is no outlier of the token's sequence. A
    /// zero changes no sum's bits, so what shares a batch with a sequence never changes its result.
    pub(crate) outlier_values: Vec<f32>,
}

impl Activations {
    /// Steps 2 and 3 of LLM.int8(): finds each sequence's outlier columns, and quantises every token
    /// by the largest magnitude of its values below the threshold.
    pub(crate) fn quantize(kernels: &Kernels, x: &Values, threshold: Option<f32>) -> Self {
        let (tokens, cols) = (x.tokens, x.cols);
        let rows = x.values.len().checked_div(cols).unwrap_or_default();
        let mut codes = Codes::unwritten(rows * cols);
        let mut scales = vec![0f32; rows];
        let mut code_sums = vec![0i32; rows];
        let mut magnitudes = vec![0f32; rows];
        let sequences = scan(kernels, x, threshold, &mut magnitudes);
        let rows_per_part = rows_per_part(rows, cols);
        let parts = codes.chunks_mut((rows_per_part * cols).max(1)).zip(scales.chunks_mut(rows_per_part));
        let parts = parts.zip(code_sums.chunks_mut(rows_per_part)).enumerate().collect();
        team::for_each(parts, |(part, ((codes, scales), code_sums))| {
            for (index, codes) in codes.chunks_mut(cols).enumerate() {
                let row = part * rows_per_part + index;
                let values = &x.values[row * cols..][..cols];
                scales[index] = quantize_row(kernels, values, magnitudes[row], codes);
                for &column in &sequences[row / tokens] {
                    codes[column as usize] = 0;
                }
                code_sums[index] = (kernels.sum_codes)(codes);
            }
        });
        let mut outliers = sequences.concat();
        outliers.sort_unstable();
        outliers.dedup();
        let mut outlier_values = vec![0f32; rows * outliers.len()];
        if !outliers.is_empty() {
            for (row, (values, kept)) in
                x.values.chunks(cols).zip(outlier_values.chunks_mut(outliers.len())).enumerate()
            {
                for &column in &sequences[row / tokens] {
                    if let Ok(index) = outliers.binary_search(&column) {
                        kept[index] = values[column as usize];
                    }
                }
            }
        }
        Self { codes, scales, code_sums, cols, sequences, outliers, outlier_values }
    }
}

/// The outlier columns of each sequence, ascending; writes the largest magnitude below the threshold of each token.
fn scan(kernels: &Kernels, x: &Values, threshold: Option<f32>, magnitudes: &mut [f32]) -> Vec<Vec<u32>> {
    let (tokens, cols) = (x.tokens.max(1), x.cols.max(1));
    // A part is of one sequence.
    let rows_per_part = rows_per_part(tokens, cols);
    let parts_per_sequence = tokens.div_ceil(rows_per_part);
    let mut columns = vec![Vec::new(); x.values.len().div_ceil(tokens * cols) * parts_per_sequence];
    let sequences = x.values.chunks(tokens * cols).zip(magnitudes.chunks_mut(tokens));
    let parts = sequences
        .flat_map(|(values, magnitudes)| values.chunks(rows_per_part * cols).zip(magnitudes.chunks_mut(rows_per_part)));
    let work = |((values, magnitudes), columns): ((&[f32], &mut [f32]), &mut Vec<u32>)| {
        for (row, magnitude) in values.chunks(cols).zip(magnitudes) {
            *magnitude = (kernels.absmax)(row, threshold);
        }
        if let Some(threshold) = threshold {
            let mut flags = vec![0u8; cols];
            values.chunks(cols).for_each(|row| (kernels.flag_outliers)(row, threshold, &mut flags));
            *columns = flagged(&flags);
        }
    };
    let parts = parts.zip(&mut columns);
    // Few values are one thread's work, also where each sequence is a part.
    match x.values.len() {
        ..=VALUES_PER_PART => parts.for_each(work),
        _ => team::for_each(parts.collect(), work),
    }
    // In order already.
    if parts_per_sequence == 1 {
        return columns;
    }
    let merge = |parts: &[Vec<u32>]| {
        let mut flags = vec![0u8; cols];
        parts.iter().flatten().for_each(|&column| flags[column as usize] = 1);
        flagged(&flags)
    };
    columns.chunks(parts_per_sequence).map(merge).collect()
}

/// The numbers of the flags that are set, ascending.
fn flagged(flags: &[u8]) -> Vec<u32> {
    /// Flags that are looked at together: most are not set.
    const GROUP: usize = 64;
    let mut numbers = Vec::new();
    for (group, flags) in flags.chunks(GROUP).enumerate() {
        if flags.iter().fold(0, |any, flag| any | flag) != 0 {
            let first = (group * GROUP) as u32;
            numbers.extend((first..).zip(flags).filter_map(|(number, flag)| (*flag != 0).then_some(number)));
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_room_of_their_own_on_a_line_of_the_cache() {
        for len in [1, 5000, 64, 9000] {
            let (mut first, mut second) = (Codes::unwritten(len), Codes::unwritten(2 * len));
            first.fill(1);
            second.fill(2);
            assert!(first.iter().all(|&code| code == 1) && second.iter().all(|&code| code == 2));
            assert_eq!((first.len(), second.len()), (len, 2 * len));
            assert_eq!(first.as_ptr().addr() % 64 + second.as_ptr().addr() % 64, 0);
        }
        drop(Codes::unwritten(LONGEST_KEPT + 1));
        assert!(BUFFER.take().len() <= LONGEST_KEPT);
    }

    #[test]
    fn outlier_columns_are_those_of_each_sequence_however_it_is_cut_up() -> Result<()> {
        // Several sequences of several parts, and many short ones.
        for (sequences, tokens, cols) in [(3, 60, 1024), (40, 2, 1030), (1, 300, 640)] {
            let mut values = vec![0.5f32; sequences * tokens * cols];
            let wanted: Vec<Vec<u32>> = (0..sequences)
                .map(|sequence| {
                    let mut columns: Vec<u32> =
                        (0..tokens).step_by(23).map(|token| ((7 * sequence + 31 * token) % cols) as u32).collect();
                    for (index, &column) in columns.iter().enumerate() {
                        values[(sequence * tokens + 23 * index) * cols + column as usize] = -9.0;
                    }
                    columns.sort_unstable();
                    columns.dedup();
                    columns
                })
                .collect();
            let x = Values { values: values.into(), tokens, cols };
            for kernels in Kernels::available() {
                let found = Activations::quantize(kernels, &x, Some(6.0));
                assert_eq!(found.sequences, wanted, "{}", kernels.name);
                for (row, codes) in found.codes.chunks(cols).enumerate() {
                    let columns = &wanted[row / tokens];
                    let is_right = |(col, &code): (usize, &i8)| (code == 0) == columns.contains(&(col as u32));
                    assert!(codes.iter().enumerate().all(is_right), "{}: row {row}", kernels.name);
                }
            }
        }
        Ok(())
    }
}

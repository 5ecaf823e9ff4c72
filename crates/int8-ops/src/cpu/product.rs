//! The loops around the dot kernels: blocks of outputs among threads, and what follows the sums.

use std::cell::Cell;
use std::ops::Range;

use super::tiles::MANY_TOKENS;
use super::{Activations, FloatDots, Kernels, Values, team};

/// The columns of a result (tokens, width) in f32 that one weight fills.
pub(crate) struct OutputColumns<'a> {
    pub(crate) matrix: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) columns: Range<usize>,
}

/// What turns a token's integer sums with a block of weight rows into outputs (rows):
///
/// `y = weight_scale * (x_scale * Σ codes * codes + Σ_outlier columns x * code) + bias`: the weight's
/// scale serves both its int8 part and its outlier columns, which are dequantised as they are read.
/// Operations come in one order whatever the instruction set, so results are the same bit for bit.
#[derive(Debug, Clone, Copy)]
pub struct Finish<'a> {
    /// What turns the token's codes back into floats.
    pub x_scale: f32,
    /// (columns): the token's values in the outlier columns.
    pub outliers: &'a [f32],
    /// (columns, rows): the weight's codes in those columns.
    pub outlier_weights: &'a [f32],
    /// (rows).
    pub weight_scales: &'a [f32],
    /// (rows).
    pub bias: Option<&'a [f32]>,
}

/// How the outputs (tokens, weight rows) of a layer are cut up.
struct Blocks {
    /// Weight rows whose sums a kernel makes at a time.
    rows: usize,
    /// Tokens whose sums a kernel makes at a time.
    tokens: usize,
    /// Weight rows that a thread is given at a time.
    rows_per_part: usize,
}

/// Bytes of a weight that a thread is given at a time when there are few tokens.
const BYTES_PER_PART: usize = 1 << 16;

impl Blocks {
    /// Few tokens: short blocks, so that what follows the sums of one goes on while the next is on its
    /// way from memory. Many: blocks that are worth packing, and the sums of as many tokens as stay in
    /// a core's cache.
    fn of(tokens: usize, row_bytes: usize) -> Self {
        if tokens < MANY_TOKENS {
            let rows = 16;
            Self { rows, tokens, rows_per_part: (BYTES_PER_PART / row_bytes).next_multiple_of(rows).max(rows) }
        } else {
            Self { rows: 64, tokens: 512, rows_per_part: 64 }
        }
    }
}

/// Steps 4 to 6 of LLM.int8(): output (tokens, weight rows) from activations (tokens, cols), weight
/// codes (weight rows, cols) and scales (weight rows), and a bias (weight rows); see [`Finish`].
pub(crate) fn int8_product(
    kernels: &Kernels,
    x: &Activations,
    weight: &[i8],
    weight_scales: &[f32],
    bias: Option<&[f32]>,
    output: &mut OutputColumns,
) {
    let (cols, columns) = (x.cols, x.outliers.len());
    let blocks = Blocks::of(x.scales.len(), cols);
    output.fill_in_blocks(&blocks, |rows, outputs: &mut [&mut [f32]]| {
        let mut sums = INT8_SUMS.take();
        sums.resize(outputs.len().min(blocks.tokens) * blocks.rows, 0);
        let mut outlier_weights = vec![0f32; columns * blocks.rows];
        for (first, len) in pieces(rows.len(), blocks.rows) {
            let block = rows.start + first..rows.start + first + len;
            let weight = &weight[block.start * cols..block.end * cols];
            for (first_token, tokens) in pieces(outputs.len(), blocks.tokens) {
                let sums = &mut sums[..tokens * len];
                let code_sums = &x.code_sums[first_token..][..tokens];
                (kernels.int8_dots)(&x.codes[first_token * cols..][..tokens * cols], code_sums, weight, cols, sums);
                // The weight is in the cache by now.
                if first_token == 0 {
                    gather_columns(weight, cols, &x.outliers, &mut outlier_weights[..columns * len]);
                }
                for (token, sums) in (first_token..).zip(sums.chunks(len)) {
                    if let Some(later) = outputs.get(token + TOKENS_AHEAD) {
                        prefetch(&later[first..first + len]);
                    }
                    let finish = Finish {
                        x_scale: x.scales[token],
                        outliers: &x.outlier_values[token * columns..][..columns],
                        outlier_weights: &outlier_weights[..columns * len],
                        weight_scales: &weight_scales[block.clone()],
                        bias: bias.map(|bias| &bias[block.clone()]),
                    };
                    (kernels.finish)(sums, &finish, &mut outputs[token][first..first + len]);
                }
            }
        }
        INT8_SUMS.set(sums);
    })
}

thread_local! {
    /// Room for the sums of a block, kept from one to the next.
    static INT8_SUMS: Cell<Vec<i32>> = const { Cell::new(Vec::new()) };
}

/// How many tokens ahead a place in the output is brought to the cache: it is as far from the last one
/// as a row is long.
const TOKENS_AHEAD: usize = 8;

/// Asks for a slice to be brought to the cache, where the machine can be asked.
fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint reads and writes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// Output (tokens, weight rows) from float activations and a float weight (weight rows, cols).
pub(crate) fn float_product<T: Sync>(
    dots: FloatDots<T>,
    x: &Values,
    weight: &[T],
    bias: Option<&[f32]>,
    output: &mut OutputColumns,
) {
    let cols = x.cols;
    let blocks = Blocks::of(x.values.len() / cols, cols * size_of::<T>());
    output.fill_in_blocks(&blocks, |rows, outputs: &mut [&mut [f32]]| {
        let mut sums = vec![0f32; outputs.len().min(blocks.tokens) * blocks.rows];
        for (first, len) in pieces(rows.len(), blocks.rows) {
            let block = rows.start + first..rows.start + first + len;
            let weight = &weight[block.start * cols..block.end * cols];
            for (first_token, tokens) in pieces(outputs.len(), blocks.tokens) {
                let sums = &mut sums[..tokens * len];
                dots(&x.values[first_token * cols..][..tokens * cols], weight, cols, sums);
                for (output, sums) in outputs[first_token..].iter_mut().zip(sums.chunks(len)) {
                    let output = &mut output[first..first + len];
                    output.copy_from_slice(sums);
                    if let Some(bias) = bias {
                        output.iter_mut().zip(&bias[block.clone()]).for_each(|(output, bias)| *output += bias);
                    }
                }
            }
        }
    })
}

/// `len` in pieces of at most `size`: (start, length) of each.
fn pieces(len: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(size).map(move |start| (start, size.min(len - start)))
}

/// Writes the weights (columns, rows) of a block of rows (rows, cols) in the given columns, as floats.
fn gather_columns(weight: &[i8], cols: usize, columns: &[u32], gathered: &mut [f32]) {
    let rows = weight.len() / cols;
    for (row, weight) in weight.chunks(cols).enumerate() {
        for (index, &column) in columns.iter().enumerate() {
            gathered[index * rows + row] = f32::from(weight[column as usize]);
        }
    }
}

impl OutputColumns<'_> {
    /// Has `fill(rows, outputs)` write the output in parts of weight rows, from several threads;
    /// `outputs[token]` is that token's part.
    fn fill_in_blocks(&mut self, blocks: &Blocks, fill: impl Fn(Range<usize>, &mut [&mut [f32]]) + Sync) {
        let mut parts: Vec<(usize, Vec<&mut [f32]>)> = Vec::new();
        parts.extend((0..self.columns.len()).step_by(blocks.rows_per_part).map(|first| (first, Vec::new())));
        for row in self.matrix.chunks_mut(self.width) {
            let pieces = row[self.columns.clone()].chunks_mut(blocks.rows_per_part);
            parts.iter_mut().zip(pieces).for_each(|((_, part), piece)| part.push(piece));
        }
        parts.retain(|(_, part)| !part.is_empty());
        team::for_each(parts, |(first, mut part)| fill(first..first + part[0].len(), &mut part));
    }
}

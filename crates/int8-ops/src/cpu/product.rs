//! The loops around the dot kernels: blocks of outputs among threads, and what follows the sums.

use std::ops::Range;

use rayon::prelude::*;

use super::{Activations, HalfDots, Kernels, Values};

/// Weight rows that one task multiplies: small enough to stay in a core's cache while all tokens
/// pass by, large enough that starting a task does not show.
const ROWS_PER_BLOCK: usize = 64;
/// Tokens whose sums are on the stack at a time.
const TOKENS_PER_BLOCK: usize = 16;

/// The columns of a result (tokens, width) in f32 that one weight fills.
pub(crate) struct OutputColumns<'a> {
    pub(crate) matrix: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) columns: Range<usize>,
}

/// Steps 4 to 6 of LLM.int8(): output (tokens, weight rows) from activations (tokens, cols), weight
/// codes (weight rows, cols) and scales (weight rows), and a bias (weight rows).
///
/// `y = weight_scale * (x_scale * Σ codes * codes + Σ_outlier columns x * code) + bias`: the weight's
/// scale serves both its int8 part and its outlier columns, which are dequantised as they are read.
/// Operations come in one order whatever the instruction set, so results are the same bit for bit.
pub(crate) fn int8_product(
    kernels: &Kernels,
    x: &Activations,
    weight: &[i8],
    weight_scales: &[f32],
    bias: Option<&[f32]>,
    output: &mut OutputColumns,
) {
    output.fill_in_blocks(|rows, outputs| {
        let weight = &weight[rows.start * x.cols..rows.end * x.cols];
        let weight_scales = &weight_scales[rows.clone()];
        let bias = bias.map(|bias| &bias[rows]);
        let outlier_weights: Vec<_> =
            x.sequences.iter().map(|sequence| gather_columns(weight, x.cols, &sequence.columns)).collect();
        let mut sums = [0i32; TOKENS_PER_BLOCK * ROWS_PER_BLOCK];
        for (block, outputs) in outputs.chunks_mut(TOKENS_PER_BLOCK).enumerate() {
            let first = block * TOKENS_PER_BLOCK;
            let tokens = first..first + outputs.len();
            let sums = &mut sums[..outputs.len() * weight_scales.len()];
            let codes = &x.codes[tokens.start * x.cols..tokens.end * x.cols];
            (kernels.int8_dots)(codes, &x.code_sums[tokens.clone()], weight, x.cols, sums);
            for ((token, output), sums) in tokens.zip(outputs).zip(sums.chunks(weight_scales.len())) {
                let mut outlier_sums = [0f32; ROWS_PER_BLOCK];
                let (sequence, row) = (token / x.tokens, token % x.tokens);
                let outliers = &x.sequences[sequence];
                let values = &outliers.values[row * outliers.columns.len()..][..outliers.columns.len()];
                for (value, weights) in values.iter().zip(outlier_weights[sequence].chunks(weight_scales.len())) {
                    outlier_sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += value * weight);
                }
                let x_scale = x.scales[token];
                for (index, output) in output.iter_mut().enumerate() {
                    *output = weight_scales[index] * (sums[index] as f32 * x_scale + outlier_sums[index]);
                }
                if let Some(bias) = bias {
                    output.iter_mut().zip(bias).for_each(|(output, bias)| *output += bias);
                }
            }
        }
    })
}

/// Output (tokens, weight rows) from float activations and a 16-bit weight (weight rows, cols).
pub(crate) fn half_product<T: Sync>(
    dots: HalfDots<T>,
    x: &Values,
    weight: &[T],
    bias: Option<&[f32]>,
    output: &mut OutputColumns,
) {
    let cols = x.cols;
    output.fill_in_blocks(|rows, outputs| {
        let weight = &weight[rows.start * cols..rows.end * cols];
        let mut sums = [0f32; TOKENS_PER_BLOCK * ROWS_PER_BLOCK];
        for (block, outputs) in outputs.chunks_mut(TOKENS_PER_BLOCK).enumerate() {
            let sums = &mut sums[..outputs.len() * rows.len()];
            let x = &x.values[block * TOKENS_PER_BLOCK * cols..][..outputs.len() * cols];
            dots(x, weight, cols, sums);
            for (output, sums) in outputs.iter_mut().zip(sums.chunks(rows.len())) {
                output.copy_from_slice(sums);
                if let Some(bias) = bias {
                    output.iter_mut().zip(&bias[rows.clone()]).for_each(|(output, bias)| *output += bias);
                }
            }
        }
    })
}

/// The weights (columns, rows) of a block of rows (rows, cols) in the given columns, as floats.
fn gather_columns(weight: &[i8], cols: usize, columns: &[u32]) -> Vec<f32> {
    columns.iter().flat_map(|&column| weight.chunks(cols).map(move |row| f32::from(row[column as usize]))).collect()
}

impl OutputColumns<'_> {
    /// Has `fill(rows, block)` write the output in blocks of weight rows, from several threads;
    /// `block[token]` is that token's part.
    fn fill_in_blocks(&mut self, fill: impl Fn(Range<usize>, &mut [&mut [f32]]) + Sync) {
        let mut blocks: Vec<Vec<&mut [f32]>> = Vec::new();
        blocks.resize_with(self.columns.len().div_ceil(ROWS_PER_BLOCK), Vec::new);
        for row in self.matrix.chunks_mut(self.width) {
            let parts = row[self.columns.clone()].chunks_mut(ROWS_PER_BLOCK);
            blocks.iter_mut().zip(parts).for_each(|(block, part)| block.push(part));
        }
        blocks.par_iter_mut().enumerate().filter(|(_, block)| !block.is_empty()).for_each(|(index, block)| {
            let first = index * ROWS_PER_BLOCK;
            fill(first..first + block[0].len(), block);
        });
    }
}

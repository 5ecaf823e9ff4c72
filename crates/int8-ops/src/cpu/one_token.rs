//! One token through the rows of a weight in one pass, whatever the instruction set. What follows the sums of some rows
//! stands in one piece of code with the next ones' products, so that these are on their way from memory meanwhile.

use std::mem::MaybeUninit;

use super::tiles::prefetch;
use super::{Finish, Token, portable};

/// Weight rows whose sums become outputs together.
pub(super) const TILE_ROWS: usize = 16;

/// [`token_outputs`](super::Kernels::token_outputs) by a function that gives `Σ codes * weight + excess` of one row, or
/// lanes that add up to it, and one that adds the lanes of the rows of a tile. Of an empty row the first gives zero.
#[inline(always)]
pub(super) fn outputs<Lanes: Copy>(
    token: &Token,
    weight: &[i8],
    with: &Finish,
    out: &mut [MaybeUninit<f32>],
    excess: i32,
    row_sum: impl Fn(&[i8], &[i8]) -> Lanes,
    add_lanes: impl Fn(&[Lanes; TILE_ROWS]) -> [i32; TILE_ROWS],
) {
    let cols = token.codes.len();
    assert!(weight.len() == out.len() * cols && token.outlier_columns.len() == with.outliers.len());
    // (columns, rows of a tile).
    let mut outlier_codes = vec![[0i8; TILE_ROWS]; token.outlier_columns.len()];
    for (tile, (weight, out)) in weight.chunks(TILE_ROWS * cols).zip(out.chunks_mut(TILE_ROWS)).enumerate() {
        let first = tile * TILE_ROWS;
        // Scales come from memory while the products are made.
        prefetch(with.weight_scales[first..].as_ptr());
        let mut sums = [row_sum(&[], &[]); TILE_ROWS];
        for (row, (sum, weight)) in sums.iter_mut().zip(weight.chunks_exact(cols)).enumerate() {
            *sum = row_sum(token.codes, weight);
            // The row is in the nearest cache now.
            for (codes, &column) in outlier_codes.iter_mut().zip(token.outlier_columns) {
                codes[row] = weight[column as usize];
            }
        }
        let sums = add_lanes(&sums).map(|sum| sum.wrapping_sub(excess));
        let mut values = [0f32; TILE_ROWS];
        for (codes, x) in outlier_codes.iter().zip(with.outliers) {
            values.iter_mut().zip(codes).for_each(|(value, &code)| *value += x * f32::from(code));
        }
        match out.len() {
            TILE_ROWS => portable::scale_and_add_bias(&mut values, first, &sums, with),
            // The last rows of a weight.
            rows => portable::scale_and_add_bias(&mut values[..rows], first, &sums, with),
        }
        out.write_copy_of_slice(&values[..out.len()]);
    }
}

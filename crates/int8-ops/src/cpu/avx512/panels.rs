//! The int8 product for many tokens: the weight packed into panels of 16 rows as it is read.
//!
//! A panel holds four columns of 16 rows in every vector, so that a lane is a row and no sum has to be
//! gathered across a register at the end. Packing reads and writes every weight once more, which is
//! little beside many tokens' products. Blocks of columns keep the panels in the second cache.

use std::arch::x86_64::*;

use super::super::Tokens;
use super::super::tiles::{int8_tail, prefetch};

/// Rows of a panel: the 32-bit lanes of a vector.
const LANES: usize = 16;
/// Panels side by side, and tokens of a tile: 24 sums in registers, with 4 loads of the weight and 6 of
/// the codes for 24 products.
const PANELS: usize = 4;
const TOKENS: usize = 6;
const ROWS: usize = PANELS * LANES;
/// Columns that are packed at a time: 64 KB of weight.
const DEPTH: usize = 1024;

/// (DEPTH / 4, PANELS, LANES, 4): weights as `w + 128`.
#[repr(align(64))]
struct Packed([u8; ROWS * DEPTH]);

/// [`Int8Dots`](crate::cpu::Int8Dots) of at least one token.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn int8_dots(tokens: &Tokens, weight: &[i8], sums: &mut [i32]) {
    let &Tokens { codes, cols, code_sums, .. } = tokens;
    let (tokens, stride) = (code_sums.len(), weight.len() / cols);
    assert!(codes.len() == tokens * cols && sums.len() == tokens * stride);
    let mut packed = Packed([0; ROWS * DEPTH]);
    // Codes come in fours; what is left of a row is added one by one.
    let whole = cols / 4 * 4;
    for (sums, code_sum) in sums.chunks_mut(stride).zip(code_sums) {
        sums.fill(code_sum.wrapping_mul(-128));
    }
    let lines_per_tile = (ROWS * DEPTH / 64).div_ceil(tokens.div_ceil(TOKENS));
    for (block, weight) in weight.chunks(ROWS * cols).enumerate() {
        let rows = weight.len() / cols;
        let sums = &mut sums[block * ROWS..];
        for start in (0..whole).step_by(DEPTH) {
            let depth = DEPTH.min(whole - start);
            pack(weight, cols, start, depth, &mut packed);
            let mut next_lines = match start + depth < whole {
                true => lines_of(weight.as_ptr().wrapping_add(start + depth), cols, whole - start - depth),
                false => lines_of(weight.as_ptr().wrapping_add(ROWS * cols), cols, whole),
            };
            for token in (0..tokens).step_by(TOKENS) {
                // What is packed next comes from memory while the products are made.
                next_lines.by_ref().take(lines_per_tile).for_each(prefetch);
                let codes = &codes[token * cols + start..];
                let sums = &mut sums[token * stride..];
                let tile = match tokens - token {
                    1 => tile::<1>,
                    2 => tile::<2>,
                    3 => tile::<3>,
                    4 => tile::<4>,
                    5 => tile::<5>,
                    _ => tile::<TOKENS>,
                };
                tile(codes, cols, &packed, depth, rows, sums, stride);
            }
        }
        let rests = if whole < cols { codes } else { &[] };
        for (codes, sums) in rests.chunks(cols).zip(sums.chunks_mut(stride)) {
            for (weight, sum) in weight.chunks(cols).zip(sums) {
                let offset = 128 * codes[whole..].iter().map(|&code| i32::from(code)).sum::<i32>();
                *sum = sum.wrapping_add(int8_tail(&codes[whole..], &weight[whole..]) + offset);
            }
        }
    }
}

/// The cache lines of a block of rows, `cols` apart, in the columns from `first` on that are packed together, of `left`.
fn lines_of(first: *const i8, cols: usize, left: usize) -> impl Iterator<Item = *const i8> {
    let width = DEPTH.min(left);
    (0..ROWS).flat_map(move |row| (0..width).step_by(64).map(move |col| first.wrapping_add(row * cols + col)))
}

/// Adds `Σ codes[t] * (weight[r] + 128)` over `depth` columns to `sums[t * stride + r]`, for T tokens and
/// the first `rows` of the panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const T: usize>(
    codes: &[i8],
    cols: usize,
    packed: &Packed,
    depth: usize,
    rows: usize,
    sums: &mut [i32],
    stride: usize,
) {
    assert!(codes.len() >= (T - 1) * cols + depth && sums.len() >= (T - 1) * stride + rows && depth <= DEPTH);
    let masks: [u16; PANELS] = std::array::from_fn(|panel| match rows.saturating_sub(panel * LANES) {
        left if left >= LANES => u16::MAX,
        left => (1 << left) - 1,
    });
    let mut acc: [[__m512i; PANELS]; T] = std::array::from_fn(|t| {
        // SAFETY: the mask keeps to the `rows` sums of token t < T, which are in the slice (asserted above).
        std::array::from_fn(|p| unsafe {
            _mm512_maskz_loadu_epi32(masks[p], sums.as_ptr().wrapping_add(t * stride + p * LANES))
        })
    });
    for col in (0..depth).step_by(4) {
        // SAFETY: col < DEPTH, and a panel's vector is as aligned as the whole.
        let weights: [__m512i; PANELS] = std::array::from_fn(|p| unsafe {
            _mm512_load_si512(packed.0.as_ptr().add(col * ROWS + p * LANES * 4).cast())
        });
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: columns col to col + 3 of token t < T are in the slice (asserted above).
            let codes = unsafe { codes.as_ptr().add(t * cols + col).cast::<i32>().read_unaligned() };
            let codes = _mm512_set1_epi32(codes);
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_dpbusd_epi32(*acc, weight, codes);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (p, acc) in acc.into_iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm512_mask_storeu_epi32(sums.as_mut_ptr().wrapping_add(t * stride + p * LANES), masks[p], acc) };
        }
    }
}

/// Packs `depth` columns from `start` on of up to 64 rows; the panels' further rows are left as they are.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack(weight: &[i8], cols: usize, start: usize, depth: usize, packed: &mut Packed) {
    let flip = _mm512_set1_epi8(i8::MIN);
    assert!(start + depth <= cols && depth <= DEPTH && weight.len() <= ROWS * cols);
    for (panel, weight) in weight.chunks(LANES * cols).enumerate() {
        let rows = weight.len() / cols;
        for col in (0..depth).step_by(64) {
            let width = 64.min(depth - col);
            let mask = u64::MAX >> (64 - width);
            let fours: [__m512i; LANES] = std::array::from_fn(|row| {
                if row >= rows {
                    return flip;
                }
                // SAFETY: the row is in the slice, and the mask keeps to its columns.
                let weight = unsafe { _mm512_maskz_loadu_epi8(mask, weight.as_ptr().add(row * cols + start + col)) };
                _mm512_xor_si512(weight, flip)
            });
            for (index, vector) in transpose(fours).into_iter().take(width / 4).enumerate() {
                let at = (col + 4 * index) * ROWS + panel * LANES * 4;
                // SAFETY: col + 4 * index < DEPTH, and the place is as aligned as the whole.
                unsafe { _mm512_store_si512(packed.0.as_mut_ptr().add(at).cast(), vector) };
            }
        }
    }
}

/// Lane r of vector c becomes lane c of vector r.
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = rows;
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Vector 4g + j: lane 4q + j of the four rows of group g, in quarter q.
    let mut fours = pairs;
    for i in (0..LANES).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut columns = fours;
    for j in 0..4 {
        let low_of_01 = _mm512_shuffle_i32x4::<0b10_00_10_00>(fours[j], fours[4 + j]);
        let high_of_01 = _mm512_shuffle_i32x4::<0b11_01_11_01>(fours[j], fours[4 + j]);
        let low_of_23 = _mm512_shuffle_i32x4::<0b10_00_10_00>(fours[8 + j], fours[12 + j]);
        let high_of_23 = _mm512_shuffle_i32x4::<0b11_01_11_01>(fours[8 + j], fours[12 + j]);
        columns[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low_of_01, low_of_23);
        columns[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(high_of_01, high_of_23);
        columns[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low_of_01, low_of_23);
        columns[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(high_of_01, high_of_23);
    }
    columns
}

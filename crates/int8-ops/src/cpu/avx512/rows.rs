//! The int8 product for few tokens: rows of the weight as they lie in memory, read once. One token alone takes them one
//! after the other, see `token_outputs`; several, up to 8 at a time, share the loads of four or two rows.

use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::super::tiles::{prefetch, prefetch_near};
use super::super::{CodeLine, Finish, Token, Tokens, one_token};

/// Weight rows that a block of several tokens' codes serves while it is in the nearest cache.
const ROWS_TOGETHER: usize = 16;

/// The most tokens that are worked on together.
const TOKENS: usize = 8;

/// How far ahead of its use a weight that several tokens share is asked for, in bytes. Twice, as a processor that has
/// enough on its way from memory takes no notice of a hint; and line after line of a row, not of two by turns, as
/// memory likes it best.
const AHEAD: [usize; 2] = [8192, 2048];

/// Sums of some tokens with some weight rows, in lanes that are yet to be added.
type RowSums = [__m512i; 16];

thread_local! {
    /// Room for the sums of a tile's rows that are not complete, kept from one block to the next.
    static ROW_SUMS: Cell<Vec<RowSums>> = const { Cell::new(Vec::new()) };
}

/// [`Int8Dots`](crate::cpu::Int8Dots) of at least one token.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn int8_dots(tokens: &Tokens, weight: &[i8], sums: &mut [i32]) {
    let &Tokens { cols, packed, code_sums, .. } = tokens;
    let (tokens, rows, vectors) = (code_sums.len(), weight.len() / cols, cols.div_ceil(64));
    assert_eq!(packed.len(), tokens * vectors);
    let mut row_sums = ROW_SUMS.take();
    row_sums.resize(ROWS_TOGETHER, [_mm512_setzero_si512(); 16]);
    for (block, weight) in weight.chunks(ROWS_TOGETHER * cols).enumerate() {
        let mut token = 0;
        while token < tokens {
            let (lines, sums) = (&packed[token * vectors..], &mut sums[token * rows + block * ROWS_TOGETHER..]);
            token += match group(tokens - token) {
                1 => tile::<1, 4>(lines, weight, cols, sums, rows, &mut row_sums),
                2 => tile::<2, 4>(lines, weight, cols, sums, rows, &mut row_sums),
                4 => tile::<4, 4>(lines, weight, cols, sums, rows, &mut row_sums),
                _ => tile::<TOKENS, 2>(lines, weight, cols, sums, rows, &mut row_sums),
            };
        }
    }
    ROW_SUMS.set(row_sums);
    for (sums, code_sum) in sums.chunks_mut(rows).zip(code_sums) {
        sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(code_sum.wrapping_mul(128)));
    }
}

/// [`token_outputs`](crate::cpu::Kernels::token_outputs).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn token_outputs(token: &Token, weight: &[i8], with: &Finish, out: &mut [MaybeUninit<f32>]) {
    let excess = token.code_sum.wrapping_mul(128);
    let row_sum = |codes: &[i8], weight: &[i8]| row(codes, weight);
    one_token::outputs(token, weight, with, out, excess, row_sum, |lanes| add_lanes(lanes));
}

/// How many of the tokens that are left are worked on together.
fn group(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 3 => 2,
        4..8 => 4,
        _ => TOKENS,
    }
}

/// Puts codes (tokens, cols) in the order in which they are used, (vectors, tokens of a group) for every
/// group, padded with zeros. Where they lie a power of two apart they would not stay in the cache together.
pub(super) fn pack(codes: &[i8], tokens: usize, cols: usize) -> Vec<CodeLine> {
    let mut lines = Vec::with_capacity(tokens * cols.div_ceil(64));
    let mut first = 0;
    while first < tokens {
        let group = group(tokens - first);
        for col in (0..cols).step_by(64) {
            for token in first..first + group {
                let codes = &codes[token * cols + col..(token + 1) * cols];
                lines.push(match codes.first_chunk() {
                    Some(codes) => CodeLine(*codes),
                    None => {
                        let mut line = CodeLine([0; 64]);
                        line.0[..codes.len()].copy_from_slice(codes);
                        line
                    }
                });
            }
        }
        first += group;
    }
    lines
}

/// `Σ codes * (weight + 128)` for one token and one weight row, in lanes that are yet to be added. Rows are
/// read one after the other, as memory likes it best.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn row(codes: &[i8], weight: &[i8]) -> __m512i {
    /// Sums side by side, which hide the latency of an addition.
    const SUMS: usize = 2;
    /// How far ahead of its use the weight is asked for, in bytes: with one row at a time that is soon enough, and
    /// what is asked for beyond a thread's rows is for nothing.
    const ROW_AHEAD: usize = 3072;
    assert_eq!(codes.len(), weight.len());
    let flip = _mm512_set1_epi8(i8::MIN);
    let mut acc = [_mm512_setzero_si512(); SUMS];
    let (weights, weight) = weight.as_chunks::<{ 64 * SUMS }>();
    let (lines, codes) = codes.as_chunks::<{ 64 * SUMS }>();
    for (weight, codes) in weights.iter().zip(lines) {
        for (u, acc) in acc.iter_mut().enumerate() {
            let weight = weight[64 * u..].as_ptr();
            prefetch(weight.wrapping_add(ROW_AHEAD));
            // SAFETY: both are slices of 64 * SUMS bytes.
            let (weight, codes) = unsafe { (_mm512_loadu_epi8(weight), _mm512_loadu_epi8(codes[64 * u..].as_ptr())) };
            *acc = _mm512_dpbusd_epi32(*acc, _mm512_xor_si512(weight, flip), codes);
        }
    }
    for (weight, codes) in weight.chunks(64).zip(codes.chunks(64)) {
        let mask = u64::MAX >> (64 - weight.len());
        // SAFETY: the mask keeps to what there is in both. Where it is off a code is zero, so that a flipped weight
        // counts for nothing there.
        let load = |values: &[i8]| unsafe { _mm512_maskz_loadu_epi8(mask, values.as_ptr()) };
        acc[0] = _mm512_dpbusd_epi32(acc[0], _mm512_xor_si512(load(weight), flip), load(codes));
    }
    acc.into_iter().fold(_mm512_setzero_si512(), |sum, acc| _mm512_add_epi32(sum, acc))
}

/// `sums[t * stride + r] = Σ codes[t] * (weight[r] + 128)` for T tokens and up to 16 weight rows, of which R at a
/// time share the codes that are loaded; gives T. `row_sums` is room for sums that are not complete.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const T: usize, const R: usize>(
    lines: &[CodeLine],
    weight: &[i8],
    cols: usize,
    sums: &mut [i32],
    stride: usize,
    row_sums: &mut [RowSums],
) -> usize {
    let rows = weight.len() / cols;
    assert!(rows <= ROWS_TOGETHER && sums.len() >= (T - 1) * stride + rows);
    let vectors = vectors_per_block(cols);
    let blocks = lines[..cols.div_ceil(64) * T].chunks(vectors * T);
    let last = blocks.len() - 1;
    for (block, lines) in blocks.enumerate() {
        let (col, width) = (block * vectors * 64, lines.len() / T * 64);
        let is_last = block == last;
        // Where the vectors lie that are worked on at some row: after the tile's last one, those of the next block of
        // its rows, or of the next tile.
        let place_of = |row: usize| match row < ROWS_TOGETHER {
            true => weight.as_ptr().wrapping_add(row * cols + col),
            false if is_last => weight.as_ptr().wrapping_add(row * cols),
            false => weight.as_ptr().wrapping_add((row - ROWS_TOGETHER) * cols + col + width),
        };
        let rows_ahead = AHEAD.map(|bytes| bytes.div_ceil(R * width) * R);
        let mut row = 0;
        while row < rows {
            let place = Place { col, is_last, stride, ahead: rows_ahead.map(|ahead| place_of(row + ahead)) };
            let (weight, sums) = (&weight[row * cols + col..], &mut sums[row..]);
            row += match rows - row >= R {
                true => add_rows::<T, R>(lines, weight, cols, &place, &mut row_sums[row / R], sums),
                false => add_rows::<T, 1>(lines, weight, cols, &place, &mut row_sums[row / R + row % R], sums),
            };
        }
    }
    T
}

/// The vectors of a row that are worked on before the next row's, so that those of every token's codes stay in the
/// nearest cache meanwhile: as many in each block, or nearly.
fn vectors_per_block(cols: usize) -> usize {
    const MOST: usize = 40;
    let vectors = cols.div_ceil(64);
    vectors.div_ceil(vectors.div_ceil(MOST))
}

/// Where some vectors lie in their rows, where complete sums go, and what is worked on later.
struct Place {
    /// The column of the first.
    col: usize,
    /// Whether there is nothing after them.
    is_last: bool,
    /// From the sums of one token to those of the next.
    stride: usize,
    /// Where those lie that are to be asked for meanwhile.
    ahead: [*const i8; 2],
}

/// Adds `Σ codes[t] * (weight[r] + 128)` over some vectors to the lanes of `row_sums`, for T tokens and R weight
/// rows, `cols` apart; what stands there before the first vectors does not count. After the last vectors the sums
/// are complete. Gives R.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_rows<const T: usize, const R: usize>(
    lines: &[CodeLine],
    weight: &[i8],
    cols: usize,
    place: &Place,
    row_sums: &mut RowSums,
    sums: &mut [i32],
) -> usize {
    let mut acc = [[_mm512_setzero_si512(); R]; T];
    if place.col > 0 {
        acc = std::array::from_fn(|t| std::array::from_fn(|r| row_sums[t * R + r]));
    }
    let flip = _mm512_set1_epi8(i8::MIN);
    // What there is of the weight from the same place in the last of the rows on, rows after it too: a vector may
    // reach past the end of its row, where codes are zero.
    let left = weight.len() - (R - 1) * cols;
    let count = lines.len() / T;
    let whole = (left / 64).min(count);
    let [far, near] = place.ahead;
    let (mut byte, mut end_of_row) = (0, count * 64);
    for vector in 0..whole {
        for _ in 0..R {
            prefetch_near(far.wrapping_add(byte));
            prefetch_near(near.wrapping_add(byte));
            byte += 64;
            if byte == end_of_row {
                // On to the next row, `cols` after where this one began.
                byte = byte + cols - count * 64;
                end_of_row += cols;
            }
        }
        let weights: [__m512i; R] = std::array::from_fn(|r| {
            let weight = weight.as_ptr().wrapping_add(r * cols + vector * 64);
            // SAFETY: 64 columns from here on are in the slice, of the last row and so of those before it.
            _mm512_xor_si512(unsafe { _mm512_loadu_epi8(weight) }, flip)
        });
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: vector < lines.len() / T and t < T, and a line is a vector.
            let codes = unsafe { _mm512_load_si512(lines.as_ptr().add(vector * T + t).cast()) };
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_dpbusd_epi32(*acc, weight, codes);
            }
        }
    }
    if whole < count {
        let mask = (1 << (left - whole * 64)) - 1;
        let weights: [__m512i; R] = std::array::from_fn(|r| {
            // SAFETY: the mask keeps to what is left of the weight. Codes are zero where it is off.
            let weight = unsafe { _mm512_maskz_loadu_epi8(mask, weight.as_ptr().wrapping_add(r * cols + whole * 64)) };
            _mm512_xor_si512(weight, flip)
        });
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let codes = unsafe { _mm512_load_si512(lines.as_ptr().add(whole * T + t).cast()) };
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_dpbusd_epi32(*acc, weight, codes);
            }
        }
    }
    if place.is_last {
        let mut all = [_mm512_setzero_si512(); 16];
        all[..T * R].copy_from_slice(acc.as_flattened());
        let all = add_lanes(&all);
        for (sums, all) in sums.chunks_mut(place.stride).zip(all.chunks(R).take(T)) {
            sums[..R].copy_from_slice(all);
        }
    } else {
        row_sums[..T * R].copy_from_slice(acc.as_flattened());
    }
    R
}

/// The sums over the 16 lanes of each of 16 vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes(vectors: &[__m512i; 16]) -> [i32; 16] {
    let pairs: [__m512i; 8] = std::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
    });
    // Every quarter holds a sum of four lanes of four vectors.
    let fours: [__m512i; 4] = std::array::from_fn(|i| {
        let (a, b) = (pairs[2 * i], pairs[2 * i + 1]);
        _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    });
    let halves = |a, b| _mm512_add_epi32(_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b));
    let sums = halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
    let mut out = [0; 16];
    // SAFETY: 16 sums of 32 bits fit.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sums) };
    out
}

//! AVX-512 with VNNI: 64 products of codes, or 16 of floats, an instruction.

mod pairs;
mod panels;
mod rows;
mod softmax;

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::elementwise::elementwise_kernels;
use super::tiles::{MANY_TOKENS, for_each_tile, prefetch, prefetch_after};
use super::{CodeLine, Kernels, Tokens};

elementwise_kernels!("avx512f,avx512bw,avx512vl,avx512dq");

// SAFETY: the table is handed out only where `is_supported` has found the features that every kernel
// in it needs.
#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    is_supported: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
    },
    widen: |values, out| unsafe { widen(values, out) },
    narrow: |values, out| unsafe { narrow(values, out) },
    pack_codes,
    int8_dots: |tokens, weight, sums| unsafe { int8_dots(tokens, weight, sums) },
    token_outputs: |token, weight, with, out| unsafe { rows::token_outputs(token, weight, with, out) },
    f32_dots: |x, weight, cols, sums| unsafe { float_dots::<f32>(x, weight, cols, sums) },
    f16_dots: |x, weight, cols, sums| unsafe { float_dots::<f16>(x, weight, cols, sums) },
    bf16_dots: |x, weight, cols, sums| unsafe { float_dots::<bf16>(x, weight, cols, sums) },
    f32_outer: |a, depth, b, strides, sums, width| unsafe { outer_sum::<f32>(a, depth, b, strides, sums, width) },
    f16_outer: |a, depth, b, strides, sums, width| unsafe { outer_sum::<f16>(a, depth, b, strides, sums, width) },
    pair_sums: |a, depth, b, strides, sums, width, lanes, next| unsafe {
        pairs::pair_sums::<i16>(a, depth, b, strides, sums, width, lanes, next)
    },
    byte_pair_sums: |a, depth, b, strides, sums, width, lanes, next| unsafe {
        pairs::pair_sums::<i8>(a, depth, b, strides, sums, width, lanes, next)
    },
    softmax_codes: |sums, block, queries, weights, codes| unsafe {
        softmax::softmax_codes(sums, block, queries, weights, codes)
    },
    ..elementwise::KERNELS
};

/// `vpdpbusd` multiplies unsigned by signed bytes, so the weight is read as `w + 128` (its sign bit
/// flipped) and `128 * Σ codes` is taken off every sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8_dots(tokens: &Tokens, weight: &[i8], sums: &mut [i32]) {
    match tokens.code_sums.len() {
        MANY_TOKENS.. => panels::int8_dots(tokens, weight, sums),
        _ => rows::int8_dots(tokens, weight, sums),
    }
}

/// Few tokens' in the order of use: see `rows`.
fn pack_codes(codes: &[i8], cols: usize) -> Vec<CodeLine> {
    match codes.len() / cols {
        MANY_TOKENS.. => Vec::new(),
        tokens => rows::pack(codes, tokens, cols),
    }
}

/// A float that 16 of are loaded, and widened where they are narrow, at a time.
trait Widen: Copy {
    /// # Safety
    /// 16 values must be readable.
    unsafe fn load(values: *const Self) -> __m512;

    /// # Safety
    /// `values` must be readable where `mask` is set.
    unsafe fn load_masked(values: *const Self, mask: u16) -> __m512;
}

impl Widen for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(values: *const Self) -> __m512 {
        // SAFETY: the caller vouches for the memory.
        unsafe { _mm512_loadu_ps(values) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_masked(values: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller vouches for the memory under the mask.
        unsafe { _mm512_maskz_loadu_ps(mask, values) }
    }
}

impl Widen for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(values: *const Self) -> __m512 {
        // SAFETY: f16 is 16 bits; the caller vouches for the memory.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(values.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_masked(values: *const Self, mask: u16) -> __m512 {
        // SAFETY: f16 is 16 bits; the caller vouches for the memory under the mask.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) })
    }
}

impl Widen for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(values: *const Self) -> __m512 {
        // SAFETY: bf16 is 16 bits; the caller vouches for the memory.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(values.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_masked(values: *const Self, mask: u16) -> __m512 {
        // SAFETY: bf16 is 16 bits; the caller vouches for the memory under the mask.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen(values: &[f16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len());
    for (values, out) in values.chunks(16).zip(out.chunks_mut(16)) {
        let mask = u16::MAX >> (16 - values.len());
        // SAFETY: the mask keeps to the values of both.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, f16::load_masked(values.as_ptr(), mask)) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn narrow(values: &[f32], out: &mut [f16]) {
    assert_eq!(values.len(), out.len());
    let (least, most) = (_mm512_set1_ps(f16::MIN.to_f32()), _mm512_set1_ps(f16::MAX.to_f32()));
    for (values, out) in values.chunks(16).zip(out.chunks_mut(16)) {
        let mask = u16::MAX >> (16 - values.len());
        // SAFETY: the mask keeps to the values of both; f16 is 16 bits.
        unsafe {
            let values = f32::load_masked(values.as_ptr(), mask);
            // Of a pair with NaN the second is taken.
            let finite = _mm512_max_ps(least, _mm512_min_ps(most, values));
            let narrowed = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(finite);
            _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, narrowed);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn float_dots<W: Widen>(x: &[f32], weight: &[W], cols: usize, sums: &mut [f32]) {
    let (tokens, rows) = (x.len() / cols, weight.len() / cols);
    if tokens >= MANY_TOKENS {
        for_each_tile!(float_tile::<6, 4, W>(x, weight, cols, sums));
        return;
    }
    // One row after the other, as memory likes it best; but where activations do not stay in the nearest cache, rows
    // share their loads.
    let are_far = tokens.min(8) * cols * size_of::<f32>() > NEAR_BYTES;
    let mut row = 0;
    while row < rows {
        let share = are_far && tokens >= 4 && rows - row >= ROWS_TOGETHER;
        let mut token = 0;
        while token < tokens {
            let (x, weight, sums) = (&x[token * cols..], &weight[row * cols..], &mut sums[token * rows + row..]);
            token += match (tokens - token, share) {
                (1, true) => float_tile::<1, ROWS_TOGETHER, W>(x, weight, cols, sums, rows),
                (2 | 3, true) => float_tile::<2, ROWS_TOGETHER, W>(x, weight, cols, sums, rows),
                (4..8, true) => float_tile::<4, ROWS_TOGETHER, W>(x, weight, cols, sums, rows),
                (_, true) => float_tile::<8, ROWS_TOGETHER, W>(x, weight, cols, sums, rows),
                (1, false) => float_tile::<1, 1, W>(x, weight, cols, sums, rows),
                (2 | 3, false) => float_tile::<2, 1, W>(x, weight, cols, sums, rows),
                (4..8, false) => float_tile::<4, 1, W>(x, weight, cols, sums, rows),
                (_, false) => float_tile::<8, 1, W>(x, weight, cols, sums, rows),
            };
        }
        row += if share { ROWS_TOGETHER } else { 1 };
    }
}

/// Weight rows that few tokens' activations are multiplied with at a time where they share loads.
const ROWS_TOGETHER: usize = 3;
/// The nearest cache of any processor with these instructions.
const NEAR_BYTES: usize = 32 << 10;

/// `sums[t * stride + r] = Σ x[t] * weight[r]` for T tokens and R weight rows; gives T.
///
/// A sum is made the same way in every tile, so it does not depend on what else is in the block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn float_tile<const T: usize, const R: usize, W: Widen>(
    x: &[f32],
    weight: &[W],
    cols: usize,
    sums: &mut [f32],
    stride: usize,
) -> usize {
    assert!(x.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let mut acc = [[_mm512_setzero_ps(); R]; T];
    let whole = cols / 16 * 16;
    for col in (0..whole).step_by(16) {
        // SAFETY: rows r < R lie in the slice (asserted above), 16 columns in the row.
        let weights: [__m512; R] = std::array::from_fn(|r| unsafe { W::load(weight.as_ptr().add(r * cols + col)) });
        if R == 1 {
            prefetch_after(weight.as_ptr().wrapping_add(col));
        } else if R == ROWS_TOGETHER {
            // The next rows, line after line: see `rows`.
            let next = weight.as_ptr().wrapping_add(R * cols + R * col);
            (0..R).for_each(|line| prefetch(next.wrapping_add(16 * line)));
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above for rows t < T.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(t * cols + col)) };
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_fmadd_ps(x, weight, *acc);
            }
        }
    }
    if whole < cols {
        let mask = (1 << (cols - whole)) - 1;
        for (t, acc) in acc.iter_mut().enumerate() {
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: as above, and the mask keeps to the row.
                let (x, weight) = unsafe {
                    let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(t * cols + whole));
                    (x, W::load_masked(weight.as_ptr().add(r * cols + whole), mask))
                };
                *acc = _mm512_fmadd_ps(x, weight, *acc);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            sums[t * stride + r] = _mm512_reduce_add_ps(acc);
        }
    }
    T
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn outer_sum<W: Widen>(a: &[f32], depth: usize, b: &[W], strides: [usize; 2], sums: &mut [f32], width: usize) {
    let rows = sums.len() / width;
    let stride = a.len() / rows;
    for row in (0..rows).step_by(6) {
        let a = &a[row * stride..];
        let mut lane = 0;
        while lane < width {
            let (b, sums) = (&b[lane / 16 * strides[1]..], &mut sums[row * width + lane..]);
            macro_rules! tile {
                ($rows:literal) => {
                    if width - lane >= 64 {
                        outer_tile::<$rows, 4, W>(a, stride, depth, b, strides, sums, width)
                    } else {
                        outer_tile::<$rows, 1, W>(a, stride, depth, b, strides, sums, width)
                    }
                };
            }
            lane += match rows - row {
                1 => tile!(1),
                2 => tile!(2),
                3 => tile!(3),
                4 => tile!(4),
                5 => tile!(5),
                _ => tile!(6),
            };
        }
    }
}

/// R rows by V vectors of 16 lanes of [`OuterSum`](super::OuterSum); gives the number of lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn outer_tile<const R: usize, const V: usize, W: Widen>(
    a: &[f32],
    stride: usize,
    depth: usize,
    b: &[W],
    strides: [usize; 2],
    sums: &mut [f32],
    width: usize,
) -> usize {
    assert!(depth > 0 && a.len() >= (R - 1) * stride + depth && sums.len() >= (R - 1) * width + V * 16);
    assert!(b.len() >= (depth - 1) * strides[0] + (V - 1) * strides[1] + 16);
    let mut acc: [[__m512; V]; R] = std::array::from_fn(|r| {
        // SAFETY: V vectors of row r < R lie in the slice (asserted above).
        std::array::from_fn(|v| unsafe { _mm512_loadu_ps(sums.as_ptr().add(r * width + v * 16)) })
    });
    for k in 0..depth {
        // SAFETY: V vectors of b[k], and a[r, k], lie in the slices (asserted above).
        let vectors: [__m512; V] =
            std::array::from_fn(|v| unsafe { W::load(b.as_ptr().add(k * strides[0] + v * strides[1])) });
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let a = _mm512_set1_ps(unsafe { *a.as_ptr().add(r * stride + k) });
            for (acc, vector) in acc.iter_mut().zip(vectors) {
                *acc = _mm512_fmadd_ps(a, vector, *acc);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(r * width + v * 16), acc) };
        }
    }
    V * 16
}

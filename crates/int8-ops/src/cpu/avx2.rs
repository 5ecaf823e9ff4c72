//! AVX2 with FMA and F16C: 32 products of codes, or 8 of floats, at a time.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::tiles::{for_each_tile, half_tail, int8_tail};
use super::{Kernels, portable};

// SAFETY: the table is handed out only where `is_supported` has found the features that every kernel
// in it needs.
#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS: Kernels = Kernels {
    name: "avx2",
    is_supported: || {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    },
    absmax: |x, threshold| unsafe { absmax(x, threshold) },
    flag_outliers: |x, threshold, flags| unsafe { flag_outliers(x, threshold, flags) },
    quantize: |x, inverse, codes| unsafe { quantize(x, inverse, codes) },
    int8_dots: |codes, _code_sums, weight, cols, sums| unsafe { int8_dots(codes, weight, cols, sums) },
    f16_dots: |x, weight, cols, sums| unsafe { half_dots::<f16>(x, weight, cols, sums) },
    bf16_dots: |x, weight, cols, sums| unsafe { half_dots::<bf16>(x, weight, cols, sums) },
};

#[target_feature(enable = "avx2")]
fn absmax(x: &[f32], threshold: Option<f32>) -> f32 {
    portable::absmax(x, threshold)
}

#[target_feature(enable = "avx2")]
fn flag_outliers(x: &[f32], threshold: f32, flags: &mut [u8]) {
    portable::flag_outliers(x, threshold, flags)
}

#[target_feature(enable = "avx2")]
fn quantize(x: &[f32], inverse: f32, codes: &mut [i8]) {
    portable::quantize(x, inverse, codes)
}

/// Tokens and weight rows of a tile: what 16 registers hold beside the operands.
const TOKENS: usize = 2;
const ROWS: usize = 4;

#[target_feature(enable = "avx2")]
fn int8_dots(codes: &[i8], weight: &[i8], cols: usize, sums: &mut [i32]) {
    for_each_tile!(int8_tile::<TOKENS, ROWS>(codes, weight, cols, sums));
}

/// `sums[t * stride + r] = Σ codes[t] * weight[r]` for T tokens and R weight rows.
///
/// `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs in 16 bits: with `|w|` as the
/// unsigned side and `±code` as the other, a pair is at most 2 * 128 * 127 and never saturates.
#[target_feature(enable = "avx2")]
fn int8_tile<const T: usize, const R: usize>(
    codes: &[i8],
    weight: &[i8],
    cols: usize,
    sums: &mut [i32],
    stride: usize,
) {
    assert!(codes.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_si256(); R]; T];
    let whole = cols / 32 * 32;
    for col in (0..whole).step_by(32) {
        // SAFETY: rows t < T and r < R lie in the slices (asserted above), 32 columns in the row.
        let load =
            |values: &[i8], row: usize| unsafe { _mm256_loadu_si256(values.as_ptr().add(row * cols + col).cast()) };
        let codes: [__m256i; T] = std::array::from_fn(|t| load(codes, t));
        for r in 0..R {
            let weight = load(weight, r);
            let magnitude = _mm256_abs_epi8(weight);
            for t in 0..T {
                let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(codes[t], weight));
                acc[t][r] = _mm256_add_epi32(acc[t][r], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            let tail = int8_tail(&codes[t * cols..][whole..cols], &weight[r * cols..][whole..cols]);
            sums[t * stride + r] = add_lanes(acc) + tail;
        }
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn add_lanes(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
}

/// A 16-bit float that 8 of are loaded and widened at a time.
trait Widen: Copy + Into<f32> {
    /// # Safety
    /// 8 values must be readable.
    unsafe fn load(values: *const Self) -> __m256;
}

impl Widen for f16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: the caller vouches for 8 values of 16 bits.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(values.cast()) })
    }
}

impl Widen for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: the caller vouches for 8 values of 16 bits.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(values.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn half_dots<H: Widen>(x: &[f32], weight: &[H], cols: usize, sums: &mut [f32]) {
    for_each_tile!(half_tile::<TOKENS, ROWS, H>(x, weight, cols, sums));
}

/// `sums[t * stride + r] = Σ x[t] * weight[r]` for T tokens and R weight rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn half_tile<const T: usize, const R: usize, H: Widen>(
    x: &[f32],
    weight: &[H],
    cols: usize,
    sums: &mut [f32],
    stride: usize,
) {
    assert!(x.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let mut acc = [[_mm256_setzero_ps(); R]; T];
    let whole = cols / 8 * 8;
    for col in (0..whole).step_by(8) {
        // SAFETY: rows t < T and r < R lie in the slices (asserted above), 8 columns in the row.
        let x: [__m256; T] = std::array::from_fn(|t| unsafe { _mm256_loadu_ps(x.as_ptr().add(t * cols + col)) });
        for r in 0..R {
            // SAFETY: as above.
            let weight = unsafe { H::load(weight.as_ptr().add(r * cols + col)) };
            for t in 0..T {
                acc[t][r] = _mm256_fmadd_ps(x[t], weight, acc[t][r]);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            let tail = half_tail(&x[t * cols..][whole..cols], &weight[r * cols..][whole..cols]);
            let acc = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
            let acc = _mm_add_ps(acc, _mm_movehl_ps(acc, acc));
            let acc = _mm_add_ss(acc, _mm_shuffle_ps::<0b01>(acc, acc));
            sums[t * stride + r] = _mm_cvtss_f32(acc) + tail;
        }
    }
}

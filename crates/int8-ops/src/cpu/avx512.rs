//! AVX-512 with VNNI: 64 products of codes, or 16 of floats, an instruction.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::tiles::{for_each_tile, take_off_offset};
use super::{Kernels, portable};

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
    absmax: |x, threshold| unsafe { absmax(x, threshold) },
    flag_outliers: |x, threshold, flags| unsafe { flag_outliers(x, threshold, flags) },
    quantize: |x, inverse, codes| unsafe { quantize(x, inverse, codes) },
    int8_dots: |codes, code_sums, weight, cols, sums| unsafe { int8_dots(codes, code_sums, weight, cols, sums) },
    f16_dots: |x, weight, cols, sums| unsafe { half_dots::<f16>(x, weight, cols, sums) },
    bf16_dots: |x, weight, cols, sums| unsafe { half_dots::<bf16>(x, weight, cols, sums) },
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn absmax(x: &[f32], threshold: Option<f32>) -> f32 {
    portable::absmax(x, threshold)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn flag_outliers(x: &[f32], threshold: f32, flags: &mut [u8]) {
    portable::flag_outliers(x, threshold, flags)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantize(x: &[f32], inverse: f32, codes: &mut [i8]) {
    portable::quantize(x, inverse, codes)
}

/// Tokens and weight rows of a tile: 16 sums in registers, enough to hide the latency of a sum, with
/// 8 loads for 16 products.
const TOKENS: usize = 4;
const ROWS: usize = 4;

/// `vpdpbusd` multiplies unsigned by signed bytes, so the weight is read as `w + 128` (its sign bit
/// flipped) and `128 * Σ codes` is taken off every sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8_dots(codes: &[i8], code_sums: &[i32], weight: &[i8], cols: usize, sums: &mut [i32]) {
    for_each_tile!(int8_tile::<TOKENS, ROWS>(codes, weight, cols, sums));
    take_off_offset(code_sums, weight.len() / cols, sums);
}

/// `sums[t * stride + r] = Σ codes[t] * (weight[r] + 128)` for T tokens and R weight rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8_tile<const T: usize, const R: usize>(
    codes: &[i8],
    weight: &[i8],
    cols: usize,
    sums: &mut [i32],
    stride: usize,
) {
    assert!(codes.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let flip = _mm512_set1_epi8(i8::MIN);
    let mut acc = [[_mm512_setzero_si512(); R]; T];
    for col in (0..cols).step_by(64) {
        let mask = if cols - col >= 64 { u64::MAX } else { (1 << (cols - col)) - 1 };
        // SAFETY: rows t < T and r < R lie in the slices (asserted above), the mask keeps to the row.
        let load =
            |values: &[i8], row: usize| unsafe { _mm512_maskz_loadu_epi8(mask, values.as_ptr().add(row * cols + col)) };
        // Where the mask is off a code is zero, so that a flipped weight counts for nothing there.
        let weights: [__m512i; R] = std::array::from_fn(|r| _mm512_xor_si512(load(weight, r), flip));
        for (t, acc) in acc.iter_mut().enumerate() {
            let codes = load(codes, t);
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_dpbusd_epi32(*acc, weight, codes);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            sums[t * stride + r] = _mm512_reduce_add_epi32(acc);
        }
    }
}

/// A 16-bit float that 16 of are loaded and widened at a time.
trait Widen: Copy {
    /// # Safety
    /// `values` must be readable where `mask` is set.
    unsafe fn load(values: *const Self, mask: u16) -> __m512;
}

impl Widen for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(values: *const Self, mask: u16) -> __m512 {
        // SAFETY: f16 is 16 bits; the caller vouches for the memory under the mask.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) })
    }
}

impl Widen for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(values: *const Self, mask: u16) -> __m512 {
        // SAFETY: bf16 is 16 bits; the caller vouches for the memory under the mask.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn half_dots<H: Widen>(x: &[f32], weight: &[H], cols: usize, sums: &mut [f32]) {
    for_each_tile!(half_tile::<TOKENS, ROWS, H>(x, weight, cols, sums));
}

/// `sums[t * stride + r] = Σ x[t] * weight[r]` for T tokens and R weight rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn half_tile<const T: usize, const R: usize, H: Widen>(
    x: &[f32],
    weight: &[H],
    cols: usize,
    sums: &mut [f32],
    stride: usize,
) {
    assert!(x.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let mut acc = [[_mm512_setzero_ps(); R]; T];
    for col in (0..cols).step_by(16) {
        let mask = if cols - col >= 16 { u16::MAX } else { (1 << (cols - col)) - 1 };
        // SAFETY: rows r < R lie in the slice (asserted above), the mask keeps to the row.
        let weights: [__m512; R] =
            std::array::from_fn(|r| unsafe { H::load(weight.as_ptr().add(r * cols + col), mask) });
        for (t, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above for rows t < T.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(t * cols + col)) };
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = _mm512_fmadd_ps(x, weight, *acc);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            sums[t * stride + r] = _mm512_reduce_add_ps(acc);
        }
    }
}

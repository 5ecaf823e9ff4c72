//! AVX2 with FMA and F16C: 32 products of codes, or 8 of floats, at a time.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::{bf16, f16};

use super::elementwise::elementwise_kernels;
use super::tiles::{Ahead, MANY_TOKENS, float_tail, for_each_tile, int8_tail, prefetch_after};
use super::{Finish, Kernels, Pair, Token, one_token, portable};

elementwise_kernels!("avx2,fma,f16c");

// SAFETY: the table is handed out only where `is_supported` has found the features that every kernel
// in it needs.
#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS: Kernels = Kernels {
    name: "avx2",
    is_supported: || {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    },
    widen: |values, out| unsafe { widen(values, out) },
    narrow: |values, out| unsafe { narrow(values, out) },
    int8_dots: |tokens, weight, sums| unsafe { int8_dots(tokens.codes, weight, tokens.cols, sums) },
    token_outputs: |token, weight, with, out| unsafe { token_outputs(token, weight, with, out) },
    f32_dots: |x, weight, cols, sums| unsafe { float_dots::<f32>(x, weight, cols, sums) },
    f16_dots: |x, weight, cols, sums| unsafe { float_dots::<f16>(x, weight, cols, sums) },
    bf16_dots: |x, weight, cols, sums| unsafe { float_dots::<bf16>(x, weight, cols, sums) },
    f32_outer: |a, depth, b, strides, sums, width| unsafe { outer_sum::<f32>(a, depth, b, strides, sums, width) },
    f16_outer: |a, depth, b, strides, sums, width| unsafe { outer_sum::<f16>(a, depth, b, strides, sums, width) },
    pair_sums: |a, depth, b, strides, sums, width, lanes, next| unsafe {
        pair_sums::<i16>(a, depth, b, strides, sums, width, lanes, next)
    },
    byte_pair_sums: |a, depth, b, strides, sums, width, lanes, next| unsafe {
        pair_sums::<i8>(a, depth, b, strides, sums, width, lanes, next)
    },
    ..elementwise::KERNELS
};

#[target_feature(enable = "avx2")]
fn int8_dots(codes: &[i8], weight: &[i8], cols: usize, sums: &mut [i32]) {
    if codes.len() / cols < MANY_TOKENS {
        for_each_tile!(int8_tile::<2, 1>(codes, weight, cols, sums));
    } else {
        for_each_tile!(int8_tile::<2, 4>(codes, weight, cols, sums));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn token_outputs(token: &Token, weight: &[i8], with: &Finish, out: &mut [MaybeUninit<f32>]) {
    let row_sum = |codes: &[i8], weight: &[i8]| {
        let mut sum = [0];
        int8_tile::<1, 1>(codes, weight, codes.len(), &mut sum, 1);
        sum[0]
    };
    one_token::outputs(token, weight, with, out, 0, row_sum, |sums| *sums);
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
            prefetch_after(weight.as_ptr().wrapping_add(r * cols + col));
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

/// A float that 8 of are loaded, and widened where they are narrow, at a time.
trait Widen: Copy + Into<f32> {
    /// # Safety
    /// 8 values must be readable.
    unsafe fn load(values: *const Self) -> __m256;
}

impl Widen for f32 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(values: *const Self) -> __m256 {
        // SAFETY: the caller vouches for 8 values.
        unsafe { _mm256_loadu_ps(values) }
    }
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

#[target_feature(enable = "avx2,f16c")]
fn widen(values: &[f16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len());
    let (vectors, rest) = values.as_chunks::<8>();
    let (outs, rest_out) = out.as_chunks_mut::<8>();
    for (values, out) in vectors.iter().zip(outs) {
        // SAFETY: there are 8 values in both.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), f16::load(values.as_ptr())) };
    }
    rest_out.iter_mut().zip(rest).for_each(|(out, value)| *out = value.to_f32());
}

#[target_feature(enable = "avx2,f16c")]
fn narrow(values: &[f32], out: &mut [f16]) {
    assert_eq!(values.len(), out.len());
    let (least, most) = (_mm256_set1_ps(f16::MIN.to_f32()), _mm256_set1_ps(f16::MAX.to_f32()));
    let (vectors, rest) = values.as_chunks::<8>();
    let (outs, rest_out) = out.as_chunks_mut::<8>();
    for (values, out) in vectors.iter().zip(outs) {
        // SAFETY: there are 8 values in both, and f16 is 16 bits.
        unsafe {
            // Of a pair with NaN the second is taken.
            let finite = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(values.as_ptr())));
            let narrowed = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(finite);
            _mm_storeu_si128(out.as_mut_ptr().cast(), narrowed);
        }
    }
    portable::narrow(rest, rest_out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn float_dots<W: Widen>(x: &[f32], weight: &[W], cols: usize, sums: &mut [f32]) {
    if x.len() / cols < MANY_TOKENS {
        // Two rows, to hide the latency of a sum.
        for_each_tile!(float_tile::<2, 2, W>(x, weight, cols, sums));
    } else {
        for_each_tile!(float_tile::<2, 4, W>(x, weight, cols, sums));
    }
}

/// `sums[t * stride + r] = Σ x[t] * weight[r]` for T tokens and R weight rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn float_tile<const T: usize, const R: usize, W: Widen>(
    x: &[f32],
    weight: &[W],
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
            prefetch_after(weight.as_ptr().wrapping_add(r * cols + col));
            // SAFETY: as above.
            let weight = unsafe { W::load(weight.as_ptr().add(r * cols + col)) };
            for t in 0..T {
                acc[t][r] = _mm256_fmadd_ps(x[t], weight, acc[t][r]);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            let tail = float_tail(&x[t * cols..][whole..cols], &weight[r * cols..][whole..cols]);
            let acc = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
            let acc = _mm_add_ps(acc, _mm_movehl_ps(acc, acc));
            let acc = _mm_add_ss(acc, _mm_shuffle_ps::<0b01>(acc, acc));
            sums[t * stride + r] = _mm_cvtss_f32(acc) + tail;
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn outer_sum<W: Widen>(a: &[f32], depth: usize, b: &[W], strides: [usize; 2], sums: &mut [f32], width: usize) {
    let rows = sums.len() / width;
    let stride = a.len() / rows;
    for lane in (0..width).step_by(16) {
        let b = &b[lane / 16 * strides[1]..];
        let mut row = 0;
        while row < rows {
            let (a, sums) = (&a[row * stride..], &mut sums[row * width + lane..]);
            row += match rows - row {
                1 => outer_tile::<1, W>(a, stride, depth, b, strides[0], sums, width),
                2 | 3 => outer_tile::<2, W>(a, stride, depth, b, strides[0], sums, width),
                4 | 5 => outer_tile::<4, W>(a, stride, depth, b, strides[0], sums, width),
                _ => outer_tile::<6, W>(a, stride, depth, b, strides[0], sums, width),
            };
        }
    }
}

/// R rows by 16 lanes of [`OuterSum`](super::OuterSum); gives R.
#[target_feature(enable = "avx2,fma,f16c")]
fn outer_tile<const R: usize, W: Widen>(
    a: &[f32],
    stride: usize,
    depth: usize,
    b: &[W],
    step: usize,
    sums: &mut [f32],
    width: usize,
) -> usize {
    assert!(depth > 0 && a.len() >= (R - 1) * stride + depth && sums.len() >= (R - 1) * width + 16);
    assert!(b.len() >= (depth - 1) * step + 16);
    let mut acc: [[__m256; 2]; R] = std::array::from_fn(|r| {
        // SAFETY: 16 lanes of row r < R lie in the slice (asserted above).
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(sums.as_ptr().add(r * width + v * 8)) })
    });
    for k in 0..depth {
        // SAFETY: 16 lanes of b[k], and a[r, k], lie in the slices (asserted above).
        let vectors: [__m256; 2] = std::array::from_fn(|v| unsafe { W::load(b.as_ptr().add(k * step + v * 8)) });
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let a = _mm256_set1_ps(unsafe { *a.as_ptr().add(r * stride + k) });
            for (acc, vector) in acc.iter_mut().zip(vectors) {
                *acc = _mm256_fmadd_ps(a, vector, *acc);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(r * width + v * 8), acc) };
        }
    }
    R
}

/// A code of which 8 pairs are loaded, and widened where they are narrow, at a time.
trait WidenPairs: Copy {
    /// # Safety
    /// 8 pairs must be readable.
    unsafe fn load(pairs: *const [Self; 2]) -> __m256i;
}

impl WidenPairs for i16 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(pairs: *const Pair) -> __m256i {
        // SAFETY: the caller vouches for the memory.
        unsafe { _mm256_loadu_si256(pairs.cast()) }
    }
}

impl WidenPairs for i8 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(pairs: *const [i8; 2]) -> __m256i {
        // SAFETY: the caller vouches for the memory: 8 pairs of 8 bits.
        _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(pairs.cast()) })
    }
}

#[target_feature(enable = "avx2")]
#[expect(clippy::too_many_arguments)]
fn pair_sums<C: WidenPairs>(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    lanes: usize,
    next: &[Range<*const [C; 2]>],
) {
    let ahead = Ahead::new(b, next);
    let rows = sums.len() / width;
    let stride = a.len() / rows;
    let mut lane = 0;
    while lane < lanes {
        let b = &b[lane / 16 * strides[1]..];
        // Where lanes lie side by side one row takes many, as memory likes it best.
        if rows == 1 && strides[1] == 16 && lanes - lane >= 64 {
            pair_tile::<C, 1, 4>(a, stride, depth, b, strides, &mut sums[lane..], width, &ahead);
            lane += 64;
            continue;
        }
        let mut row = 0;
        while row < rows {
            let (a, sums) = (&a[row * stride..], &mut sums[row * width + lane..]);
            row += match rows - row {
                1 => pair_tile::<C, 1, 1>(a, stride, depth, b, strides, sums, width, &ahead),
                2 | 3 => pair_tile::<C, 2, 1>(a, stride, depth, b, strides, sums, width, &ahead),
                _ => pair_tile::<C, 4, 1>(a, stride, depth, b, strides, sums, width, &ahead),
            };
        }
        lane += 16;
    }
}

/// R rows by V times 16 lanes of [`PairSums`](super::PairSums); gives R.
#[target_feature(enable = "avx2")]
#[expect(clippy::too_many_arguments)]
fn pair_tile<C: WidenPairs, const R: usize, const V: usize>(
    a: &[Pair],
    stride: usize,
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    ahead: &Ahead<[C; 2]>,
) -> usize {
    assert!(depth > 0 && a.len() >= (R - 1) * stride + depth && sums.len() >= (R - 1) * width + V * 16);
    assert!(b.len() >= (depth - 1) * strides[0] + (V - 1) * strides[1] + 16);
    let mut acc = [[[_mm256_setzero_si256(); 2]; V]; R];
    for k in 0..depth {
        let vectors: [[__m256i; 2]; V] = std::array::from_fn(|v| {
            // SAFETY: V times 16 lanes of b[k] lie in the slice (asserted above).
            let place = unsafe { b.as_ptr().add(k * strides[0] + v * strides[1]) };
            // 16 lanes are a cache line or half of one.
            if R == 1 && ((k * V + v) * 16 * size_of::<[C; 2]>()).is_multiple_of(64) {
                ahead.prefetch(place, 64 / size_of::<[C; 2]>());
            }
            // SAFETY: as above.
            unsafe { [C::load(place), C::load(place.add(8))] }
        });
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: a[r, k] lies in the slice (asserted above); a pair is 32 bits.
            let a = _mm256_set1_epi32(unsafe { a.as_ptr().add(r * stride + k).cast::<i32>().read_unaligned() });
            for (acc, vector) in acc.as_flattened_mut().iter_mut().zip(vectors.as_flattened()) {
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(a, *vector));
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.as_flattened().iter().enumerate() {
            // SAFETY: the sums lie in the slice (asserted above).
            unsafe { _mm256_storeu_si256(sums.as_mut_ptr().add(r * width + v * 8).cast(), *acc) };
        }
    }
    R
}

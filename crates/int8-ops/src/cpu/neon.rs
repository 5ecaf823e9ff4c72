//! NEON with the dot-product extension: 16 products of codes, or 4 of floats, an instruction.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::mem::MaybeUninit;

use half::{bf16, f16};

use super::tiles::{float_tail, for_each_tile, int8_tail};
use super::{Finish, Kernels, Token, one_token, portable};

// SAFETY: the table is handed out only where `is_supported` has found the features that every kernel
// in it needs.
#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS: Kernels = Kernels {
    name: "neon-dotprod",
    is_supported: || is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod"),
    int8_dots: |tokens, weight, sums| unsafe { int8_dots(tokens.codes, weight, tokens.cols, sums) },
    token_outputs: |token, weight, with, out| unsafe { token_outputs(token, weight, with, out) },
    f32_dots: |x, weight, cols, sums| unsafe { float_dots::<f32>(x, weight, cols, sums) },
    f16_dots: |x, weight, cols, sums| unsafe { float_dots::<f16>(x, weight, cols, sums) },
    bf16_dots: |x, weight, cols, sums| unsafe { float_dots::<bf16>(x, weight, cols, sums) },
    // NEON itself belongs to every aarch64 target: the element-wise loops are vectorised as they are.
    ..portable::KERNELS
};

#[target_feature(enable = "neon,dotprod")]
fn int8_dots(codes: &[i8], weight: &[i8], cols: usize, sums: &mut [i32]) {
    for_each_tile!(int8_tile::<4, 4>(codes, weight, cols, sums));
}

#[target_feature(enable = "neon,dotprod")]
fn token_outputs(token: &Token, weight: &[i8], with: &Finish, out: &mut [MaybeUninit<f32>]) {
    one_token::outputs(token, weight, with, out, 0, |codes, weight| row_sum(codes, weight), |sums| *sums);
}

/// `Σ codes * weight` of one row.
#[target_feature(enable = "neon,dotprod")]
fn row_sum(codes: &[i8], weight: &[i8]) -> i32 {
    /// Sums side by side, which hide the latency of an addition.
    const SUMS: usize = 4;
    let mut acc = [vdupq_n_s32(0); SUMS];
    let (codes, rest_codes) = codes.as_chunks::<{ 16 * SUMS }>();
    let (weight, rest) = weight.as_chunks::<{ 16 * SUMS }>();
    for (codes, weight) in codes.iter().zip(weight) {
        for (u, acc) in acc.iter_mut().enumerate() {
            // SAFETY: both are slices of 16 * SUMS bytes.
            let (codes, weight) = unsafe { (vld1q_s8(codes[16 * u..].as_ptr()), vld1q_s8(weight[16 * u..].as_ptr())) };
            *acc = dot(*acc, codes, weight);
        }
    }
    let sum = vaddq_s32(vaddq_s32(acc[0], acc[1]), vaddq_s32(acc[2], acc[3]));
    vaddvq_s32(sum) + int8_tail(rest_codes, rest)
}

/// `sums[t * stride + r] = Σ codes[t] * weight[r]` for T tokens and R weight rows.
#[target_feature(enable = "neon,dotprod")]
fn int8_tile<const T: usize, const R: usize>(
    codes: &[i8],
    weight: &[i8],
    cols: usize,
    sums: &mut [i32],
    stride: usize,
) {
    assert!(codes.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let mut acc = [[vdupq_n_s32(0); R]; T];
    let whole = cols / 16 * 16;
    for col in (0..whole).step_by(16) {
        // SAFETY: rows t < T and r < R lie in the slices (asserted above), 16 columns in the row.
        let load = |values: &[i8], row: usize| unsafe { vld1q_s8(values.as_ptr().add(row * cols + col)) };
        let codes: [int8x16_t; T] = std::array::from_fn(|t| load(codes, t));
        for r in 0..R {
            let weight = load(weight, r);
            for t in 0..T {
                acc[t][r] = dot(acc[t][r], codes[t], weight);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            let tail = int8_tail(&codes[t * cols..][whole..cols], &weight[r * cols..][whole..cols]);
            sums[t * stride + r] = vaddvq_s32(acc) + tail;
        }
    }
}

/// `vdotq_s32`: adds four products of codes to each lane. The intrinsic is unstable as of Rust 1.95
/// (`stdarch_neon_dotprod`), hence the instruction itself.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut acc: int32x4_t, codes: int8x16_t, weight: int8x16_t) -> int32x4_t {
    // SAFETY: SDOT reads and writes no memory or flags, and the dotprod feature is enabled here.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {codes:v}.16b, {weight:v}.16b",
            acc = inout(vreg) acc,
            codes = in(vreg) codes,
            weight = in(vreg) weight,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// A float that 4 of are loaded, and widened where they are narrow, at a time.
trait Widen: Copy + Into<f32> {
    /// # Safety
    /// 4 values must be readable.
    unsafe fn load(values: *const Self) -> float32x4_t;
}

impl Widen for f32 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(values: *const Self) -> float32x4_t {
        // SAFETY: the caller vouches for 4 values.
        unsafe { vld1q_f32(values) }
    }
}

impl Widen for f16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(values: *const Self) -> float32x4_t {
        // SAFETY: the caller vouches for 4 values of 16 bits.
        let bits = unsafe { vld1_u16(values.cast()) };
        vcvt_f32_f16(vreinterpret_f16_u16(bits))
    }
}

impl Widen for bf16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(values: *const Self) -> float32x4_t {
        // SAFETY: the caller vouches for 4 values of 16 bits.
        let bits = unsafe { vld1_u16(values.cast()) };
        vreinterpretq_f32_u32(vshll_n_u16::<16>(bits))
    }
}

#[target_feature(enable = "neon")]
fn float_dots<W: Widen>(x: &[f32], weight: &[W], cols: usize, sums: &mut [f32]) {
    for_each_tile!(float_tile::<4, 4, W>(x, weight, cols, sums));
}

/// `sums[t * stride + r] = Σ x[t] * weight[r]` for T tokens and R weight rows.
#[target_feature(enable = "neon")]
fn float_tile<const T: usize, const R: usize, W: Widen>(
    x: &[f32],
    weight: &[W],
    cols: usize,
    sums: &mut [f32],
    stride: usize,
) {
    assert!(x.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
    let mut acc = [[vdupq_n_f32(0.0); R]; T];
    let whole = cols / 4 * 4;
    for col in (0..whole).step_by(4) {
        // SAFETY: rows t < T and r < R lie in the slices (asserted above), 4 columns in the row.
        let x: [float32x4_t; T] = std::array::from_fn(|t| unsafe { vld1q_f32(x.as_ptr().add(t * cols + col)) });
        for r in 0..R {
            // SAFETY: as above.
            let weight = unsafe { W::load(weight.as_ptr().add(r * cols + col)) };
            for t in 0..T {
                acc[t][r] = vfmaq_f32(acc[t][r], x[t], weight);
            }
        }
    }
    for (t, acc) in acc.into_iter().enumerate() {
        for (r, acc) in acc.into_iter().enumerate() {
            let tail = float_tail(&x[t * cols..][whole..cols], &weight[r * cols..][whole..cols]);
            sums[t * stride + r] = vaddvq_f32(acc) + tail;
        }
    }
}

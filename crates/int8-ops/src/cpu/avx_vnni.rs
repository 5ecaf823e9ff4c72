//! AVX-VNNI: AVX2 with 32 products of codes an instruction. AVX-512 has the same instruction in an
//! encoding of its own, which serves processors with AVX-512 that do not like its wide registers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::tiles::{MANY_TOKENS, for_each_tile, prefetch_after};
use super::{Finish, Kernels, Token, Tokens, avx2, one_token};

// SAFETY (of both): a table is handed out only where `is_supported` has found the features that every
// kernel in it needs.
#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS: Kernels = Kernels {
    name: "avx-vnni",
    is_supported: || (avx2::KERNELS.is_supported)() && is_x86_feature_detected!("avxvnni"),
    int8_dots: |tokens, weight, sums| unsafe { vex::int8_dots(tokens, weight, sums) },
    token_outputs: |token, weight, with, out| unsafe { vex::token_outputs(token, weight, with, out) },
    ..avx2::KERNELS
};

#[allow(clippy::undocumented_unsafe_blocks)]
pub(super) const KERNELS_OF_AVX512: Kernels = Kernels {
    name: "avx512-vnni-256",
    is_supported: || {
        (avx2::KERNELS.is_supported)() && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni")
    },
    int8_dots: |tokens, weight, sums| unsafe { evex::int8_dots(tokens, weight, sums) },
    token_outputs: |token, weight, with, out| unsafe { evex::token_outputs(token, weight, with, out) },
    ..avx2::KERNELS
};

/// The kernels with `vpdpbusd` in one encoding: the features it needs, and its intrinsic.
macro_rules! kernels {
    ($name:ident, $features:literal, $dot:ident) => {
        mod $name {
            use super::*;

            /// `vpdpbusd` multiplies unsigned by signed bytes, so the weight is read as `w + 128` (its
            /// sign bit flipped) and `128 * Σ codes` is taken off every sum.
            #[target_feature(enable = $features)]
            pub(super) fn int8_dots(tokens: &Tokens, weight: &[i8], sums: &mut [i32]) {
                let &Tokens { codes, cols, code_sums, .. } = tokens;
                if code_sums.len() < MANY_TOKENS {
                    for_each_tile!(int8_tile::<2, 1>(codes, weight, cols, sums));
                } else {
                    for_each_tile!(int8_tile::<2, 4>(codes, weight, cols, sums));
                }
                let rows = weight.len() / cols;
                for (sums, code_sum) in sums.chunks_mut(rows).zip(code_sums) {
                    sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(code_sum.wrapping_mul(128)));
                }
            }

            #[target_feature(enable = $features)]
            pub(super) fn token_outputs(token: &Token, weight: &[i8], with: &Finish, out: &mut [MaybeUninit<f32>]) {
                let row_sum = |codes: &[i8], weight: &[i8]| {
                    let mut sum = [0];
                    int8_tile::<1, 1>(codes, weight, codes.len(), &mut sum, 1);
                    sum[0]
                };
                let excess = token.code_sum.wrapping_mul(128);
                one_token::outputs(token, weight, with, out, excess, row_sum, |sums| *sums);
            }

            /// `sums[t * stride + r] = Σ codes[t] * (weight[r] + 128)` for T tokens and R weight rows.
            #[target_feature(enable = $features)]
            fn int8_tile<const T: usize, const R: usize>(
                codes: &[i8],
                weight: &[i8],
                cols: usize,
                sums: &mut [i32],
                stride: usize,
            ) {
                assert!(codes.len() >= T * cols && weight.len() >= R * cols && sums.len() >= (T - 1) * stride + R);
                let flip = _mm256_set1_epi8(i8::MIN);
                let mut acc = [[_mm256_setzero_si256(); R]; T];
                let whole = cols / 32 * 32;
                for col in (0..whole).step_by(32) {
                    // SAFETY: rows t < T and r < R lie in the slices (asserted above), 32 columns in the row.
                    let load = |values: &[i8], row: usize| unsafe {
                        _mm256_loadu_si256(values.as_ptr().add(row * cols + col).cast())
                    };
                    let codes: [__m256i; T] = std::array::from_fn(|t| load(codes, t));
                    for r in 0..R {
                        prefetch_after(weight.as_ptr().wrapping_add(r * cols + col));
                        let weight = _mm256_xor_si256(load(weight, r), flip);
                        for t in 0..T {
                            acc[t][r] = $dot(acc[t][r], weight, codes[t]);
                        }
                    }
                }
                for (t, acc) in acc.into_iter().enumerate() {
                    for (r, acc) in acc.into_iter().enumerate() {
                        let tail = codes[t * cols..][whole..cols].iter().zip(&weight[r * cols..][whole..cols]);
                        let tail: i32 = tail.map(|(&code, &weight)| i32::from(code) * (i32::from(weight) + 128)).sum();
                        sums[t * stride + r] = avx2::add_lanes(acc).wrapping_add(tail);
                    }
                }
            }
        }
    };
}

kernels!(vex, "avx2,avxvnni", _mm256_dpbusd_avx_epi32);
kernels!(evex, "avx2,avx512vl,avx512vnni", _mm256_dpbusd_epi32);

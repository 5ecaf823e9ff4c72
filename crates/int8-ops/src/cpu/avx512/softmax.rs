//! The softmax of a block of keys for 16 queries at a time: the steps of `portable`, in the same order, with what it
//! folds vector by vector folded for all of them together.

use std::arch::x86_64::*;

use crate::cpu::attention::CODE_NORM;
use crate::cpu::math::{self, EXP2_LEAST, EXP2_SERIES, ROUND};
use crate::cpu::portable::{inverse_norm, larger};
use crate::cpu::{BlockScales, KEYS_PER_BLOCK, LANES, Query};

/// Vectors of a block of keys.
const VECTORS: usize = KEYS_PER_BLOCK / LANES;

/// [`SoftmaxCodes`](crate::cpu::SoftmaxCodes).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn softmax_codes(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
) {
    if queries.len() == 1 {
        return of_group::<1>(sums, block, queries, weights, codes);
    }
    let groups = sums.chunks(LANES).zip(queries.chunks_mut(LANES));
    for ((sums, queries), (weights, codes)) in groups.zip(weights.chunks_mut(LANES).zip(codes.chunks_mut(LANES))) {
        of_group::<LANES>(sums, block, queries, weights, codes);
    }
}

/// The same for up to `MOST` queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn of_group<const MOST: usize>(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
) {
    // Most blocks lie before every query, and masks cost as much as what they are for.
    if queries.iter().all(|query| query.seen == KEYS_PER_BLOCK) {
        of_keys::<MOST>(sums, block, queries, weights, codes, |_, _| __mmask16::MAX);
    } else {
        of_keys::<MOST>(sums, block, queries, weights, codes, seen);
    }
}

/// The same for the keys of each vector that `seen` tells.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn of_keys<const MOST: usize>(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
    seen: impl Fn(&Query, usize) -> __mmask16,
) {
    let mut lanes = [_mm512_set1_ps(f32::NEG_INFINITY); MOST];
    // Written here, long before it is read as a vector: such a load waits for the single stores.
    let mut largest = [f32::NEG_INFINITY; MOST];
    largest.iter_mut().zip(&*queries).for_each(|(largest, query)| *largest = query.max);
    for (lanes, ((sums, query), weights)) in lanes.iter_mut().zip(sums.iter().zip(&*queries).zip(&mut *weights)) {
        let (scale, bias) = (_mm512_set1_ps(query.scale), _mm512_set1_ps(query.bias));
        for vector in 0..VECTORS {
            let bias = _mm512_add_ps(load(block.biases, vector), bias);
            let scale = _mm512_mul_ps(scale, load(block.keys, vector));
            // SAFETY: a vector is 16 of the 64 sums.
            let sums = unsafe { _mm512_loadu_si512(sums.as_ptr().add(vector * LANES).cast()) };
            let scores = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), bias);
            let scores = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), seen(query, vector), scores);
            *lanes = _mm512_max_ps(scores, *lanes);
            store(weights, vector, scores);
        }
    }
    let mut maxima = fold(&lanes, |a, b| _mm512_max_ps(a, b));
    maxima.iter_mut().zip(&largest).for_each(|(max, &largest)| *max = larger(*max, largest));
    let mut shrinks = largest;
    shrinks.iter_mut().zip(&maxima).for_each(|(shrink, max)| *shrink = math::exp2(*shrink - max));
    for (index, (query, weights)) in queries.iter_mut().zip(&mut *weights).enumerate() {
        let max = _mm512_set1_ps(maxima[index]);
        // SAFETY: 16 sums are a vector.
        let mut weight_sums = unsafe { _mm512_loadu_ps(query.sums.as_ptr()) };
        weight_sums = _mm512_mul_ps(weight_sums, _mm512_set1_ps(shrinks[index]));
        let mut squares = _mm512_setzero_ps();
        for vector in 0..VECTORS {
            let seen = seen(query, vector);
            let new = _mm512_maskz_mov_ps(seen, exp2(_mm512_sub_ps(load(weights, vector), max)));
            weight_sums = _mm512_add_ps(weight_sums, new);
            // The scale of a value that is not seen may be anything.
            let new = _mm512_maskz_mul_ps(seen, new, load(block.values, vector));
            squares = _mm512_add_ps(squares, _mm512_mul_ps(new, new));
            store(weights, vector, new);
        }
        lanes[index] = squares;
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(query.sums.as_mut_ptr(), weight_sums) };
    }
    let mut norms = fold(&lanes, |a, b| _mm512_add_ps(a, b));
    norms.iter_mut().for_each(|norm| *norm = norm.sqrt());
    let (mut inverses, mut code_scales) = (norms, norms);
    inverses.iter_mut().for_each(|inverse| *inverse = inverse_norm(*inverse));
    code_scales.iter_mut().for_each(|scale| *scale /= CODE_NORM);
    // The lower halves of the lanes of two vectors.
    let halves: [u16; 2 * LANES] = std::array::from_fn(|half| 2 * half as u16);
    // SAFETY: 32 numbers of 16 bits are a vector.
    let halves = unsafe { _mm512_loadu_epi16(halves.as_ptr().cast()) };
    for (index, ((query, weights), codes)) in queries.iter_mut().zip(weights).zip(codes).enumerate() {
        let inverse = _mm512_set1_ps(inverses[index]);
        let code = |vector| {
            let code = _mm512_add_ps(_mm512_mul_ps(load(weights, vector), inverse), _mm512_set1_ps(ROUND));
            _mm512_castps_si512(code)
        };
        for vector in (0..VECTORS).step_by(2) {
            let pair = _mm512_permutex2var_epi16(code(vector), halves, code(vector + 1));
            // SAFETY: 32 of the 64 codes.
            unsafe { _mm512_storeu_si512(codes.as_mut_ptr().add(vector * LANES).cast(), pair) };
        }
        (query.max, query.shrink, query.code_scale) = (maxima[index], shrinks[index], code_scales[index]);
    }
}

/// Which keys of a vector the query sees.
#[inline(always)]
fn seen(query: &Query, vector: usize) -> __mmask16 {
    let all = u64::MAX.checked_shr((KEYS_PER_BLOCK - query.seen) as u32).unwrap_or_default();
    (all >> (vector * LANES)) as __mmask16
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; KEYS_PER_BLOCK], vector: usize) -> __m512 {
    let values: &[f32; LANES] = &values.as_chunks().0[vector];
    // SAFETY: 16 values are a vector.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32; KEYS_PER_BLOCK], vector: usize, new: __m512) {
    let values: &mut [f32; LANES] = &mut values.as_chunks_mut().0[vector];
    // SAFETY: 16 values are a vector.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), new) };
}

/// [`math::exp2`] of every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    // NaN stays: of a pair with NaN the second is taken.
    let x = _mm512_max_ps(_mm512_set1_ps(EXP2_LEAST), x);
    let n = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(x);
    let r = _mm512_sub_ps(x, n);
    let [first, rest @ ..] = EXP2_SERIES;
    let step = |series, term| _mm512_add_ps(_mm512_mul_ps(series, r), _mm512_set1_ps(term));
    let power = step(rest.into_iter().fold(_mm512_set1_ps(first), step), 1.0);
    // Times a power of two, which is exact: the result is no subnormal.
    _mm512_scalef_ps(power, n)
}

/// Folds the lanes of up to 16 vectors to one value each, in the order of `portable::fold_lanes`.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold<const COUNT: usize>(vectors: &[__m512; COUNT], with: impl Fn(__m512, __m512) -> __m512) -> [f32; COUNT] {
    // Where there are fewer, what is made of the others is not used.
    let all: [__m512; LANES] = std::array::from_fn(|i| vectors[i % COUNT]);
    // Every quarter holds two lanes of two vectors, by turns.
    let pairs: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (all[2 * i], all[2 * i + 1]);
        with(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    });
    // One lane of four vectors.
    let fours: [__m512; 4] = std::array::from_fn(|i| {
        let (a, b) = (_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]));
        with(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    });
    let quarters = |a, b| with(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let folded = quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]));
    let mut out = [0f32; LANES];
    // SAFETY: 16 values are a vector.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), folded) };
    std::array::from_fn(|i| out[i])
}

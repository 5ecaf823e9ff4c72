//! The reference kernels: plain loops that run everywhere and that every instruction set is tested
//! against. The element-wise ones are inlined into the other tables and vectorised for them there.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Kernels;
use super::attention::{CODE_NORM, LARGEST, LARGEST_VALUE_CODE};
use super::math::{ROUND, erfc, exp, exp2};
use super::one_token;
use super::tiles::int8_tail;
pub(super) use super::{BlockScales, Bound, Finish, KEYS_PER_BLOCK, Pair, Query, RunningSoftmax, Token};
use crate::MAX_CODE;

pub(super) const KERNELS: Kernels = Kernels {
    name: "portable",
    is_supported: || true,
    absmax,
    flag_outliers,
    quantize,
    sum_codes,
    gather_columns,
    finish,
    token_outputs,
    softmax_block,
    int16_codes,
    softmax_codes,
    shrink_and_add,
    layer_norm,
    add,
    relu,
    gelu,
    gelu_erf,
    widen: |values, out| values.convert_to_f32_slice(out),
    narrow,
    pack_codes: |_codes, _cols| Vec::new(),
    int8_dots: |tokens, weight, sums| int8_dots(tokens.codes, weight, tokens.cols, sums),
    f32_dots: float_dots::<f32>,
    f16_dots: float_dots::<f16>,
    bf16_dots: float_dots::<bf16>,
    f32_outer: outer_sum::<f32>,
    f16_outer: outer_sum::<f16>,
    pair_sums: pair_sums::<i16>,
    byte_pair_sums: pair_sums::<i8>,
};

/// The bits of a magnitude: they order as the magnitudes do, and NaN comes after infinity.
#[inline(always)]
fn magnitude_bits(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

#[inline(always)]
pub(super) fn absmax(x: &[f32], threshold: Option<f32>) -> f32 {
    /// Maxima side by side: left to one, the compiler makes a chain of comparisons of it.
    const LANES: usize = 64;
    // Integer maxima are vectorised; float maxima with their NaN rules are not.
    let limit = threshold.map_or(u32::MAX, f32::to_bits);
    let keep = |x: &f32| {
        let bits = magnitude_bits(*x);
        if bits < limit { bits } else { 0 }
    };
    let mut lanes = [0u32; LANES];
    let (vectors, rest) = x.as_chunks::<LANES>();
    for x in vectors {
        lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane = keep(x).max(*lane));
    }
    let bits = rest.iter().map(keep).fold(0, u32::max);
    f32::from_bits(lanes.into_iter().fold(bits, u32::max))
}

#[inline(always)]
pub(super) fn flag_outliers(x: &[f32], threshold: f32, flags: &mut [u8]) {
    let limit = threshold.to_bits();
    for (flag, &x) in flags.iter_mut().zip(x) {
        *flag |= u8::from(magnitude_bits(x) >= limit);
    }
}

#[inline(always)]
pub(super) fn quantize(x: &[f32], inverse: f32, codes: &mut [i8]) {
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + ROUND).to_bits() as i8;
    }
}

#[inline(always)]
pub(super) fn sum_codes(codes: &[i8]) -> i32 {
    codes.iter().map(|&code| i32::from(code)).sum()
}

#[inline(always)]
pub(super) fn gather_columns(weight: &[i8], cols: usize, columns: &[u32], gathered: &mut [f32]) {
    const ROWS: usize = 16;
    let rows = weight.len() / cols;
    assert!(columns.iter().all(|&column| (column as usize) < cols) && gathered.len() >= columns.len() * rows);
    // SAFETY: there is such a row, and such a column (asserted above).
    let code = |row: usize, column: u32| unsafe { *weight.get_unchecked(row * cols + column as usize) };
    let whole = rows / ROWS * ROWS;
    for row in (0..whole).step_by(ROWS) {
        for (index, &column) in columns.iter().enumerate() {
            // As bytes first, which are widened all at once.
            let codes: [i8; ROWS] = std::array::from_fn(|lane| code(row + lane, column));
            gathered[index * rows + row..][..ROWS].copy_from_slice(&codes.map(f32::from));
        }
    }
    for row in whole..rows {
        for (index, &column) in columns.iter().enumerate() {
            gathered[index * rows + row] = f32::from(code(row, column));
        }
    }
}

#[inline(always)]
pub(super) fn finish(sums: &[i32], outlier_weights: &[f32], with: &Finish, out: &mut [MaybeUninit<f32>]) {
    let mut row = 0;
    while row < out.len() {
        // Sums that stay in registers from one outlier column to the next.
        row += match out.len() - row {
            64.. => finish_rows::<64>(row, sums, outlier_weights, with, out),
            16.. => finish_rows::<16>(row, sums, outlier_weights, with, out),
            4.. => finish_rows::<4>(row, sums, outlier_weights, with, out),
            _ => finish_rows::<1>(row, sums, outlier_weights, with, out),
        };
    }
}

/// N rows from `row` on; gives N.
#[inline(always)]
fn finish_rows<const N: usize>(
    row: usize,
    sums: &[i32],
    outlier_weights: &[f32],
    with: &Finish,
    out: &mut [MaybeUninit<f32>],
) -> usize {
    let rows = out.len();
    let mut values = [0f32; N];
    for (value, weights) in with.outliers.iter().zip(outlier_weights.chunks_exact(rows)) {
        values.iter_mut().zip(&weights[row..row + N]).for_each(|(out, weight)| *out += value * weight);
    }
    scale_and_add_bias(&mut values, row, &sums[row..row + N], with);
    out[row..row + N].write_copy_of_slice(&values);
    N
}

/// Sums over outlier columns, of rows from `row` on, become outputs.
#[inline(always)]
pub(super) fn scale_and_add_bias(values: &mut [f32], row: usize, sums: &[i32], with: &Finish) {
    let sums = sums.iter().zip(&with.weight_scales[row..][..values.len()]);
    for (value, (&sum, scale)) in values.iter_mut().zip(sums) {
        *value = scale * (sum as f32 * with.x_scale + *value);
    }
    if let Some(bias) = with.bias {
        let bias = &bias[row..][..values.len()];
        values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

fn token_outputs(token: &Token, weight: &[i8], with: &Finish, out: &mut [MaybeUninit<f32>]) {
    one_token::outputs(token, weight, with, out, 0, int8_tail, |sums| *sums);
}

#[inline(always)]
pub(super) fn softmax_block(
    scores: &mut [f32],
    seen: usize,
    slope: f32,
    first_key: usize,
    softmax: &mut RunningSoftmax,
) -> f32 {
    // Few plain loops, each of which the compiler makes vectors of; with a condition in them it does not.
    for (key, score) in (first_key as u32..).zip(scores.iter_mut()) {
        *score += slope * key as f32;
    }
    scores[seen..].fill(f32::NEG_INFINITY);
    let (groups, _) = scores.as_chunks_mut::<LANES>();
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for scores in groups.iter() {
        maxima.iter_mut().zip(scores).for_each(|(max, &score)| *max = larger(score, *max));
    }
    let max = larger(fold_lanes(maxima, larger), softmax.max);
    for scores in groups.iter_mut() {
        scores.iter_mut().for_each(|score| *score = exp(*score - max));
    }
    scores[seen..].fill(0.0);
    let (groups, _) = scores.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for weights in groups {
        sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
    }
    let shrink = exp(softmax.max - max);
    *softmax = RunningSoftmax { max, sum: softmax.sum * shrink + fold_lanes(sums, |a, b| a + b) };
    shrink
}

#[inline(always)]
pub(super) fn int16_codes(x: &[f32], bound: Bound, codes: &mut [i16]) -> f32 {
    // NaN stays NaN.
    let within = |x: f32| {
        let x = if x > LARGEST { LARGEST } else { x };
        if x < -LARGEST { -LARGEST } else { x }
    };
    let (size, code) = match bound {
        Bound::Norm => (squares(x, within).sqrt(), CODE_NORM),
        Bound::Magnitude => (within(absmax(x, None)), LARGEST_VALUE_CODE),
        Bound::Byte => (within(absmax(x, None)), MAX_CODE),
    };
    let inverse = if size < f32::MIN_POSITIVE { 0.0 } else { code / size };
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (within(x) * inverse + ROUND).to_bits() as i16;
    }
    size / code
}

/// The sum of squares of `within(x)`.
#[inline(always)]
fn squares(x: &[f32], within: impl Fn(f32) -> f32) -> f32 {
    let (groups, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for group in groups {
        lanes.iter_mut().zip(group).for_each(|(lane, &x)| *lane += within(x) * within(x));
    }
    let rest: f32 = rest.iter().map(|&x| within(x) * within(x)).sum();
    fold_lanes(whole(lanes), |a, b| a + b) + rest
}

/// The same lanes. Where the compiler sees what they are made of, it makes them two by two instead of all at once.
#[inline(always)]
fn whole(lanes: [f32; LANES]) -> [f32; LANES] {
    std::hint::black_box(lanes)
}

#[inline(always)]
pub(super) fn softmax_codes(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
) {
    if queries.len() == 1 {
        return softmax_codes_of_group::<1>(sums, block, queries, weights, codes);
    }
    // The steps of one query wait for each other, those of several do not; and what there is one of for each
    // query is worked on as a vector.
    let groups = sums.chunks(LANES).zip(queries.chunks_mut(LANES));
    for ((sums, queries), (weights, codes)) in groups.zip(weights.chunks_mut(LANES).zip(codes.chunks_mut(LANES))) {
        softmax_codes_of_group::<LANES>(sums, block, queries, weights, codes);
    }
}

/// The same for up to `MOST` queries.
#[inline(always)]
fn softmax_codes_of_group<const MOST: usize>(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
) {
    let [mut shrinks, mut maxima, mut norms] = [[0f32; MOST]; 3];
    for (index, ((sums, query), weights)) in sums.iter().zip(&*queries).zip(&mut *weights).enumerate() {
        for key in 0..KEYS_PER_BLOCK {
            let bias = block.biases[key] + query.bias;
            weights[key] = sums[key] as f32 * (query.scale * block.keys[key]) + bias;
        }
        if query.seen < KEYS_PER_BLOCK {
            weights[query.seen..].fill(f32::NEG_INFINITY);
        }
        maxima[index] = larger(max_of(weights), query.max);
        shrinks[index] = query.max;
    }
    shrinks.iter_mut().zip(&maxima).for_each(|(shrink, max)| *shrink = exp2(*shrink - max));
    for (index, (query, weights)) in queries.iter_mut().zip(&mut *weights).enumerate() {
        let max = maxima[index];
        weights.iter_mut().for_each(|weight| *weight = exp2(*weight - max));
        if query.seen < KEYS_PER_BLOCK {
            weights[query.seen..].fill(0.0);
        }
        query.sums.iter_mut().for_each(|sum| *sum *= shrinks[index]);
        for weights in weights.as_chunks::<LANES>().0 {
            query.sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight);
        }
        weights.iter_mut().zip(block.values).for_each(|(weight, scale)| *weight *= scale);
        if query.seen < KEYS_PER_BLOCK {
            // The scale of a value that is not seen may be anything.
            weights[query.seen..].fill(0.0);
        }
        norms[index] = squares(weights, |weight| weight);
    }
    let norms = norms.map(f32::sqrt);
    let inverses = norms.map(inverse_norm);
    for (index, ((query, weights), codes)) in queries.iter_mut().zip(weights).zip(codes).enumerate() {
        let inverse = inverses[index];
        for (code, weight) in codes.iter_mut().zip(weights) {
            *code = (*weight * inverse + ROUND).to_bits() as i16;
        }
        (query.max, query.shrink, query.code_scale) = (maxima[index], shrinks[index], norms[index] / CODE_NORM);
    }
}

/// What turns weights of a norm into codes.
#[inline(always)]
pub(super) fn inverse_norm(norm: f32) -> f32 {
    // Below it squares underflow: no weight is more than nothing.
    if norm < 1e-15 { 0.0 } else { CODE_NORM / norm }
}

#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn max_of(values: &[f32; KEYS_PER_BLOCK]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for group in values.as_chunks::<LANES>().0 {
        lanes.iter_mut().zip(group).for_each(|(lane, &value)| *lane = larger(value, *lane));
    }
    fold_lanes(whole(lanes), larger)
}

#[inline(always)]
pub(super) fn shrink_and_add(context: &mut [f32], shrink: f32, sums: &[i32], scale: f32) {
    context.iter_mut().zip(sums).for_each(|(value, &sum)| *value = *value * shrink + sum as f32 * scale);
}

/// All lanes in one: those of each quarter, which is what instructions put side by side, and then the quarters. As few
/// steps as can be, as each waits for the one before.
#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], with: impl Fn(f32, f32) -> f32) -> f32 {
    let quarters: [f32; 4] = std::array::from_fn(|quarter| {
        let [l0, l1, l2, l3] = [0, 1, 2, 3].map(|lane| lanes[4 * quarter + lane]);
        with(with(l0, l2), with(l1, l3))
    });
    with(with(quarters[0], quarters[1]), with(quarters[2], quarters[3]))
}

/// Partial sums, so that loops are vectorised and long rows lose little to rounding.
const LANES: usize = 16;

/// `Σ term(x)`.
#[inline(always)]
fn sum_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let vectors = x.chunks_exact(LANES);
    let rest: f32 = vectors.remainder().iter().map(|&x| term(x)).sum();
    for x in vectors {
        for lane in 0..LANES {
            sums[lane] += term(x[lane]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[inline(always)]
pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len() as f32;
    let mean = sum_of(x, |x| x) / len;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / len;
    let inverse = 1.0 / (variance + eps).sqrt();
    for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * inverse * weight + bias;
    }
}

#[inline(always)]
pub(super) fn add(x: &mut [f32], other: &[f32]) {
    x.iter_mut().zip(other).for_each(|(x, other)| *x += other);
}

#[inline(always)]
pub(super) fn relu(x: &mut [f32]) {
    // NaN stays NaN.
    x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
}

#[inline(always)]
pub(super) fn gelu(x: &mut [f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    for x in x {
        // (1 + tanh(u)) / 2 is 1 / (1 + e^-2u).
        let inner = SQRT_2_OVER_PI * *x * (1.0 + 0.044715 * *x * *x);
        *x /= 1.0 + exp(-2.0 * inner);
    }
}

#[inline(always)]
pub(super) fn gelu_erf(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x *= 0.5 * erfc(-*x * std::f32::consts::FRAC_1_SQRT_2));
}

pub(super) fn narrow(values: &[f32], out: &mut [f16]) {
    out.convert_from_f32_slice(values);
    for value in out.iter_mut().filter(|value| value.is_infinite()) {
        *value = f16::MAX.copysign(*value);
    }
}

fn int8_dots(codes: &[i8], weight: &[i8], cols: usize, sums: &mut [i32]) {
    let rows = weight.len() / cols;
    for (codes, sums) in codes.chunks(cols).zip(sums.chunks_mut(rows)) {
        for (weight, sum) in weight.chunks(cols).zip(sums) {
            *sum = codes.iter().zip(weight).map(|(&code, &weight)| i32::from(code) * i32::from(weight)).sum();
        }
    }
}

fn float_dots<T: Copy + Into<f32>>(x: &[f32], weight: &[T], cols: usize, sums: &mut [f32]) {
    let rows = weight.len() / cols;
    for (x, sums) in x.chunks(cols).zip(sums.chunks_mut(rows)) {
        for (weight, sum) in weight.chunks(cols).zip(sums) {
            let mut lanes = [0f32; LANES];
            for (x, weight) in x.chunks(LANES).zip(weight.chunks(LANES)) {
                for ((lane, &x), &weight) in lanes.iter_mut().zip(x).zip(weight) {
                    *lane += x * weight.into();
                }
            }
            *sum = lanes.iter().sum();
        }
    }
}

#[expect(clippy::too_many_arguments)]
fn pair_sums<C: Copy + Into<i32>>(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    lanes: usize,
    _next: &[Range<*const [C; 2]>],
) {
    let rows = sums.len() / width;
    for (a, sums) in a.chunks(a.len() / rows).zip(sums.chunks_mut(width)) {
        for (group, sums) in sums[..lanes].chunks_exact_mut(LANES).enumerate() {
            sums.fill(0);
            for (index, &[first, second]) in a[..depth].iter().enumerate() {
                let b = &b[index * strides[0] + group * strides[1]..][..LANES];
                for (sum, &[b_first, b_second]) in sums.iter_mut().zip(b) {
                    let product = i32::from(first) * b_first.into();
                    *sum = sum.wrapping_add(product.wrapping_add(i32::from(second) * b_second.into()));
                }
            }
        }
    }
}

fn outer_sum<T: Copy + Into<f32>>(
    a: &[f32],
    depth: usize,
    b: &[T],
    strides: [usize; 2],
    sums: &mut [f32],
    width: usize,
) {
    let rows = sums.len() / width;
    for (a, sums) in a.chunks(a.len() / rows).zip(sums.chunks_mut(width)) {
        for (group, sums) in sums.chunks_exact_mut(LANES).enumerate() {
            for (index, a) in a[..depth].iter().enumerate() {
                let b = &b[index * strides[0] + group * strides[1]..][..LANES];
                sums.iter_mut().zip(b).for_each(|(sum, &b)| *sum += a * b.into());
            }
        }
    }
}

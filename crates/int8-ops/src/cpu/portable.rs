//! The reference kernels: plain loops that run everywhere and that every instruction set is tested
//! against. The element-wise ones are inlined into the other tables and vectorised for them there.

use half::{bf16, f16};

use super::Kernels;

pub(super) const KERNELS: Kernels = Kernels {
    name: "portable",
    is_supported: || true,
    absmax,
    flag_outliers,
    quantize,
    int8_dots,
    f16_dots: half_dots::<f16>,
    bf16_dots: half_dots::<bf16>,
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
    let bits = lanes.into_iter().chain(rest.iter().map(keep)).fold(0, u32::max);
    f32::from_bits(bits)
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
    /// 1.5 * 2^23: what is added to it is rounded to a whole number, half to even, in the lowest bits
    /// of the sum. Other ways to an integer mind what lies beyond its range, value by value.
    const WHOLE: f32 = 12_582_912.0;
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + WHOLE).to_bits() as i8;
    }
}

fn int8_dots(codes: &[i8], _code_sums: &[i32], weight: &[i8], cols: usize, sums: &mut [i32]) {
    let rows = weight.len() / cols;
    for (codes, sums) in codes.chunks(cols).zip(sums.chunks_mut(rows)) {
        for (weight, sum) in weight.chunks(cols).zip(sums) {
            *sum = codes.iter().zip(weight).map(|(&code, &weight)| i32::from(code) * i32::from(weight)).sum();
        }
    }
}

fn half_dots<T: Copy + Into<f32>>(x: &[f32], weight: &[T], cols: usize, sums: &mut [f32]) {
    /// Partial sums, so that a long row loses no more to rounding than on a vector unit.
    const LANES: usize = 16;
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

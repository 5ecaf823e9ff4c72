//! Elementary functions in f32, written so that a loop over them is vectorised; the same bits on every
//! instruction set.

/// 1.5 * 2^23: what is added to it is rounded to a whole number, half to even, in the lowest bits of the
/// sum. Other ways to an integer mind what lies beyond its range, value by value.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `e^x` to 2 units in the last place, for x from -87 to 88; beyond, that of the nearer end. NaN stays NaN.
///
/// `x = n ln 2 + r` with |r| <= ln 2 / 2; `e^r` by its Taylor series, whose seventh power is below half a
/// unit in the last place there.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// ln 2 in two parts, the first with zeros at its end: its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // Not `clamp`, `min` or `max`, whose ways with NaN are not those of vector instructions.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let series = 1.0 / 720.0 * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let power = series * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    power * f32::from_bits(exponent)
}

/// The factors of [`exp2`]'s polynomial, that of the highest power first; the last is near ln 2, and better than it
/// where the series ends.
#[allow(clippy::approx_constant)]
pub(super) const EXP2_SERIES: [f32; 5] = [0.001_326_472_6, 0.009_671_513, 0.055_507_34, 0.240_222_42, 0.693_147];

/// Below it [`exp2`] is that of it.
pub(super) const EXP2_LEAST: f32 = -125.0;

/// `2^x` to 2e-7 of its value, for x from -125 to 125; below, that of -125. NaN stays NaN.
///
/// `x = n + r` with |r| <= 1/2; `2^r` by the polynomial of degree 5 whose largest relative error there is least.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let x = if x < EXP2_LEAST { EXP2_LEAST } else { x };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let [first, rest @ ..] = EXP2_SERIES;
    let power = rest.into_iter().fold(first, |series, term| series * r + term) * r + 1.0;
    // Not added to the bits of the power, which would make a number of NaN.
    power * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

/// The error function's complement `1 - erf(x)`, to 2e-6 of its value (W. H. Press et al., Numerical
/// Recipes, 2nd edition, section 6.2: `erfcc`).
#[inline(always)]
pub(super) fn erfc(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 10] = [
        0.170_872_77,
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ];
    let magnitude = x.abs();
    let t = 1.0 / (1.0 + 0.5 * magnitude);
    let series = COEFFICIENTS.iter().fold(0.0, |sum, coefficient| sum * t + coefficient);
    let tail = t * exp(-magnitude * magnitude + series);
    if x >= 0.0 { tail } else { 2.0 - tail }
}

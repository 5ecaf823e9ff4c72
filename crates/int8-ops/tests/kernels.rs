//! Every instruction set this machine has, against plain loops over odd sizes and odd values.

use std::mem::MaybeUninit;

use half::{bf16, f16};
use int8_ops::cpu::{BlockScales, Bound, Finish, Kernels, Query, RunningSoftmax, Token, Tokens};
use proptest::prelude::*;

/// Sizes around every vector width: 1, primes, a multiple of 64 and its neighbours; and around the blocks of
/// columns that kernels work on.
fn cols() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 1..70usize,
        6 => prop_oneof![Just(127), Just(128), Just(129), Just(251), Just(320), Just(1021)],
        1 => prop_oneof![Just(1024), Just(1027), Just(2048), Just(2051), Just(2561), Just(5121)],
    ]
}

/// Floats of every kind that may reach a layer, the awkward ones often.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -8f32..8.0,
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(6.0), Just(-6.0), Just(5.9999995), Just(1e30), Just(-1e30)],
        1 => prop_oneof![Just(1e-40), Just(-3e-42), Just(f32::MIN_POSITIVE), Just(f32::from_bits(1)), Just(f32::MAX)],
    ]
}

/// Codes from `low` on, the extremes often.
fn codes(low: i8, len: usize) -> impl Strategy<Value = Vec<i8>> {
    prop::collection::vec(prop_oneof![4 => low..=127, 1 => Just(127i8), 1 => Just(low)], len)
}

/// Columns, codes of activations, and a weight, which a checkpoint may have stored with -128 in it.
fn int8_case() -> impl Strategy<Value = (usize, Vec<i8>, Vec<i8>)> {
    (1..26usize, prop_oneof![4 => 1..10usize, 1 => 60..70usize], cols())
        .prop_flat_map(|(tokens, rows, cols)| (Just(cols), codes(-127, tokens * cols), codes(-128, rows * cols)))
}

fn float_case() -> impl Strategy<Value = (usize, Vec<f32>, Vec<f32>)> {
    let values = |len| prop::collection::vec(-4f32..4.0, len);
    (1..10usize, 1..10usize, cols())
        .prop_flat_map(move |(tokens, rows, cols)| (Just(cols), values(tokens * cols), values(rows * cols)))
}

fn code_sums(codes: &[i8], cols: usize) -> Vec<i32> {
    codes.chunks(cols).map(|codes| codes.iter().map(|&code| i32::from(code)).sum()).collect()
}

fn int8_dots(kernels: &Kernels, codes: &[i8], cols: usize, weight: &[i8], sums: &mut [i32]) {
    let packed = &(kernels.pack_codes)(codes, cols);
    (kernels.int8_dots)(&Tokens { codes, cols, packed, code_sums: &code_sums(codes, cols) }, weight, sums);
}

/// Of few tokens: blocks of columns, one or several, and rows around those that share a block. Large and small in
/// turns, so that what is left of one would show in the next.
#[test]
fn integer_sums_of_few_tokens_equal_a_plain_loop_around_every_block() {
    let random = |len: usize, seed: usize| {
        (0..len).map(move |i| ((i * 7919 + seed) * 31 % 255) as i8).map(|code| code.max(-127))
    };
    for tokens in 1..12 {
        for (rows, cols) in [(35, 5185), (1, 2560), (17, 2561), (2, 63), (16, 5121), (3, 2624), (15, 7700), (9, 64)] {
            let codes: Vec<i8> = random(tokens * cols, rows).collect();
            let weight: Vec<i8> = random(rows * cols, tokens + 5).collect();
            let dot = |x: &[i8], w: &[i8]| x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum::<i32>();
            let wanted: Vec<i32> = codes
                .chunks(cols)
                .flat_map(|codes| weight.chunks(cols).map(move |weight| dot(codes, weight)))
                .collect();
            for kernels in Kernels::available() {
                let mut sums = vec![i32::MIN; wanted.len()];
                int8_dots(kernels, &codes, cols, &weight, &mut sums);
                assert_eq!(sums, wanted, "{}: {tokens} tokens, ({rows}, {cols})", kernels.name);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn integer_sums_equal_a_plain_loop((cols, codes, weight) in int8_case()) {
        let wanted: Vec<i32> = codes.chunks(cols).flat_map(|codes| weight.chunks(cols).map(move |weight| {
            codes.iter().zip(weight).map(|(&code, &weight)| i32::from(code) * i32::from(weight)).sum()
        })).collect();
        for kernels in Kernels::available() {
            let mut sums = vec![i32::MIN; wanted.len()];
            int8_dots(kernels, &codes, cols, &weight, &mut sums);
            prop_assert_eq!(&sums, &wanted, "{}", kernels.name);
        }
    }

    #[test]
    fn elementwise_kernels_equal_a_plain_loop(
        x in prop::collection::vec(value(), 1..200),
        threshold in prop::option::of(prop_oneof![Just(6.0f32), 1e-41f32..1e31]),
    ) {
        let below = |v: &f32| threshold.is_none_or(|threshold| v.abs() < threshold);
        let absmax = x.iter().filter(|v| below(v)).fold(0f32, |max, v| max.max(v.abs()));
        let flags: Vec<u8> = x.iter().map(|v| u8::from(!below(v))).collect();
        let inverse = if absmax > 1e-36 { 127.0 / absmax } else { 1.0 };
        let kept: Vec<f32> = x.iter().map(|v| if v.abs() <= absmax { *v } else { 0.0 }).collect();
        let codes: Vec<i8> = kept.iter().map(|v| (v * inverse).round_ties_even() as i8).collect();
        for kernels in Kernels::available() {
            prop_assert_eq!((kernels.absmax)(&x, threshold).to_bits(), absmax.to_bits(), "{}", kernels.name);
            let mut found = vec![0u8; x.len()];
            (kernels.flag_outliers)(&x, threshold.unwrap_or(f32::INFINITY), &mut found);
            prop_assert_eq!(&found, &flags, "{}", kernels.name);
            let mut found = vec![1i8; x.len()];
            (kernels.quantize)(&kept, inverse, &mut found);
            prop_assert_eq!(&found, &codes, "{}", kernels.name);
        }
    }

    #[test]
    fn sums_of_pairs_are_exact(
        (rows, depth, vectors) in (1..14usize, 1..70usize, 1..11usize),
        codes in prop::collection::vec(-32_767i16..=32_767, 7919),
        spare in 0..2usize,
        are_apart in prop::bool::ANY,
    ) {
        let (width, lanes) = (16 * (vectors + spare), 16 * vectors);
        let strides = if are_apart { [16, 16 * depth] } else { [width, 16] };
        let pairs = |skip: usize, count: usize| (0..count).map(|i| [0, 1].map(|part| codes[(skip + 2 * i + part) % codes.len()])).collect::<Vec<_>>();
        let (a, b) = (pairs(0, rows * (depth + spare)), pairs(17, depth * width));
        let bytes: Vec<[i8; 2]> = b.iter().map(|pair| pair.map(|code| code as i8)).collect();
        for kernels in Kernels::available() {
            let (mut sums, mut byte_sums) = (vec![7i32; rows * width], vec![7i32; rows * width]);
            (kernels.pair_sums)(&a, depth, &b, strides, &mut sums, width, lanes, &[a.as_ptr_range()]);
            (kernels.byte_pair_sums)(&a, depth, &bytes, strides, &mut byte_sums, width, lanes, &[bytes.as_ptr_range()]);
            for index in (0..sums.len()).filter(|index| index % width < lanes) {
                let (row, lane) = (index / width, index % width);
                let wanted = |b: &dyn Fn(usize) -> [i64; 2]| {
                    let products = (0..depth).flat_map(|k| {
                        let a = a[row * (depth + spare) + k];
                        let b = b(k * strides[0] + lane / 16 * strides[1] + lane % 16);
                        [0, 1].map(|part| i64::from(a[part]) * b[part])
                    });
                    products.sum::<i64>() as i32
                };
                prop_assert_eq!(sums[index], wanted(&|at| b[at].map(i64::from)), "{}", kernels.name);
                prop_assert_eq!(byte_sums[index], wanted(&|at| bytes[at].map(i64::from)), "{}", kernels.name);
            }
        }
    }

    #[test]
    fn codes_of_keys_and_values_are_within_their_bound_and_the_same_everywhere(
        x in prop::collection::vec(-40f32..40.0, 1..200),
        size in prop_oneof![Just(1f32), Just(1e-15), Just(1e4), Just(1e30)],
    ) {
        let x: Vec<f32> = x.iter().map(|x| x * size).collect();
        let kept: Vec<f64> = x.iter().map(|&x| f64::from(x.clamp(-16_777_216.0, 16_777_216.0))).collect();
        for bound in [Bound::Norm, Bound::Magnitude, Bound::Byte] {
            let norm = kept.iter().map(|x| x * x).sum::<f64>().sqrt();
            let absmax = kept.iter().fold(0f64, |max, x| max.max(x.abs()));
            let scale = match bound {
                Bound::Norm => norm / 32_767.0,
                Bound::Magnitude => absmax / 8_191.0,
                Bound::Byte => absmax / 127.0,
            };
            let mut wanted = None;
            for kernels in Kernels::available() {
                let mut codes = vec![1i16; x.len()];
                let found = (kernels.int16_codes)(&x, bound, &mut codes);
                prop_assert!((f64::from(found) / scale - 1.0).abs() < 1e-5, "{}: {found} for {scale}", kernels.name);
                for (&code, x) in codes.iter().zip(&kept) {
                    prop_assert!((f64::from(code) - x / scale).abs() < 0.51, "{}: {code}", kernels.name);
                    prop_assert!(bound != Bound::Byte || code.abs() <= 127, "{}: {code}", kernels.name);
                }
                prop_assert_eq!(&codes, wanted.get_or_insert_with(|| codes.clone()), "{}", kernels.name);
            }
        }
    }

    #[test]
    fn a_softmax_of_integer_sums_has_the_same_bits_everywhere(
        count in 1..40usize,
        scores in prop::collection::vec(-30_000i32..30_000, 40 * 64),
        scales in prop::collection::vec(1e-6f32..1e-3, 128),
        (slope, scale) in (-1f32..1.0, prop_oneof![Just(1f32), Just(1e-20), Just(1e6), Just(f32::NAN)]),
        seen in prop_oneof![prop::collection::vec(0..=64usize, 40), Just(vec![64; 40])],
    ) {
        let sums: Vec<[i32; 64]> = scores[..64 * count].as_chunks().0.to_vec();
        let scales: [[f32; 64]; 2] = [scales[..64].try_into().unwrap(), scales[64..].try_into().unwrap()];
        let biases = std::array::from_fn(|key| slope * key as f32);
        let block = BlockScales { keys: &scales[0], values: &scales[1], biases: &biases };
        let query = |index: usize| Query {
            scale: scale * (index + 1) as f32,
            negligible: -30.0,
            max: if index.is_multiple_of(3) { f32::NEG_INFINITY } else { index as f32 },
            sums: std::array::from_fn(|lane| (index * lane) as f32),
            bias: slope * index as f32,
            seen: seen[index],
            shrink: 7.0,
            code_scale: 7.0,
        };
        let mut wanted = None;
        for kernels in Kernels::available() {
            let mut queries: Vec<Query> = (0..count).map(query).collect();
            let (mut weights, mut codes) = (vec![[7f32; 64]; count], vec![[7i16; 64]; count]);
            (kernels.softmax_codes)(&sums, &block, &mut queries, &mut weights, &mut codes);
            for (codes, query) in codes.iter().zip(&queries) {
                prop_assert!(codes[query.seen..].iter().all(|&code| code == 0), "{}", kernels.name);
            }
            let of = |query: &Query| {
                [query.max, query.shrink, query.code_scale].into_iter().chain(query.sums).collect::<Vec<_>>()
            };
            // NaN is NaN, whatever its bits.
            let bits = |value: f32| if value.is_nan() { u32::MAX } else { value.to_bits() };
            let found: Vec<u32> = queries.iter().flat_map(of).map(bits).collect();
            let is_nan = scale.is_nan();
            let found = (found, if is_nan { Vec::new() } else { codes });
            prop_assert_eq!(&found, wanted.get_or_insert_with(|| found.clone()), "{}", kernels.name);
        }
    }

    #[test]
    fn what_follows_the_sums_has_the_same_bits_everywhere(
        (cols, codes, weight) in int8_case(),
        values in prop::collection::vec(-40f32..40.0, 70),
        columns in prop::collection::vec(0..4173u32, 0..5),
    ) {
        let rows = weight.len() / cols;
        let columns: Vec<u32> = columns.into_iter().map(|column| column % cols as u32).collect();
        let plain: Vec<f32> =
            columns.iter().flat_map(|&column| weight.chunks(cols).map(move |row| f32::from(row[column as usize]))).collect();
        let codes = &codes[..cols];
        let token = Token { codes, code_sum: code_sums(codes, cols)[0], outlier_columns: &columns };
        let product = |(code, weight): (&i8, &i8)| i32::from(*code) * i32::from(*weight);
        let sums: Vec<i32> = weight.chunks(cols).map(|row| codes.iter().zip(row).map(product).sum()).collect();
        let finish = Finish {
            x_scale: 0.01,
            outliers: &values[..columns.len()],
            weight_scales: &values[..rows],
            bias: Some(&values[70 - rows..]),
        };
        let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
        let mut wanted = None;
        // The plain loops come last.
        for kernels in Kernels::available().collect::<Vec<_>>().into_iter().rev() {
            let mut gathered = vec![f32::NAN; plain.len()];
            (kernels.gather_columns)(&weight, cols, &columns, &mut gathered);
            prop_assert_eq!(&gathered, &plain, "{}", kernels.name);
            let mut narrowed = vec![f16::NAN; values.len()];
            (kernels.narrow)(&values, &mut narrowed);
            prop_assert_eq!(&narrowed, &halves, "{}", kernels.name);
            let mut widened = vec![f32::NAN; values.len()];
            (kernels.widen)(&halves, &mut widened);
            prop_assert!(widened.iter().zip(&halves).all(|(value, half)| *value == half.to_f32()), "{}", kernels.name);
            let mut outputs = vec![MaybeUninit::new(f32::NAN); rows];
            (kernels.finish)(&sums, &plain, &finish, &mut outputs);
            // SAFETY: they are NaN where they were not written.
            let mut found: Vec<f32> = outputs.iter().map(|output| unsafe { output.assume_init() }).collect();
            outputs.fill(MaybeUninit::new(f32::NAN));
            (kernels.token_outputs)(&token, &weight, &finish, &mut outputs);
            // SAFETY: as above.
            let in_one_pass = outputs.iter().map(|output| unsafe { output.assume_init() }.to_bits());
            prop_assert!(in_one_pass.eq(found.iter().map(|value| value.to_bits())), "{}", kernels.name);
            let (mut scores, mut softmax) = (values[..64].to_vec(), RunningSoftmax { max: 3.0, sum: 2.0 });
            found.push((kernels.softmax_block)(&mut scores, 1 + rows % 64, 0.1, cols, &mut softmax));
            found.extend(scores.iter().chain([&softmax.max, &softmax.sum]));
            let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
            prop_assert_eq!(&found, wanted.get_or_insert_with(|| found.clone()), "{}", kernels.name);
        }
    }

    #[test]
    fn sums_with_float_weights_are_right_to_rounding((cols, x, weight) in float_case()) {
        let f16s: Vec<f16> = weight.iter().map(|&w| f16::from_f32(w)).collect();
        let bf16s: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
        let rows = weight.len() / cols;
        let mut sums = vec![f32::NAN; x.len() / cols * rows];
        for kernels in Kernels::available() {
            (kernels.f32_dots)(&x, &weight, cols, &mut sums);
            check_float(kernels.name, &x, &weight.iter().map(|&w| f64::from(w)).collect::<Vec<_>>(), cols, &sums)?;
            (kernels.f16_dots)(&x, &f16s, cols, &mut sums);
            check_float(kernels.name, &x, &f16s.iter().map(|w| w.to_f64()).collect::<Vec<_>>(), cols, &sums)?;
            (kernels.bf16_dots)(&x, &bf16s, cols, &mut sums);
            check_float(kernels.name, &x, &bf16s.iter().map(|w| w.to_f64()).collect::<Vec<_>>(), cols, &sums)?;
        }
    }
}

/// Sums in f32 lie within the rounding of their terms of the sum in f64.
fn check_float(name: &str, x: &[f32], weight: &[f64], cols: usize, sums: &[f32]) -> Result<(), TestCaseError> {
    let pairs = x.chunks(cols).flat_map(|x| weight.chunks(cols).map(move |weight| (x, weight)));
    for ((x, weight), &sum) in pairs.zip(sums) {
        let terms = x.iter().zip(weight).map(|(&x, &weight)| f64::from(x) * weight);
        let (wanted, size) = terms.fold((0f64, 0f64), |(sum, size), term| (sum + term, size + term.abs()));
        let bound = size * 2e-6 + 1e-30;
        prop_assert!((f64::from(sum) - wanted).abs() <= bound, "{name}: {sum} instead of {wanted}");
    }
    Ok(())
}

#[test]
fn every_f16_is_widened_to_its_value() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for kernels in Kernels::available() {
        for len in [1, 7, 8, 9, 15, 16, 17, 31, 1000, halves.len()] {
            for halves in halves.chunks(len).take(100) {
                let mut widened = vec![7f32; len];
                (kernels.widen)(halves, &mut widened[..halves.len()]);
                for (half, value) in halves.iter().zip(widened) {
                    let wanted = f16::to_f32_const(*half);
                    let is_right = value.to_bits() == wanted.to_bits() || value.is_nan() && wanted.is_nan();
                    assert!(is_right, "{}: {half:?} is {value:e}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn floats_are_narrowed_to_the_nearest_finite_f16() {
    let halves: Vec<f32> = (0..=u16::MAX).map(|bits| f16::to_f32_const(f16::from_bits(bits))).collect();
    // Every f16, what lies just beside it, and half-way to the next: ties go to even.
    let finite = halves.iter().filter(|value| value.is_finite());
    let around = finite.flat_map(|&x| [x, x.next_up(), x.next_down(), x * (1.0 + 1.0 / 2048.0), x + 2f32.powi(-25)]);
    let far = [65_504.0, 65_519.996, 65_520.0, 65_536.0, 1e9, f32::MAX, f32::INFINITY, 1e-40, f32::MIN_POSITIVE];
    let mut values: Vec<f32> = far.into_iter().flat_map(|value| [value, -value]).chain(around).collect();
    // NaN in a whole vector and in a rest.
    values.insert(5, f32::NAN);
    values.push(f32::NAN);
    for kernels in Kernels::available() {
        for len in [1, 7, 8, 9, 15, 16, 17, 31, values.len()] {
            for values in values.chunks(len).take(1000) {
                let mut narrowed = vec![f16::ONE; values.len()];
                (kernels.narrow)(values, &mut narrowed);
                for (value, narrowed) in values.iter().zip(narrowed) {
                    let nearest = f16::from_f32_const(*value);
                    let wanted = if nearest.is_infinite() { f16::MAX.copysign(nearest) } else { nearest };
                    let is_right = narrowed.to_bits() == wanted.to_bits() || narrowed.is_nan() && value.is_nan();
                    assert!(is_right, "{}: {value:e} is {narrowed:?}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn nan_and_infinity_count_as_outliers() {
    let x = [1.0, f32::NAN, -2.0, f32::INFINITY, f32::NEG_INFINITY];
    for kernels in Kernels::available() {
        let mut flags = [0u8; 5];
        (kernels.flag_outliers)(&x, 6.0, &mut flags);
        assert_eq!(flags, [0, 1, 0, 1, 1], "{}", kernels.name);
        assert_eq!((kernels.absmax)(&x, Some(6.0)), 2.0, "{}", kernels.name);
        assert!((kernels.absmax)(&x, None).is_nan(), "{}", kernels.name);
    }
}

#[test]
fn an_unknown_instruction_set_is_refused_by_name() {
    let error = Kernels::select("mmx").unwrap_err().to_string();
    assert!(error.contains("`mmx` is not available here; there is") && error.contains("portable"), "{error}");
}

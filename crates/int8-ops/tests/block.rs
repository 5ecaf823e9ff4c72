//! The rest of a block, attention, norms and activations, against the formulas in f64, on every
//! instruction set.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use int8_ops::cpu::Kernels;
use int8_ops::{Activation, AttentionCache, CacheDtype, LayerNorm, add, attention, attention_with};

/// From -50 to 50, close together around 0.
fn arguments() -> Vec<f32> {
    let fine = (-40_000..=40_000).map(|i| i as f32 / 4_000.0);
    fine.chain((-500..=500).map(|i| i as f32 / 10.0)).chain([0.0, -0.0, 1e-30, -1e-30, 1e-42, 1e4, -1e4]).collect()
}

#[test]
fn gelu_is_right_to_a_few_units_in_the_last_place() {
    let tanh_form =
        |x: f64| x / (1.0 + (-2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).exp());
    for kernels in Kernels::available() {
        let mut y = arguments();
        (kernels.gelu)(&mut y);
        for (x, y) in arguments().into_iter().zip(y) {
            let wanted = tanh_form(f64::from(x));
            // The far negative side is tiny: there the exponent's own rounding counts.
            let bound = wanted.abs() * 4e-7 * (1.0 + f64::from(x.min(0.0).abs()).powi(3) * 0.1) + 1e-30;
            assert!((f64::from(y) - wanted).abs() <= bound, "{}: gelu({x}) = {y}, wanted {wanted}", kernels.name);
        }
    }
}

#[test]
fn gelu_by_the_error_function_is_right_to_2e_6_of_its_size() {
    // erf(x) to 12 digits by its series, where that converges fast.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..60 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    };
    for kernels in Kernels::available() {
        let mut y = arguments();
        (kernels.gelu_erf)(&mut y);
        for (x, y) in arguments().into_iter().zip(y).filter(|(x, _)| x.abs() < 3.0) {
            let wanted = f64::from(x) / 2.0 * (1.0 + erf(f64::from(x) / std::f64::consts::SQRT_2));
            let error = (f64::from(y) - wanted).abs();
            assert!(error <= wanted.abs() * 2e-6 + 1e-35, "{}: {x} gives {y}, wanted {wanted}", kernels.name);
        }
    }
}

#[test]
fn activations_of_nan_are_nan_and_far_values_stay_finite() {
    for kernels in Kernels::available() {
        for kernel in [kernels.gelu, kernels.gelu_erf, kernels.relu] {
            let mut x = [f32::NAN, 3e4, -3e4, 0.0];
            kernel(&mut x);
            assert!(x[0].is_nan() && x[1] == 3e4 && x[2].abs() < 1e-20 && x[3] == 0.0, "{}: {x:?}", kernels.name);
        }
    }
}

#[test]
fn a_layer_norm_is_that_of_the_formula() -> Result<()> {
    // As few rows as one thread has, and many.
    for (rows, width) in [(3, 1), (3, 7), (3, 16), (3, 100), (3, 1024), (0, 8), (70, 1000)] {
        let x: Vec<f32> = (0..rows * width).map(|i| ((i * 37 % 101) as f32 - 40.0) / 9.0).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 / width as f32).collect();
        let bias: Vec<f32> = (0..width).map(|i| i as f32 / 100.0).collect();
        let [weights, biases] = [&weight, &bias].map(|values| Tensor::new(values.as_slice(), &Device::Cpu).unwrap());
        let norm = LayerNorm::new(weights, biases, 1e-5)?;
        let y = norm.forward(&Tensor::from_vec(x.clone(), (rows, width), &Device::Cpu)?)?.to_vec2::<f32>()?;
        for (x, y) in x.chunks(width).zip(&y) {
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let normed = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt();
                let wanted = normed * f64::from(weight[i]) + f64::from(bias[i]);
                assert!((f64::from(y[i]) - wanted).abs() < 1e-5, "width {width}: {} for {wanted}", y[i]);
            }
            for kernels in Kernels::available() {
                let mut same = vec![0f32; width];
                (kernels.layer_norm)(x, &weight, &bias, 1e-5, &mut same);
                assert_eq!(&same, y, "{}", kernels.name);
            }
        }
    }
    Ok(())
}

#[test]
fn attention_is_that_of_the_formula_at_odd_sizes_and_strides() -> Result<()> {
    let (batch, heads) = (2, 3);
    let slopes = [0.5, 0.25, 0.125];
    let sizes = [(0, 1, 5), (0, 70, 64), (63, 2, 80), (64, 30, 17), (130, 25, 128)];
    for ((cache_dtype, dtype), (past, tokens, head_dim)) in
        [(CacheDtype::F16, DType::F16), (CacheDtype::F32, DType::F32)]
            .into_iter()
            .flat_map(|dtypes| sizes.map(|size| (dtypes, size)))
    {
        let len = past + tokens;
        // The three lie in one another, as the fused projection gives them.
        let fused = Tensor::randn(0f32, 1.0, (batch, len, heads, 3, head_dim), &Device::Cpu)?;
        let part = |index| fused.narrow(3, index, 1)?.squeeze(3)?.transpose(1, 2);
        let (queries, keys, values) = (part(0)?.narrow(2, past, tokens)?, part(1)?, part(2)?);
        let cache = AttentionCache::new(&keys, 16, cache_dtype)?;
        assert!(cache.write(0, &keys, &values).is_err() || len <= cache.capacity());
        let cache = cache.grown(0, len)?;
        cache.write(0, &keys, &values)?;
        // What the cache holds is rounded, and nothing else.
        let [keys, values] = [keys, values].map(|tensor| tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap());
        let [q, k, v] = [&queries, &keys, &values].map(|tensor| tensor.contiguous().unwrap().flatten_all().unwrap());
        let [q, k, v] = [q, k, v].map(|tensor| tensor.to_vec1::<f32>().unwrap());
        for kernels in Kernels::available() {
            for slopes in [None, Some(&slopes[..])] {
                let found = attention_with(kernels, &queries, &cache, past, slopes)?;
                assert_eq!(found.dims(), [batch, tokens, heads * head_dim]);
                let found = found.to_vec3::<f32>()?;
                for (row, query) in (0..batch * heads).flat_map(|row| (0..tokens).map(move |query| (row, query))) {
                    let q = &q[(row * tokens + query) * head_dim..][..head_dim];
                    let row_of = |all: &[f32], key: usize| all[(row * len + key) * head_dim..][..head_dim].to_vec();
                    let slope = slopes.map_or(0.0, |slopes| f64::from(slopes[row % heads]));
                    let weights: Vec<f64> = (0..=past + query)
                        .map(|key| {
                            let dot: f64 =
                                q.iter().zip(row_of(&k, key)).map(|(q, k)| f64::from(*q) * f64::from(k)).sum();
                            (dot / (head_dim as f64).sqrt() + slope * (key as f64 - (past + query) as f64)).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for feature in 0..head_dim {
                        let terms = weights.iter().enumerate();
                        let wanted: f64 = terms.map(|(key, w)| w / total * f64::from(row_of(&v, key)[feature])).sum();
                        let found = f64::from(found[row / heads][query][row % heads * head_dim + feature]);
                        assert!((found - wanted).abs() < 2e-5, "{} {dtype:?}: {found} for {wanted}", kernels.name);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The mean of the differences' magnitudes, each in deviations of its own: where a few outputs have much larger ones
/// than the rest, they alone would decide otherwise, and they are too few for a mean.
fn distance(found: &[f32], wanted: &[f64], deviations: &[f64]) -> f64 {
    let differences = found.iter().zip(wanted).map(|(&found, wanted)| (f64::from(found) - wanted).abs());
    differences.zip(deviations).map(|(difference, deviation)| difference / deviation).sum::<f64>() / found.len() as f64
}

#[test]
fn attention_over_a_cache_in_integers_is_as_exact_as_their_rounding_and_the_same_everywhere() -> Result<()> {
    const HEADS: usize = 24;
    for (past, tokens, head_dim, slope) in [
        (0, 1, 5, 0.0),
        (0, 40, 5, 0.0),
        (0, 70, 17, 0.1),
        (0, 70, 64, 0.0),
        (200, 1, 80, 0.0),
        (1000, 1, 64, 0.4),
        (63, 2, 80, 0.3),
        (64, 30, 17, 0.7),
        (500, 50, 128, 0.0),
        (900, 20, 64, 0.5),
    ] {
        let len = past + tokens;
        let random = |len| Tensor::randn(0f32, 1.0, (1, HEADS, len, head_dim), &Device::Cpu);
        // Some keys far away are so large that they count in spite of their distance, and their values are large.
        let sizes = (0..len).map(|key| if key % 97 == 3 { 20f32 } else { 1.0 });
        let sizes = Tensor::from_iter(sizes, &Device::Cpu)?.reshape((1, 1, len, 1))?;
        let [keys, values] = [random(len)?, random(len)?].map(|tensor| tensor.broadcast_mul(&sizes).unwrap());
        let queries = random(tokens)?;
        let [q, k, v] =
            [&queries, &keys, &values].map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let (mut wanted, mut by_rounding) = (Vec::new(), Vec::new());
        for (query, head) in (0..tokens).flat_map(|query| (0..HEADS).map(move |head| (query, head))) {
            let row =
                |all: &[f32], len: usize, index: usize| all[(head * len + index) * head_dim..][..head_dim].to_vec();
            let q = row(&q, tokens, query);
            let scores = (0..=past + query).map(|key| {
                let products = q.iter().zip(row(&k, len, key)).map(|(&q, k)| f64::from(q) * f64::from(k));
                products.sum::<f64>() / (head_dim as f64).sqrt() + f64::from(slope) * key as f64
            });
            let scores: Vec<f64> = scores.collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0f64; head_dim];
            for (key, weight) in weights.iter().enumerate() {
                sums.iter_mut().zip(row(&v, len, key)).for_each(|(sum, v)| *sum += weight / total * f64::from(v));
            }
            // What rounding to codes of 8 bits makes of each output, to first order: errors are alike in all features,
            // up to half a code, and add up by their squares.
            let deviation = |x: &[f32]| f64::from(x.iter().fold(0f32, |max, x| max.max(x.abs()))) / 254.0 / 3f64.sqrt();
            let size = (q.iter().map(|&q| f64::from(q) * f64::from(q)).sum::<f64>() / head_dim as f64).sqrt();
            let mut squares = vec![0f64; head_dim];
            for (key, weight) in weights.iter().enumerate() {
                let (of_score, v) = (size * deviation(&row(&k, len, key)), row(&v, len, key));
                for ((square, &value), wanted) in squares.iter_mut().zip(&v).zip(&sums) {
                    let of_key = of_score * (f64::from(value) - wanted);
                    *square += (weight / total).powi(2) * (of_key * of_key + deviation(&v).powi(2));
                }
            }
            wanted.extend(sums);
            by_rounding.extend(squares.into_iter().map(f64::sqrt));
        }
        let attended = |dtype, kernels| -> Result<Vec<f32>> {
            let cache = AttentionCache::new(&keys, len, dtype)?;
            cache.write(0, &keys, &values)?;
            attention_with(kernels, &queries, &cache, past, Some(&[slope; HEADS]))?.flatten_all()?.to_vec1()
        };
        let in_f16 = distance(&attended(CacheDtype::F16, Kernels::active())?, &wanted, &by_rounding);
        let found = attended(CacheDtype::Int16, Kernels::active())?;
        let in_int16 = distance(&found, &wanted, &by_rounding);
        assert!(in_int16 < in_f16, "{in_int16} for {in_f16}: {tokens} after {past}, head_dim {head_dim}");
        let found_in_int8 = attended(CacheDtype::Int8, Kernels::active())?;
        // Normal errors are 0.8 deviations on average, here with 0.03 from run to run where outputs are fewest.
        let in_int8 = distance(&found_in_int8, &wanted, &by_rounding);
        assert!(in_int8 < 1.0, "{in_int8} deviations: {tokens} after {past}, head_dim {head_dim}");
        for kernels in Kernels::available() {
            assert_eq!(attended(CacheDtype::Int16, kernels)?, found, "{}", kernels.name);
            assert_eq!(attended(CacheDtype::Int8, kernels)?, found_in_int8, "{}", kernels.name);
        }
    }
    Ok(())
}

const INTEGERS: [CacheDtype; 2] = [CacheDtype::Int8, CacheDtype::Int16];

#[test]
fn equal_keys_and_values_reach_the_largest_sums_in_integers() -> Result<()> {
    // 64 equal weights and largest codes of 16 bits come within 1e-4 of 2^31; half a code of 4,096 is what they may all
    // be off.
    for (len, dtype) in INTEGERS.iter().flat_map(|&dtype| [(64, dtype), (200, dtype)]) {
        let ones = Tensor::ones((1, 1, len, 64), DType::F32, &Device::Cpu)?;
        let cache = AttentionCache::new(&ones, len, dtype)?;
        cache.write(0, &ones, &ones)?;
        for kernels in Kernels::available() {
            let found = attention_with(kernels, &ones, &cache, 0, None)?.flatten_all()?.to_vec1::<f32>()?;
            let error = found.iter().map(|x| (x - 1.0).abs()).fold(0.0, f32::max);
            assert!(error < 1.3e-4, "{} {dtype:?} {len}: {error}", kernels.name);
        }
    }
    Ok(())
}

#[test]
fn a_key_that_counts_is_never_skipped_for_its_distance() -> Result<()> {
    let len = 600;
    let along = |direction: [f32; 4], sizes: &dyn Fn(usize) -> f32, len: usize| {
        let rows = (0..len).flat_map(|token| direction.map(|x| x * sizes(token)));
        Tensor::from_iter(rows, &Device::Cpu)?.reshape((1, 1, len, 4))
    };
    let (one, equal) = ([1.0, 0.0, 0.0, 0.0], [0.5; 4]);
    // The far key's score falls short of that of the last by 6, or passes it: a share of 0.0025 or more. With equal
    // features codes of 8 bits have the largest norm there is; scores of 300 are off by some 0.01 then.
    for (direction, error, (slope, size, far)) in
        [(one, 5e-3), (equal, 2e-2)].into_iter().flat_map(|(direction, error)| {
            let cases =
                [(0.5f32, 0.25 * 591.0 - 3.0, 8), (0.5, 0.25 * 591.0 + 1.0, 8), (-1.0, 0.0, 0), (-0.1, 20.0, 300)];
            cases.map(|case| (direction, error, case))
        })
    {
        let size = |token| if token == far { size } else { 0.0 };
        let value = |token| if token == far { 1.0 } else { -1.0 };
        // Scores are twice a key's size.
        let queries = along(direction, &|_| 4.0, 1)?;
        let (keys, values) = (along(direction, &size, len)?, along(one, &value, len)?);
        let attended = |dtype, kernels| -> Result<f32> {
            let cache = AttentionCache::new(&keys, len, dtype)?;
            cache.write(0, &keys, &values)?;
            Ok(attention_with(kernels, &queries, &cache, len - 1, Some(&[slope]))?.flatten_all()?.to_vec1::<f32>()?[0])
        };
        for (kernels, dtype) in Kernels::available().flat_map(|kernels| INTEGERS.map(|dtype| (kernels, dtype))) {
            let (found, wanted) = (attended(dtype, kernels)?, attended(CacheDtype::F32, kernels)?);
            let are_right = wanted.min(found) > -0.999 && (found - wanted).abs() < error;
            assert!(are_right, "{} {dtype:?} {slope}: {found} for {wanted}", kernels.name);
        }
    }
    Ok(())
}

#[test]
fn what_was_cached_before_leaves_no_trace_in_integers() -> Result<()> {
    let random = |len| Tensor::randn(0f32, 1.0, (1, 2, len, 20), &Device::Cpu);
    let (keys, values, queries) = (random(100)?, random(100)?, random(30)?);
    let attended = |dtype, before: Option<f32>| -> Result<Vec<f32>> {
        let cache = AttentionCache::new(&keys, 128, dtype)?;
        if let Some(before) = before {
            let stale = Tensor::full(before, (1, 2, 128, 20), &Device::Cpu)?;
            cache.write(0, &stale, &stale)?;
        }
        cache.write(0, &keys, &values)?;
        attention(&queries, &cache, 70, Some(&[0.5, 0.0]))?.flatten_all()?.to_vec1()
    };
    for dtype in INTEGERS {
        let wanted = attended(dtype, None)?;
        for before in [f32::NAN, f32::MAX, -7.0] {
            assert_eq!(attended(dtype, Some(before))?, wanted, "{dtype:?} {before}");
        }
    }
    Ok(())
}

#[test]
fn no_tokens_attend_to_nothing() -> Result<()> {
    let floats = [(CacheDtype::F16, 0), (CacheDtype::F32, 0), (CacheDtype::F16, 3)];
    for (dtype, past) in floats.into_iter().chain(INTEGERS.map(|dtype| (dtype, 3))) {
        let none = Tensor::zeros((2, 3, 0, 16), DType::F32, &Device::Cpu)?;
        let cache = AttentionCache::new(&none, past, dtype)?;
        cache.write(past, &none, &none)?;
        for kernels in Kernels::available() {
            assert_eq!(attention_with(kernels, &none, &cache, past, None)?.dims(), [2, 0, 48]);
        }
    }
    Ok(())
}

#[test]
fn a_value_beyond_f16_does_not_reach_the_queries_before_it() -> Result<()> {
    let row = |values: [f32; 3]| Tensor::from_iter(values, &Device::Cpu)?.reshape((1, 1, 3, 1))?.repeat((1, 1, 1, 20));
    let (queries, keys) = (row([1.0; 3])?, row([1.0, 1e6, -1e9])?);
    for far in [65_520.0, 1e9, f32::MAX, f32::INFINITY] {
        let values = row([0.5, far, -far])?;
        let cache = AttentionCache::new(&keys, 3, CacheDtype::F16)?;
        cache.write(0, &keys, &values)?;
        for kernels in Kernels::available() {
            let found = attention_with(kernels, &queries, &cache, 0, None)?.to_vec3::<f32>()?;
            assert_eq!(found[0][0], [0.5; 20], "{} {far}", kernels.name);
            assert_eq!(found[0][1], [65_504.0; 20], "{} {far}", kernels.name);
            assert_eq!(found[0][2], [65_504.0; 20], "{} {far}", kernels.name);
        }
    }
    Ok(())
}

#[test]
fn a_value_that_integers_cut_off_does_not_reach_the_queries_before_it() -> Result<()> {
    let row = |values: [f32; 3]| Tensor::from_iter(values, &Device::Cpu)?.reshape((1, 1, 3, 1))?.repeat((1, 1, 1, 20));
    let (queries, keys) = (row([1.0; 3])?, row([1.0, 1e6, -1e9])?);
    let far = [65_520.0, 1e9, f32::MAX, f32::INFINITY, f32::NAN];
    for (far, dtype) in far.into_iter().flat_map(|far| INTEGERS.map(|dtype| (far, dtype))) {
        let cache = AttentionCache::new(&keys, 3, dtype)?;
        cache.write(0, &keys, &row([0.5, far, -far])?)?;
        for kernels in Kernels::available() {
            let found = attention_with(kernels, &queries, &cache, 0, None)?.to_vec3::<f32>()?;
            assert!(found[0][0].iter().all(|x| (x - 0.5).abs() < 1e-6), "{} {far}: {:?}", kernels.name, found[0][0]);
            for found in &found[0][1..] {
                let wanted = far.min(16_777_216.0);
                let is_right = |x: &f32| if far.is_nan() { x.is_nan() } else { (x / wanted - 1.0).abs() < 1e-6 };
                assert!(found.iter().all(is_right), "{} {far}: {found:?}", kernels.name);
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let x = Tensor::zeros((1, 2, 3, 4), DType::F32, &Device::Cpu)?;
    let cache = AttentionCache::new(&x, 8, CacheDtype::F16)?;
    let kernels = Kernels::active();
    assert!(attention_with(kernels, &x, &cache, cache.capacity(), None).is_err(), "no room for so many");
    assert!(attention_with(kernels, &x, &cache, 0, Some(&[1.0])).is_err(), "a slope for each head");
    assert!(attention_with(kernels, &x.narrow(1, 0, 1)?, &cache, 0, None).is_err(), "as many heads as cached");
    assert!(cache.write(0, &x.to_dtype(DType::F16)?, &x).is_err(), "keys are computed in f32");
    assert!(add(x.clone(), &x.narrow(3, 0, 2)?).is_err(), "shapes are one");
    assert!(Activation::Gelu.forward(x.transpose(2, 3)?).is_err(), "in place means contiguous");
    Ok(())
}

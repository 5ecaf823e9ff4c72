use candle_core::{Device, Module, Tensor};
use half::{bf16, f16};
use int8_ops::{LayerNorm, outlier_columns, quantize_activations};
use kernels_on_host::Arg;
use proptest::prelude::*;

use super::support::{Float, assert_close, cases, floats, launch, parts, tensor};

const EPS: f32 = 1e-5;

/// Values of a vector in the dtype that its number names, as bytes that start where a vector may.
fn vector(values: &[f32], dtype: usize) -> (Vec<u128>, Tensor) {
    fn bytes<T: Float + bytemuck::Pod>(values: &[f32]) -> (Vec<u128>, Vec<f32>) {
        let values: Vec<T> = floats(values);
        let mut bytes = vec![0u128; size_of_val(values.as_slice()).div_ceil(16)];
        let len = size_of_val(values.as_slice());
        bytemuck::cast_slice_mut::<_, u8>(&mut bytes)[..len].copy_from_slice(bytemuck::cast_slice(&values));
        (bytes, values.iter().map(|value| value.float()).collect())
    }
    let (bytes, values) = match dtype {
        0 => bytes::<f32>(values),
        1 => bytes::<f16>(values),
        _ => bytes::<bf16>(values),
    };
    (bytes, Tensor::new(values, &Device::Cpu).expect("a vector"))
}

/// Values that are no multiples of anything, some of them much larger.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = u64::from(seed) * 2 + 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            if state >> 33 & 127 == 5 { 40.0 * value } else { value + 0.25 }
        })
        .collect()
}

#[derive(Debug)]
struct Case {
    sequences: usize,
    tokens: usize,
    cols: usize,
    dtypes: [usize; 2],
    has_bias: bool,
    /// Values that the row starts after a place for vectors.
    offset: usize,
    seed: u32,
}

fn check<T: Float>(case: &Case) -> candle_core::Result<()> {
    let &Case { sequences, tokens, cols, dtypes, has_bias, offset, seed } = case;
    let (rows, words) = (sequences * tokens, cols.div_ceil(32));
    let x: Vec<T> = floats(&values(offset + rows * cols, seed));
    let (weight, weight_values) = vector(&values(cols, seed ^ 1), dtypes[0]);
    let (bias, bias_values) = vector(&values(cols, seed ^ 2), dtypes[1]);
    let bias_values = if has_bias { bias_values } else { bias_values.zeros_like()? };
    let vectors = || {
        [
            weight.as_slice().into(),
            dtypes[0].into(),
            if has_bias { bias.as_slice().into() } else { Arg::NULL },
            dtypes[1].into(),
            EPS.into(),
        ]
    };
    let mut out = vec![T::of(99.0); offset + rows * cols];
    let args: Vec<Arg> = [Arg::from(&x[offset..])]
        .into_iter()
        .chain(vectors())
        .chain([(&mut out[offset..]).into(), cols.into()])
        .collect();
    launch(&format!("layer_norm_{}", T::SUFFIX), [rows, 1, 1], 256, 0, seed, &args);

    let wanted = LayerNorm::new(weight_values, bias_values, f64::from(EPS))?
        .forward(&tensor(&x[offset..], &[sequences, tokens, cols])?)?;
    assert_close(&out[offset..], &wanted.flatten_all()?.to_vec1::<f32>()?, 1e-5, 2e-6);

    for threshold in [Some(6.0f32), None] {
        let mut normed = vec![T::of(99.0); offset + rows * cols];
        let (mut codes, mut scales) = (vec![99i8; offset + rows * cols], vec![f32::NAN; rows]);
        let mut bits = vec![0u32; sequences * words];
        let args: Vec<Arg> = [Arg::from(&x[offset..])]
            .into_iter()
            .chain(vectors())
            .chain([
                (&mut normed[offset..]).into(),
                (&mut codes[offset..]).into(),
                scales.as_mut_slice().into(),
                if threshold.is_some() { bits.as_mut_slice().into() } else { Arg::NULL },
                cols.into(),
                tokens.into(),
                threshold.unwrap_or(0.0).into(),
            ])
            .collect();
        launch(&format!("layer_norm_quantize_{}", T::SUFFIX), [rows, 1, 1], 256, 0, seed, &args);
        assert!(normed[offset..].iter().map(|value| value.float()).eq(out[offset..].iter().map(|value| value.float())));
        let x = tensor(&normed[offset..], &[sequences, tokens, cols])?;
        let (wanted_codes, wanted_scales) = parts(&quantize_activations(&x, threshold)?)?;
        assert_eq!(scales, wanted_scales);
        let is_outlier = |sequence: usize, col: usize| bits[sequence * words + col / 32] >> (col % 32) & 1 == 1;
        if let Some(threshold) = threshold {
            let found: Vec<Vec<u32>> = (0..sequences)
                .map(|sequence| (0..cols).filter(|&col| is_outlier(sequence, col)).map(|col| col as u32).collect())
                .collect();
            assert_eq!(found, outlier_columns(&x, threshold)?);
        }
        for (index, (code, wanted)) in codes[offset..].iter().zip(&wanted_codes).enumerate() {
            if !is_outlier(index / cols / tokens, index % cols) {
                assert_eq!(code, wanted, "row {} column {}", index / cols, index % cols);
            }
        }
    }
    Ok(())
}

fn check_all(case: &Case) -> candle_core::Result<()> {
    check::<f32>(case)?;
    check::<f16>(case)?;
    check::<bf16>(case)
}

/// Rows longer than what a block holds, in pieces and not.
#[test]
fn long_rows_are_normalised_as_on_the_cpu() -> candle_core::Result<()> {
    for (cols, offset) in [(8192 + 2056, 0), (8203, 0), (8200, 1)] {
        check_all(&Case { sequences: 1, tokens: 2, cols, dtypes: [1, 0], has_bias: true, offset, seed: 7 })?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn rows_are_normalised_and_quantised_as_on_the_cpu(
        (sequences, tokens) in (1..3usize, 1..4usize),
        cols in prop_oneof![1..70usize, Just(64), Just(256), Just(520), Just(600)],
        dtypes in [0..3usize, 0..3],
        has_bias in any::<bool>(),
        offset in prop_oneof![3 => Just(0usize), 1 => 1..9usize],
        seed in any::<u32>(),
    ) {
        let case = Case { sequences, tokens, cols, dtypes, has_bias, offset, seed };
        check_all(&case).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

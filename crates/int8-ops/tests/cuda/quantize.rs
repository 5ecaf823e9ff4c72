use half::{bf16, f16};
use int8_ops::{outlier_columns, quantize_activations};
use kernels_on_host::Arg;
use proptest::prelude::*;

use super::support::{Float, cases, floats, launch, parts, tensor};

/// Sequences, tokens, columns, values among which outliers are, and a seed.
fn case() -> impl Strategy<Value = (usize, usize, usize, Vec<f32>, u32)> {
    (1..4usize, 1..6usize, prop_oneof![1..70usize, Just(255), Just(256), Just(600)], any::<u32>()).prop_flat_map(
        |(sequences, tokens, cols, seed)| {
            let value = prop_oneof![
                40 => -4f32..4.0,
                1 => prop_oneof![Just(6.0f32), Just(-6.0), Just(77.5), Just(0.0), Just(-0.0), Just(1e-38), Just(5.996)],
            ];
            let values = prop::collection::vec(value, sequences * tokens * cols);
            (Just(sequences), Just(tokens), Just(cols), values, Just(seed))
        },
    )
}

fn check<T: Float>(
    (sequences, tokens, cols, values, seed): &(usize, usize, usize, Vec<f32>, u32),
    threshold: Option<f32>,
) -> candle_core::Result<()> {
    let (rows, words) = (sequences * tokens, cols.div_ceil(32));
    let x: Vec<T> = floats(values);
    let (mut codes, mut scales, mut bits) =
        (vec![99i8; rows * cols], vec![f32::NAN; rows], vec![0u32; sequences * words]);
    let args = [
        x.as_slice().into(),
        codes.as_mut_slice().into(),
        scales.as_mut_slice().into(),
        if threshold.is_some() { bits.as_mut_slice().into() } else { Arg::NULL },
        (*cols).into(),
        (*tokens).into(),
        threshold.unwrap_or(0.0).into(),
    ];
    launch(&format!("quantize_activations_{}", T::SUFFIX), [rows, 1, 1], 256, 0, *seed, &args);

    let x = tensor(&x, &[*sequences, *tokens, *cols])?;
    let (wanted_codes, wanted_scales) = parts(&quantize_activations(&x, threshold)?)?;
    assert_eq!(scales, wanted_scales);
    let is_outlier = |sequence: usize, col: usize| bits[sequence * words + col / 32] >> (col % 32) & 1 == 1;
    if let Some(threshold) = threshold {
        let found: Vec<Vec<u32>> = (0..*sequences)
            .map(|sequence| (0..*cols).filter(|&col| is_outlier(sequence, col)).map(|col| col as u32).collect())
            .collect();
        assert_eq!(found, outlier_columns(&x, threshold)?);
    }
    for (index, (code, wanted)) in codes.iter().zip(&wanted_codes).enumerate() {
        // Small values of outlier columns keep their codes; the product takes them out.
        if !is_outlier(index / cols / tokens, index % cols) {
            assert_eq!(code, wanted, "row {} column {}", index / cols, index % cols);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn activations_are_quantised_as_on_the_cpu(case in case()) {
        for threshold in [Some(6.0), None] {
            check::<f32>(&case, threshold).map_err(|error| TestCaseError::fail(error.to_string()))?;
            check::<f16>(&case, threshold).map_err(|error| TestCaseError::fail(error.to_string()))?;
            check::<bf16>(&case, threshold).map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
    }
}

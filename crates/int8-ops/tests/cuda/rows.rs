use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use int8_ops::Int8Matrix;
use proptest::prelude::*;

use super::support::{Float, cases, floats, launch, parts, tensor};

#[derive(Debug)]
struct Case {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
    ids: Vec<u32>,
    seed: u32,
}

fn case() -> impl Strategy<Value = Case> {
    (1..6usize, prop_oneof![1..70usize, Just(256), Just(600)], 1..6usize, any::<u32>()).prop_flat_map(
        |(rows, cols, ids, seed)| {
            let value = prop_oneof![
                40 => -4f32..4.0,
                1 => prop_oneof![Just(77.5f32), Just(0.0), Just(-0.0), Just(1e-38), Just(3e-37)],
            ];
            let values = prop::collection::vec(value, rows * cols);
            (Just((rows, cols, seed)), values, prop::collection::vec(0..rows as u32, ids))
                .prop_map(|((rows, cols, seed), values, ids)| Case { rows, cols, values, ids, seed })
        },
    )
}

fn check<T: Float>(case: &Case) -> candle_core::Result<()> {
    // A weight's rows to codes, and back.
    let Case { rows, cols, values, ids, seed } = case;
    let weight: Vec<T> = floats(values);
    let (mut codes, mut scales, mut bad_row) = (vec![99i8; rows * cols], vec![f32::NAN; *rows], vec![i32::MAX]);
    let args = [
        weight.as_slice().into(),
        codes.as_mut_slice().into(),
        scales.as_mut_slice().into(),
        bad_row.as_mut_slice().into(),
        (*cols).into(),
    ];
    launch(&format!("quantize_rows_{}", T::SUFFIX), [*rows, 1, 1], 256, 0, *seed, &args);
    let matrix = Int8Matrix::quantize(&tensor(&weight, &[*rows, *cols])?)?;
    assert_eq!((codes.clone(), scales.clone()), parts(&matrix)?);
    assert_eq!(bad_row, [i32::MAX]);

    let mut out = vec![T::of(99.0); ids.len() * cols];
    let args = [
        codes.as_slice().into(),
        scales.as_slice().into(),
        ids.as_slice().into(),
        out.as_mut_slice().into(),
        (*cols).into(),
    ];
    launch(&format!("dequantize_rows_{}", T::SUFFIX), [ids.len(), 1, 1], 256, 0, *seed, &args);
    let wanted = matrix
        .dequantize_rows(&Tensor::new(ids.as_slice(), &Device::Cpu)?, DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    assert!(out.iter().zip(&wanted).all(|(out, &wanted)| out.float() == T::of(wanted).float()));
    Ok(())
}

fn check_bad_row<T: Float>(cols: usize) {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weight: Vec<T> = floats(&vec![0.5; 5 * cols]);
        weight[3 * cols + cols / 2] = T::of(bad);
        weight[5 * cols - 1] = T::of(bad);
        let (mut codes, mut scales, mut bad_row) = (vec![0i8; 5 * cols], vec![0f32; 5], vec![i32::MAX]);
        let args = [
            weight.as_slice().into(),
            codes.as_mut_slice().into(),
            scales.as_mut_slice().into(),
            bad_row.as_mut_slice().into(),
            cols.into(),
        ];
        launch(&format!("quantize_rows_{}", T::SUFFIX), [5, 1, 1], 256, 0, 1, &args);
        assert_eq!(bad_row, [3], "{bad}");
        assert_eq!(&scales[..3], [0.5 / 127.0; 3]);
    }
}

#[test]
fn the_first_row_that_cannot_be_quantised_is_named() {
    for cols in [33, 64] {
        check_bad_row::<f32>(cols);
        check_bad_row::<f16>(cols);
        check_bad_row::<bf16>(cols);
    }
}

/// Rows longer than what a block holds, in pieces and not.
#[test]
fn long_rows_are_quantised_as_on_the_cpu() -> candle_core::Result<()> {
    for cols in [8192 + 2056, 8203] {
        let values = (0..2 * cols).map(|i| ((i * 7919 + i / 77) % 2003) as f32 / 500.0 - 2.0).collect();
        let case = Case { rows: 2, cols, values, ids: vec![1, 0, 1], seed: 3 };
        check::<f32>(&case)?;
        check::<f16>(&case)?;
        check::<bf16>(&case)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn rows_are_quantised_and_dequantised_as_on_the_cpu(case in case()) {
        check::<f32>(&case).map_err(|error| TestCaseError::fail(error.to_string()))?;
        check::<f16>(&case).map_err(|error| TestCaseError::fail(error.to_string()))?;
        check::<bf16>(&case).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

//! Quantisation and its way back: the paper's worked examples, and the bound on the error.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use int8_ops::{
    Granularity, Int8Matrix, ZeroPointMatrix, int8_matmul, quantize_absmax, quantize_activations, quantize_zero_point,
};
use proptest::prelude::*;

const GRANULARITIES: [Granularity; 2] = [Granularity::Tensor, Granularity::Row];

fn codes(codes: &Tensor) -> Vec<i8> {
    codes.flatten_all().unwrap().to_vec1::<u8>().unwrap().into_iter().map(|code| code as i8).collect()
}

#[test]
fn the_worked_example_of_absmax_quantisation() -> Result<()> {
    let x = Tensor::new(&[[1.2f32, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]], &Device::Cpu)?;
    for granularity in GRANULARITIES {
        let quantized = quantize_absmax(&x, granularity)?;
        assert_eq!(codes(&quantized.codes()?), [28, -12, -101, 28, -73, 19, 56, 127]);
        assert_eq!(quantized.scales().to_vec1::<f32>()?, [5.4 / 127.0]);
    }
    Ok(())
}

#[test]
fn three_tenths_in_a_range_of_one_is_38_and_comes_back_as_0_2992() -> Result<()> {
    let x = Tensor::new(&[[0.3f32, 1.0, -1.0]], &Device::Cpu)?;
    let quantized = quantize_absmax(&x, Granularity::Row)?;
    assert_eq!(codes(&quantized.codes()?), [38, 127, -127]);
    let back = quantized.dequantize()?.to_vec2::<f32>()?;
    assert_eq!(format!("{:.4}", back[0][0]), "0.2992");
    Ok(())
}

#[test]
fn per_tensor_rows_share_one_scale_and_per_row_they_do_not() -> Result<()> {
    let x = Tensor::new(&[[1f32, -2.0], [0.5, 0.25], [0.0, -0.0]], &Device::Cpu)?;
    let tensor = quantize_absmax(&x, Granularity::Tensor)?;
    assert_eq!(tensor.scales().to_vec1::<f32>()?, [2.0 / 127.0; 3]);
    assert_eq!(codes(&tensor.codes()?), [64, -127, 32, 16, 0, 0]);
    let row = quantize_absmax(&x, Granularity::Row)?;
    assert_eq!(row.scales().to_vec1::<f32>()?, [2.0 / 127.0, 0.5 / 127.0, 0.0]);
    assert_eq!(codes(&row.codes()?), [64, -127, 127, 64, 0, 0]);
    Ok(())
}

#[test]
fn a_whole_matrix_may_have_more_values_than_a_row_can() -> Result<()> {
    let x = Tensor::arange(0f32, 400.0 * 400.0, &Device::Cpu)?.reshape((400, 400))?;
    let quantized = quantize_absmax(&x, Granularity::Tensor)?;
    assert_eq!(quantized.dims(), (400, 400));
    assert_eq!(codes(&quantized.codes()?.get(399)?)[399], 127);
    Ok(())
}

#[test]
fn zero_point_quantisation_uses_the_whole_range_of_values_of_one_sign() -> Result<()> {
    let x = Tensor::new(&[[0f32, 0.1, 0.7, 2.54]], &Device::Cpu)?;
    for granularity in GRANULARITIES {
        let quantized = quantize_zero_point(&x, granularity)?;
        assert_eq!(codes(&quantized.codes), [-127, -117, -57, 127]);
        assert_eq!(quantized.zero_points.to_vec1::<f32>()?, [-127.0]);
    }
    Ok(())
}

#[test]
fn every_dtype_and_a_strided_matrix_give_the_same_codes() -> Result<()> {
    // Multiples of 1/16 are exact in f16 and, below 16, in bf16.
    let x = Tensor::arange(0f32, 35.0, &Device::Cpu)?.affine(1.0 / 16.0, -1.0)?.reshape((5, 7))?;
    let wanted = quantize_absmax(&x, Granularity::Row)?;
    for dtype in [DType::F16, DType::BF16] {
        let quantized = quantize_absmax(&x.to_dtype(dtype)?, Granularity::Row)?;
        assert_eq!(codes(&quantized.codes()?), codes(&wanted.codes()?));
    }
    let strided = x.t()?.contiguous()?.t()?;
    assert!(!strided.is_contiguous());
    assert_eq!(codes(&quantize_absmax(&strided, Granularity::Row)?.codes()?), codes(&wanted.codes()?));
    let offset = Tensor::cat(&[&x, &x], 0)?.narrow(0, 5, 5)?;
    assert_eq!(codes(&quantize_absmax(&offset, Granularity::Row)?.codes()?), codes(&wanted.codes()?));
    Ok(())
}

#[test]
fn rows_of_codes_are_looked_up_and_dequantised() -> Result<()> {
    let x = Tensor::new(&[[1f32, -2.0], [0.5, 0.25], [3.0, 3.0]], &Device::Cpu)?;
    let quantized = Int8Matrix::quantize(&x)?;
    let rows = quantized.dequantize_rows(&Tensor::new(&[2u32, 0], &Device::Cpu)?, DType::F32)?.to_vec2::<f32>()?;
    let all = quantized.dequantize()?.to_vec2::<f32>()?;
    assert_eq!(rows, [all[2].clone(), all[0].clone()]);
    Ok(())
}

#[test]
fn nan_and_infinity_are_refused_with_their_place() -> Result<()> {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = Tensor::new(&[[1f32, 2.0], [3.0, bad]], &Device::Cpu)?;
        for granularity in GRANULARITIES {
            assert!(quantize_absmax(&x, granularity).is_err());
            assert!(quantize_zero_point(&x, granularity).is_err());
        }
        for granularity in GRANULARITIES {
            for error in [quantize_absmax(&x, granularity).err(), quantize_zero_point(&x, granularity).err()] {
                let error = error.unwrap().to_string();
                assert!(error.contains("value [1, 1] is"), "{error}");
            }
        }
    }
    Ok(())
}

#[test]
fn codes_of_another_dtype_and_scales_of_another_length_are_refused() -> Result<()> {
    let codes = Tensor::zeros((2, 3), DType::U8, &Device::Cpu)?;
    let scales = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
    assert!(Int8Matrix::new(codes.clone(), scales.clone()).is_ok());
    assert!(Int8Matrix::new(Tensor::zeros((2, 0), DType::U8, &Device::Cpu)?, scales.clone()).is_err());
    assert!(Int8Matrix::new(codes.to_dtype(DType::F32)?, scales.clone()).is_err());
    assert!(Int8Matrix::new(codes, scales.narrow(0, 0, 1)?).is_err());
    assert!(Int8Matrix::from_shared(Arc::new([0u8; 6]), 3, scales.clone()).is_ok());
    assert!(Int8Matrix::from_shared(Arc::new([0u8; 7]), 3, scales.clone()).is_err());
    assert!(Int8Matrix::from_shared(Arc::new([0u8; 0]), 0, scales).is_err());
    Ok(())
}

#[test]
fn codes_that_something_else_owns_are_used_in_place() -> Result<()> {
    let bytes: Vec<u8> = (0..6 * 40).map(|i| (i * 37 % 256) as u8).collect();
    assert!(bytes.contains(&128), "the code -128, which quantising never gives, is one to store");
    let scales = Tensor::arange(1f32, 7.0, &Device::Cpu)?;
    let owned = Int8Matrix::new(Tensor::from_slice(&bytes, (6, 40), &Device::Cpu)?, scales.clone())?;
    let shared = Int8Matrix::from_shared(Arc::new(bytes), 40, scales)?;
    assert_eq!((shared.dims(), shared.bytes()), (owned.dims(), owned.bytes()));
    assert_eq!(codes(&shared.codes()?), codes(&owned.codes()?));
    let values = shared.dequantize()?.to_vec2::<f32>()?;
    assert_eq!(values, owned.dequantize()?.to_vec2::<f32>()?);
    let rows = shared.dequantize_rows(&Tensor::new(&[5u32, 0, 5], &Device::Cpu)?, DType::F32)?.to_vec2::<f32>()?;
    assert_eq!(rows, [5, 0, 5].map(|row: usize| values[row].clone()));
    assert!(shared.dequantize_rows(&Tensor::new(&[6u32], &Device::Cpu)?, DType::F32).is_err());
    let x = Tensor::randn(0f32, 3.0, (5, 40), &Device::Cpu)?;
    let product = |weight| int8_matmul(&x, weight, None, Some(6.0))?.to_vec2::<f32>();
    assert_eq!(product(&shared)?, product(&owned)?);
    Ok(())
}

fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -3f32..3.0,
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(1e30), Just(-1e30), Just(3e38), Just(-3e38)],
        1 => prop_oneof![Just(1e-40f32), Just(-1e-44), Just(f32::MIN_POSITIVE), -1e-37f32..1e-37],
    ]
}

/// Half a code's width, and what f32 itself rounds: the scale (in units of the smallest subnormal,
/// 127 of which make a code's value) and the products.
fn bound(x: f32, scale: f32) -> f64 {
    f64::from(scale) / 2.0 + f64::from(x.abs()) * 4e-7 + f64::from(f32::from_bits(1)) * 127.0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_value_comes_back_within_half_a_scale(
        rows in 1..5usize,
        values in prop::collection::vec(value(), 1..120),
        tiny in any::<bool>(),
    ) {
        let cols = values.len().div_ceil(rows);
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| values[i % values.len()] * if tiny { 1e-38 } else { 1.0 })
            .collect();
        let x = Tensor::from_vec(values.clone(), (rows, cols), &Device::Cpu).unwrap();
        for granularity in GRANULARITIES {
            let quantized = quantize_absmax(&x, granularity).unwrap();
            check(&values, &quantized.dequantize().unwrap(), quantized.scales(), cols)?;
            let quantized: ZeroPointMatrix = quantize_zero_point(&x, granularity).unwrap();
            check(&values, &quantized.dequantize().unwrap(), &quantized.scales, cols)?;
        }
        let quantized = quantize_activations(&x, None).unwrap();
        check(&values, &quantized.dequantize().unwrap(), quantized.scales(), cols)?;
    }
}

fn check(values: &[f32], back: &Tensor, scales: &Tensor, cols: usize) -> std::result::Result<(), TestCaseError> {
    let back = back.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let scales = scales.to_vec1::<f32>().unwrap();
    for (index, (&x, &back)) in values.iter().zip(&back).enumerate() {
        let scale = scales[index / cols];
        let error = (f64::from(x) - f64::from(back)).abs();
        prop_assert!(error <= bound(x, scale), "{x:e} came back as {back:e}, scale {scale:e}");
    }
    Ok(())
}

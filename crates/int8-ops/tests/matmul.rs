//! The LLM.int8() product and the 16-bit product against the method written out as plain loops.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use half::f16;
use int8_ops::cpu::Kernels;
use int8_ops::{
    Activation, FloatLinear, Fused, Int8Linear, Int8LinearGroup, Int8Matrix, LayerNorm, OUTLIER_THRESHOLD, add,
    float_matmul, float_matmul_with, int8_matmul, int8_matmul_with, outlier_columns, quantize_activations,
};
use proptest::prelude::*;

/// One sequence (tokens, cols), as plain vectors.
type Rows = Vec<Vec<f32>>;

/// LLM.int8() one step after the other, with nothing shared with the ops.
fn plain_llm_int8(x: &Rows, weight: &Rows, bias: &[f32], threshold: Option<f32>) -> Rows {
    let is_outlier = |v: f32| threshold.is_some_and(|threshold| v.abs() >= threshold);
    let absmax = |row: &[f32]| row.iter().filter(|v| !is_outlier(**v)).fold(0f32, |max, v| max.max(v.abs()));
    let weight_absmax = |row: &[f32]| row.iter().fold(0f32, |max, v| max.max(v.abs()));
    // A power of two changes no code, and keeps the reciprocal of a tiny absmax finite.
    let lift = |absmax: f32| if absmax < 1e-30 { 2f32.powi(63) } else { 1.0 };
    let code = |v: f32, absmax: f32| match absmax {
        0.0 => 0,
        _ => (v * lift(absmax) * (127.0 / (absmax * lift(absmax)))).round_ties_even() as i32,
    };
    let outlier: Vec<bool> = (0..x[0].len()).map(|c| x.iter().any(|row| is_outlier(row[c]))).collect();
    x.iter()
        .map(|x| {
            let x_absmax = absmax(x);
            weight
                .iter()
                .zip(bias)
                .map(|(w, bias)| {
                    let w_absmax = weight_absmax(w);
                    let (w_scale, x_scale) = (w_absmax / 127.0, x_absmax / 127.0);
                    let mut sum = 0i32;
                    let mut outliers = 0f32;
                    for c in 0..x.len() {
                        let w_code = code(w[c], w_absmax);
                        if outlier[c] {
                            outliers += x[c] * w_code as f32;
                        } else {
                            sum += code(x[c], x_absmax) * w_code;
                        }
                    }
                    w_scale * (sum as f32 * x_scale + outliers) + bias
                })
                .collect()
        })
        .collect()
}

fn tensor(rows: &Rows) -> Tensor {
    Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
}

fn matrix(rows: usize, cols: usize, value: impl Strategy<Value = f32> + Clone) -> impl Strategy<Value = Rows> {
    prop::collection::vec(prop::collection::vec(value, cols), rows)
}

/// Mostly small values, a few outliers, zeros and extremes.
fn activation() -> impl Strategy<Value = f32> + Clone {
    let odd = prop_oneof![Just(0.0f32), Just(-0.0), Just(6.0), Just(1e-41), Just(1e30), Just(-1e30)];
    prop_oneof![40 => -3f32..3.0, 1 => -60f32..60.0, 1 => odd]
}

/// Some rows of zeros, and some of outliers only.
fn activations(tokens: usize, cols: usize) -> impl Strategy<Value = Rows> {
    let row = prop_oneof![
        6 => prop::collection::vec(activation(), cols),
        1 => prop::collection::vec(prop_oneof![Just(0.0f32), Just(-0.0)], cols),
        1 => prop::collection::vec(prop_oneof![6f32..90.0, -90f32..-6.0], cols),
    ];
    prop::collection::vec(row, tokens)
}

fn case() -> impl Strategy<Value = (Rows, Rows, Vec<f32>)> {
    let cols = prop_oneof![1..40usize, Just(63), Just(64), Just(65), Just(131)];
    let rows = prop_oneof![1..12usize, Just(64), Just(67)];
    (1..20usize, rows, cols).prop_flat_map(|(tokens, rows, cols)| {
        (activations(tokens, cols), matrix(rows, cols, -1f32..1.0), prop::collection::vec(-1f32..1.0, rows))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_product_is_the_method_bit_for_bit_on_every_instruction_set(
        (x, weight, bias) in case(),
        threshold in prop_oneof![Just(Some(OUTLIER_THRESHOLD)), Just(None), Just(Some(1e-3f32))],
    ) {
        let wanted = plain_llm_int8(&x, &weight, &bias, threshold);
        let quantized = Int8Matrix::quantize(&tensor(&weight)).unwrap();
        let bias = Tensor::new(bias, &Device::Cpu).unwrap();
        for kernels in Kernels::available() {
            let y = int8_matmul_with(kernels, &tensor(&x), &[(&quantized, Some(&bias))], threshold).unwrap();
            prop_assert_eq!(&y.to_vec2::<f32>().unwrap(), &wanted, "{}", kernels.name);
        }
    }

    #[test]
    fn the_float_product_is_right_to_rounding((x, weight, bias) in case()) {
        let x = x.into_iter().map(|row| row.into_iter().map(|v| v.clamp(-9.0, 9.0)).collect()).collect::<Rows>();
        let weight = tensor(&weight);
        let bias = Tensor::new(bias, &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let narrow = weight.to_dtype(dtype).unwrap();
            let wide = narrow.to_dtype(DType::F64).unwrap();
            let wanted = tensor(&x).to_dtype(DType::F64).unwrap().matmul(&wide.t().unwrap()).unwrap();
            let wanted = wanted.broadcast_add(&bias.to_dtype(DType::F64).unwrap()).unwrap().to_vec2::<f64>().unwrap();
            for kernels in Kernels::available() {
                let y = float_matmul_with(kernels, &tensor(&x), &narrow, Some(&bias)).unwrap().to_vec2::<f32>().unwrap();
                for (y, wanted) in y.iter().flatten().zip(wanted.iter().flatten()) {
                    prop_assert!((f64::from(*y) - wanted).abs() < 1e-4, "{}: {} for {}", kernels.name, y, wanted);
                }
            }
        }
    }
}

/// (tokens, cols) that no column of is an outlier, by a fixed rule.
fn small_values(tokens: usize, cols: usize) -> Result<Tensor> {
    let values = (0..tokens * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect::<Vec<_>>();
    Tensor::from_vec(values, (tokens, cols), &Device::Cpu)
}

#[test]
fn a_planted_outlier_column_stays_in_float() -> Result<()> {
    let (tokens, cols) = (5, 48);
    let mut x = small_values(tokens, cols)?.to_vec2::<f32>()?;
    x[3][17] = -61.7;
    let x = tensor(&x);
    assert_eq!(outlier_columns(&x, OUTLIER_THRESHOLD)?, [[17]]);
    let codes = quantize_activations(&x, Some(OUTLIER_THRESHOLD))?;
    assert_eq!(codes.codes()?.narrow(1, 17, 1)?.flatten_all()?.to_vec1::<u8>()?, [0; 5]);

    let weight = Int8Matrix::quantize(&small_values(cols, cols)?.affine(0.1, 0.003)?)?;
    let exact = x.matmul(&weight.dequantize()?.t()?)?;
    let error = |threshold| -> Result<f32> {
        (int8_matmul(&x, &weight, None, threshold)? - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()
    };
    let (with, without) = (error(Some(OUTLIER_THRESHOLD))?, error(None)?);
    assert!(with * 10.0 < without, "with decomposition {with}, without {without}");
    Ok(())
}

#[test]
fn values_under_the_threshold_in_an_outlier_column_still_count_for_the_absmax() -> Result<()> {
    // As in bitsandbytes: only outlier elements are left out of a row's absmax.
    let x = Tensor::new(&[[5.0f32, 1.0], [7.0, 2.0]], &Device::Cpu)?;
    let codes = quantize_activations(&x, Some(OUTLIER_THRESHOLD))?;
    assert_eq!(codes.scales().to_vec1::<f32>()?, [5.0 / 127.0, 2.0 / 127.0]);
    assert_eq!(codes.codes()?.to_vec2::<u8>()?, [[0, 25], [0, 127]]);
    Ok(())
}

#[test]
fn rows_of_outliers_only_and_rows_of_zeros_have_codes_of_zero() -> Result<()> {
    let x = Tensor::new(&[[9.0f32, -80.0, 6.0], [0.0, -0.0, 0.0]], &Device::Cpu)?;
    let codes = quantize_activations(&x, Some(OUTLIER_THRESHOLD))?;
    assert_eq!(codes.codes()?.to_vec2::<u8>()?, [[0; 3]; 2]);
    assert_eq!(codes.scales().to_vec1::<f32>()?, [0.0; 2]);
    let weight = Int8Matrix::quantize(&Tensor::new(&[[1f32, 1.0, 1.0], [0.0, 0.0, 0.0]], &Device::Cpu)?)?;
    let y = int8_matmul(&x, &weight, None, Some(OUTLIER_THRESHOLD))?.to_vec2::<f32>()?;
    assert_eq!(y, [[-65.0, 0.0], [0.0, 0.0]]);
    Ok(())
}

#[test]
fn a_nan_in_the_activations_reaches_the_output() -> Result<()> {
    let x = Tensor::new(&[[1f32, f32::NAN, 2.0], [1.0, 2.0, 3.0]], &Device::Cpu)?;
    let weight = Int8Matrix::quantize(&small_values(4, 3)?)?;
    for threshold in [None, Some(OUTLIER_THRESHOLD)] {
        let y = int8_matmul(&x, &weight, None, threshold)?.to_vec2::<f32>()?;
        assert!(y[0].iter().all(|y| y.is_nan()), "{y:?}");
        assert!(y[1].iter().all(|y| y.is_finite()), "{y:?}");
    }
    Ok(())
}

#[test]
fn what_shares_a_batch_with_a_sequence_does_not_change_its_result() -> Result<()> {
    let (tokens, cols) = (6, 80);
    let calm = small_values(tokens, cols)?;
    let mut wild = calm.to_vec2::<f32>()?;
    (wild[0][3], wild[5][71]) = (40.0, -9.0);
    let batch = Tensor::stack(&[calm.clone(), tensor(&wild)], 0)?;
    assert_eq!(outlier_columns(&batch, OUTLIER_THRESHOLD)?, [vec![], vec![3, 71]]);
    let layer = Int8Linear::new(Int8Matrix::quantize(&small_values(70, cols)?)?, None, Some(OUTLIER_THRESHOLD))?;
    let together = layer.forward(&batch)?;
    assert_eq!(together.get(0)?.to_vec2::<f32>()?, layer.forward(&calm)?.to_vec2::<f32>()?);
    assert_eq!(together.get(1)?.to_vec2::<f32>()?, layer.forward(&tensor(&wild))?.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn no_tokens_give_no_outputs() -> Result<()> {
    let [weight, other] = [30, 5].map(|rows| small_values(rows, 40).unwrap());
    let [codes, other] = [&weight, &other].map(|weight| Int8Matrix::quantize(weight).unwrap());
    for dims in [&[0, 40][..], &[2, 0, 40], &[0, 3, 40]] {
        let x = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        let with_width = |width: usize| [&dims[..dims.len() - 1], &[width]].concat();
        assert_eq!(int8_matmul(&x, &codes, None, Some(OUTLIER_THRESHOLD))?.dims(), with_width(30));
        assert_eq!(int8_matmul(&x, &codes, None, None)?.dims(), with_width(30));
        assert_eq!(float_matmul(&x, &weight, None)?.dims(), with_width(30));
        for kernels in Kernels::available() {
            let group = int8_matmul_with(kernels, &x, &[(&codes, None), (&other, None)], Some(OUTLIER_THRESHOLD))?;
            assert_eq!(group.dims(), with_width(35));
        }
    }
    Ok(())
}

#[test]
fn layers_of_many_blocks_are_the_method_bit_for_bit_on_every_instruction_set() -> Result<()> {
    // Several parts for the threads; several blocks of columns, and of tokens.
    for (tokens, cols, rows) in
        [(1, 1100, 200), (3, 1100, 200), (9, 5201, 70), (14, 1100, 130), (1025, 70, 67), (1032, 70, 67), (1100, 70, 67)]
    {
        let mut x = small_values(tokens, cols)?.to_vec2::<f32>()?;
        (x[0][3], x[tokens / 2][cols - 1], x[tokens - 1][cols / 2]) = (40.0, -9.0, 6.0);
        let weights = [rows, 5].map(|rows| small_values(rows, cols).unwrap().affine(0.01, 0.003).unwrap());
        // Exact in 16 bits as well.
        let bias: Vec<f32> = (0..rows).map(|row| row as f32 / 8.0).collect();
        let [first, second] = weights.map(|weight| weight.to_vec2::<f32>().unwrap());
        let mut wanted = plain_llm_int8(&x, &first, &bias, Some(OUTLIER_THRESHOLD));
        for (row, more) in wanted.iter_mut().zip(plain_llm_int8(&x, &second, &[0.0; 5], Some(OUTLIER_THRESHOLD))) {
            row.extend(more);
        }
        let bias = Tensor::new(bias, &Device::Cpu)?;
        let [first, second] = [first, second].map(|weight| Int8Matrix::quantize(&tensor(&weight)).unwrap());
        for (kernels, dtype) in
            Kernels::available().flat_map(|kernels| [DType::F32, DType::F16, DType::BF16].map(|dtype| (kernels, dtype)))
        {
            let bias = bias.to_dtype(dtype)?;
            let y = int8_matmul_with(
                kernels,
                &tensor(&x),
                &[(&first, Some(&bias)), (&second, None)],
                Some(OUTLIER_THRESHOLD),
            )?;
            assert_eq!(y.to_vec2::<f32>()?, wanted, "{}: {tokens} tokens, bias in {dtype:?}", kernels.name);
        }
    }
    Ok(())
}

#[test]
fn layers_that_share_their_input_give_what_each_gives_alone() -> Result<()> {
    let layer = |outputs: usize, threshold| -> Result<Int8Linear> {
        let weight = Int8Matrix::quantize(&small_values(outputs, 40)?)?;
        Int8Linear::new(weight, Some(small_values(1, outputs)?.squeeze(0)?), threshold)
    };
    let layers = [3, 70, 64].map(|outputs| layer(outputs, Some(1.9)).unwrap());
    let x = small_values(21, 40)?.reshape((3, 7, 40))?;
    let alone: Vec<Tensor> = layers.iter().map(|layer| layer.forward(&x)).collect::<Result<_>>()?;
    let together = Int8LinearGroup::new(layers.to_vec())?.forward(&x)?;
    assert_eq!(together.to_vec3::<f32>()?, Tensor::cat(&alone, 2)?.to_vec3::<f32>()?);
    assert!(Int8LinearGroup::new(vec![layer(3, None)?, layer(3, Some(6.0))?]).is_err());
    assert!(Int8LinearGroup::new(Vec::new()).is_err());
    Ok(())
}

#[test]
fn strided_and_16_bit_activations_give_the_rounded_f32_result() -> Result<()> {
    let x = small_values(9, 40)?.to_dtype(DType::F16)?;
    let weight = Int8Matrix::quantize(&small_values(30, 40)?)?;
    let bias = small_values(1, 30)?.squeeze(0)?;
    let wanted = int8_matmul(&x.to_dtype(DType::F32)?, &weight, Some(&bias), Some(1.5))?;
    let rounded = wanted.to_dtype(DType::F16)?.to_vec2::<f16>()?;
    assert_eq!(int8_matmul(&x, &weight, Some(&bias), Some(1.5))?.to_vec2::<f16>()?, rounded);
    let strided = x.t()?.contiguous()?.t()?;
    assert_eq!(int8_matmul(&strided, &weight, Some(&bias), Some(1.5))?.to_vec2::<f16>()?, rounded);
    Ok(())
}

#[test]
fn what_comes_before_and_after_a_layer_is_the_same_as_ops_of_their_own_bit_for_bit() -> Result<()> {
    // One token, few and many, in several blocks of rows and of tokens; two weights side by side.
    for (tokens, cols, rows) in [(1, 70, 300), (3, 70, 300), (9, 70, 300), (40, 70, 131), (1030, 20, 67)] {
        let x = small_values(tokens, cols)?.affine(3.0, 0.1)?;
        let norm = LayerNorm::new(small_values(1, cols)?.get(0)?, small_values(2, cols)?.get(1)?, 1e-5)?;
        let weight = small_values(rows, cols)?.affine(0.1, 0.003)?;
        let bias = small_values(1, rows)?.get(0)?;
        let quantised = Int8Matrix::quantize(&weight)?;
        let threshold = Some(OUTLIER_THRESHOLD);
        let layer = Int8Linear::new(quantised.clone(), Some(bias.clone()), threshold)?;
        let group = Int8LinearGroup::new(vec![layer.clone(), Int8Linear::new(quantised, None, threshold)?])?;
        let float = FloatLinear::new(weight.to_dtype(DType::F16)?, Some(bias))?;
        let forward = |which: usize, x: &Tensor, fused: &Fused| match which {
            0 => layer.forward_fused(x, fused),
            1 => group.forward_fused(x, fused),
            _ => float.forward_fused(x, fused),
        };
        for which in 0..3 {
            let plain = forward(which, &norm.forward(&x)?, &Fused::default())?;
            let residual = small_values(tokens, plain.dim(1)?)?;
            for activation in [None, Some(Activation::Relu), Some(Activation::Gelu), Some(Activation::GeluErf)] {
                // `plain` is written over by neither of the two.
                let activated = match activation {
                    Some(activation) => activation.forward(plain.copy()?)?,
                    None => plain.copy()?,
                };
                let fused = Fused { norm: Some(&norm), activation, residual: None };
                let found = forward(which, &x, &fused)?;
                assert_eq!(found.to_vec2::<f32>()?, activated.to_vec2::<f32>()?, "{which}, {activation:?}, {tokens}");
                let found = forward(which, &x, &Fused { residual: Some(&residual), ..fused })?;
                let wanted = add(activated, &residual)?.to_vec2::<f32>()?;
                assert_eq!(found.to_vec2::<f32>()?, wanted, "{which}, {activation:?}, {tokens} with a residual");
            }
            let narrow = residual.narrow(1, 0, 3)?;
            let error = forward(which, &x, &Fused { residual: Some(&narrow), ..Fused::default() }).unwrap_err();
            assert!(error.to_string().contains(&format!("[{tokens}, {}]", plain.dim(1)?)), "{error}");
        }
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_refused_with_both_shapes() -> Result<()> {
    let weight = Int8Matrix::quantize(&small_values(30, 40)?)?;
    let error = int8_matmul(&small_values(2, 39)?, &weight, None, None).unwrap_err().to_string();
    assert!(error.contains("[2, 39]") && error.contains("(30, 40)"), "{error}");
    let bias = Tensor::zeros(29, DType::F32, &Device::Cpu)?;
    assert!(int8_matmul(&small_values(2, 40)?, &weight, Some(&bias), None).is_err());
    assert!(int8_matmul(&small_values(2, 40)?, &weight, None, Some(0.0)).is_err());
    let integers = Tensor::zeros((2, 40), DType::U32, &Device::Cpu)?;
    assert!(int8_matmul(&integers, &weight, None, None).is_err());
    let codes = FloatLinear::new(small_values(30, 40)?.to_dtype(DType::U8)?, None)?;
    assert!(codes.forward(&small_values(2, 40)?).is_err(), "the float product takes no integer weight");
    Ok(())
}

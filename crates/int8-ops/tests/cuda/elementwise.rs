use half::{bf16, f16};
use int8_ops::{Activation, add};
use kernels_on_host::Arg;
use proptest::prelude::*;

use super::support::{Float, assert_close, cases, floats, launch, tensor};

/// The kernels' numbers of activations are these places, and one.
const ACTIVATIONS: [Activation; 3] = [Activation::Relu, Activation::Gelu, Activation::GeluErf];

fn check<T: Float>(values: &[f32], offset: usize, blocks: usize, seed: u32) -> candle_core::Result<()> {
    let x: Vec<T> = floats(values);
    let other: Vec<T> = x.iter().rev().copied().collect();
    let offset = offset.min(x.len() - 1);
    let count = x.len() - offset;
    let on_cpu = |values: &[T]| tensor(&values[offset..], &[count]);

    let finish = |bias: Option<&[f16]>, width: usize, activation: usize, residual: Option<&[T]>| {
        let mut found = x.clone();
        let args = [
            (&mut found[offset..]).into(),
            bias.map_or(Arg::NULL, Arg::from),
            1.into(),
            width.into(),
            activation.into(),
            residual.map_or(Arg::NULL, Arg::from),
            (count as i64).into(),
        ];
        launch(&format!("finish_{}", T::SUFFIX), [blocks, 1, 1], 256, 0, seed, &args);
        assert!(found[..offset].iter().zip(&x).all(|(found, x)| found.float() == x.float()));
        found[offset..].to_vec()
    };
    let sums = finish(None, 1, 0, Some(&other[offset..]));
    let wanted = add(on_cpu(&x)?, &on_cpu(&other)?)?.to_vec1::<f32>()?;
    assert!(sums.iter().zip(&wanted).all(|(sum, &wanted)| sum.float() == T::of(wanted).float()));
    for (index, activation) in ACTIVATIONS.into_iter().enumerate() {
        let found = finish(None, 1, index + 1, None);
        assert_close(&found, &activation.forward(on_cpu(&x)?)?.to_vec1::<f32>()?, 1e-5, 4e-6);
    }
    // All of it: whole rows, and the beginning of one more.
    for width in [8, 13] {
        let bias: Vec<f16> = (0..width).map(|col| f16::from_f32(col as f32 / 4.0 - 1.0)).collect();
        let found = finish(Some(&bias), width, 1, Some(&other[offset..]));
        let wanted = (0..count).map(|index| {
            let biased = x[offset + index].float() + bias[index % width].to_f32();
            T::of(biased.max(0.0) + other[offset + index].float())
        });
        assert!(found.iter().zip(wanted).all(|(found, wanted)| found.float() == wanted.float()), "rows of {width}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn values_are_finished_as_on_the_cpu(
        values in prop_oneof![
            prop::collection::vec(-9f32..9.0, 1..70),
            prop::collection::vec(-9f32..9.0, 2048..5000),
        ],
        offset in prop_oneof![2 => Just(0usize), 1 => 1..9usize],
        blocks in 1..4usize,
        seed in any::<u32>(),
    ) {
        check::<f32>(&values, offset, blocks, seed).map_err(|error| TestCaseError::fail(error.to_string()))?;
        check::<f16>(&values, offset, blocks, seed).map_err(|error| TestCaseError::fail(error.to_string()))?;
        check::<bf16>(&values, offset, blocks, seed).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

use half::{bf16, f16};
use int8_ops::{Activation, add};
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

    let mut sums = x.clone();
    let args = [(&mut sums[offset..]).into(), (&other[offset..]).into(), (count as i64).into()];
    launch(&format!("add_{}", T::SUFFIX), [blocks, 1, 1], 256, 0, seed, &args);
    let wanted = add(on_cpu(&x)?, &on_cpu(&other)?)?.to_vec1::<f32>()?;
    assert!(sums[offset..].iter().zip(&wanted).all(|(sum, &wanted)| sum.float() == T::of(wanted).float()));
    assert!(sums[..offset].iter().zip(&x).all(|(sum, x)| sum.float() == x.float()));

    for (index, activation) in ACTIVATIONS.into_iter().enumerate() {
        let mut found = x.clone();
        let args = [(&mut found[offset..]).into(), (index + 1).into(), (count as i64).into()];
        launch(&format!("activate_{}", T::SUFFIX), [blocks, 1, 1], 256, 0, seed, &args);
        assert_close(&found[offset..], &activation.forward(on_cpu(&x)?)?.to_vec1::<f32>()?, 1e-5, 4e-6);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn values_are_added_and_activated_as_on_the_cpu(
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

//! What the tests of all kernels share.

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use int8_ops::Int8Matrix;
use kernels_on_host::{Arg, Config};
use proptest::prelude::ProptestConfig;

/// A float dtype that activations come in.
pub trait Float: Copy + candle_core::WithDType {
    /// What its kernels' names end in.
    const SUFFIX: &str;

    /// What rounding to it changes a value by at most, of its magnitude.
    const ROUNDING: f32;

    fn of(value: f32) -> Self;

    fn float(self) -> f32;
}

impl Float for f32 {
    const SUFFIX: &str = "f32";
    const ROUNDING: f32 = f32::EPSILON / 2.0;

    fn of(value: f32) -> Self {
        value
    }

    fn float(self) -> f32 {
        self
    }
}

impl Float for f16 {
    const SUFFIX: &str = "f16";
    const ROUNDING: f32 = 1.0 / 2048.0;

    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn float(self) -> f32 {
        self.to_f32()
    }
}

impl Float for bf16 {
    const SUFFIX: &str = "bf16";
    const ROUNDING: f32 = 1.0 / 256.0;

    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn float(self) -> f32 {
        self.to_f32()
    }
}

pub fn floats<T: Float>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::of(value)).collect()
}

/// So many cases, or fewer where `PROPTEST_CASES` is less: under sanitizers each takes long.
pub fn cases(count: u32) -> ProptestConfig {
    let most = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(count.min(most.unwrap_or(count)))
}

/// Values are the wanted ones, rounded to T, but for an error of so much, and of so much of their magnitude.
#[track_caller]
pub fn assert_close<T: Float>(found: &[T], wanted: &[f32], absolute: f32, relative: f32) {
    assert_eq!(found.len(), wanted.len());
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let bound = absolute + (relative + T::ROUNDING) * wanted.abs();
        assert!((found.float() - wanted).abs() <= bound, "value {index}: {} is not {wanted}", found.float());
    }
}

/// Runs a kernel of `grid` blocks of `threads` in one dimension, with lanes in an order that `seed` makes.
pub fn launch(name: &str, grid: [usize; 3], threads: u32, shared_bytes: usize, seed: u32, args: &[Arg]) {
    let grid = grid.map(|blocks| blocks as u32);
    let config = Config { grid, block: [threads, 1, 1], shared_bytes: shared_bytes as u32, seed };
    // SAFETY: every test gives the arguments that the kernel names in its file, of the sizes it names there.
    unsafe { kernels_on_host::launch(name, config, args) }
}

/// The codes and scales of a matrix.
pub fn parts(matrix: &Int8Matrix) -> Result<(Vec<i8>, Vec<f32>)> {
    let codes = matrix.codes()?.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|code| code as i8).collect();
    Ok((codes, matrix.scales().to_vec1()?))
}

/// (rows, cols) on the CPU in f32, of what `T` makes of the values.
pub fn tensor<T: Float>(values: &[T], dims: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, dims, &Device::Cpu)?.to_dtype(DType::F32)
}

/// Codes from an aligned address on, as a tensor's are.
pub struct Aligned {
    room: Vec<u128>,
    len: usize,
}

impl Aligned {
    pub fn of(codes: &[i8]) -> Self {
        let mut aligned = Self { room: vec![0; codes.len().div_ceil(16)], len: codes.len() };
        aligned.slice_mut().copy_from_slice(codes);
        aligned
    }

    pub fn slice(&self) -> &[i8] {
        // SAFETY: the room is as large, and more strictly aligned.
        unsafe { std::slice::from_raw_parts(self.room.as_ptr().cast(), self.len) }
    }

    pub fn slice_mut(&mut self) -> &mut [i8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.room.as_mut_ptr().cast(), self.len) }
    }
}

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use half::{bf16, f16};
use int8_ops::{Activation, Int8Matrix, LayerNorm, add, int8_matmul};
use kernels_on_host::Arg;
use proptest::prelude::*;

use super::support::{Aligned, Float, cases, floats, launch, tensor};

/// Values that a seed makes.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// From -limit to limit.
    fn float(&mut self, limit: f32) -> f32 {
        ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * limit
    }

    fn floats(&mut self, count: usize, limit: f32) -> Vec<f32> {
        (0..count).map(|_| self.float(limit)).collect()
    }
}

/// A bias, or a vector of a norm, in a dtype of its own.
enum Vector {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Vector {
    /// In the dtype that kernels call so.
    fn new(values: &[f32], dtype: i32) -> Self {
        match dtype {
            0 => Self::F32(values.to_vec()),
            1 => Self::F16(floats(values)),
            _ => Self::BF16(floats(values)),
        }
    }

    fn args(&self) -> [Arg; 2] {
        match self {
            Self::F32(values) => [values.as_slice().into(), 0i32.into()],
            Self::F16(values) => [values.as_slice().into(), 1i32.into()],
            Self::BF16(values) => [values.as_slice().into(), 2i32.into()],
        }
    }

    fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::F32(values) => Tensor::from_slice(values, values.len(), &Device::Cpu),
            Self::F16(values) => Tensor::from_slice(values, values.len(), &Device::Cpu),
            Self::BF16(values) => Tensor::from_slice(values, values.len(), &Device::Cpu),
        }
    }
}

#[derive(Debug, Clone)]
struct Case {
    sequences: usize,
    tokens_per_sequence: usize,
    rows: usize,
    cols: usize,
    /// Outliers that are planted, anywhere.
    outliers: usize,
    threshold: Option<f32>,
    bias: Option<i32>,
    activation: i32,
    residual: bool,
    /// Columns of the output before and after those of the weight.
    others: [usize; 2],
    blocks: usize,
    threads: u32,
    seed: u32,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            sequences: 1,
            tokens_per_sequence: 1,
            rows: 5,
            cols: 64,
            outliers: 2,
            threshold: Some(6.0),
            bias: None,
            activation: 0,
            residual: false,
            others: [0, 0],
            blocks: 2,
            threads: 256,
            seed: 1,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Variant {
    Plain,
    Normed,
    Codes,
    /// The kernels for one token.
    One,
    OneNormed,
}

impl Variant {
    fn is_normed(self) -> bool {
        matches!(self, Self::Normed | Self::OneNormed)
    }
}

/// Values (tokens, cols) whose mean and variance are the same in whatever order they are summed: small whole
/// eighths, each with its opposite about 1/2.
fn exactly_summed(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
    let mut values = vec![0.5; tokens * cols];
    for row in values.chunks_mut(cols) {
        for col in 0..cols / 2 {
            let value = (random.float(20.0)).round() / 8.0;
            (row[col], row[cols - 1 - col]) = (0.5 + value, 0.5 - value);
        }
    }
    values
}

impl Case {
    fn tokens(&self) -> usize {
        self.sequences * self.tokens_per_sequence
    }

    /// As the kernels' file states it.
    fn shared_bytes(&self) -> usize {
        let bits = self.sequences * self.cols.div_ceil(32) * 4;
        self.tokens().next_power_of_two() * self.cols.next_multiple_of(512) + bits
    }

    fn check<T: Float>(&self, variant: Variant) -> Result<()> {
        let (tokens, rows, cols) = (self.tokens(), self.rows, self.cols);
        let mut random = Random(self.seed.into());
        let mut values = match variant {
            Variant::Normed | Variant::OneNormed => exactly_summed(&mut random, tokens, cols),
            _ => random.floats(tokens * cols, 4.0),
        };
        if !variant.is_normed() {
            for _ in 0..self.outliers {
                let place = random.bits() as usize % values.len();
                values[place] = if random.bits().is_multiple_of(2) { 6.0 } else { -70.5 };
            }
        }
        let x: Vec<T> = floats(&values);
        let codes: Vec<i8> = (0..rows * cols).map(|_| random.bits() as i8).collect();
        let scales: Vec<f32> = random.floats(rows, 0.01);
        let bias = self.bias.map(|dtype| Vector::new(&random.floats(rows, 3.0), dtype));
        let width = self.others[0] + rows + self.others[1];
        let residual: Vec<T> = floats(&random.floats(tokens * width, 2.0));
        // A few channels of a norm are large, as they are where outliers come from.
        let mut gain = random.floats(cols, 1.5);
        for _ in 0..self.outliers {
            let place = random.bits() as usize % cols;
            gain[place] = 9.0;
        }
        let norm = [Vector::new(&gain, 1), Vector::new(&random.floats(cols, 0.5), self.bias.unwrap_or(2))];

        const UNTOUCHED: f32 = 77.0;
        let mut out = vec![T::of(UNTOUCHED); tokens * width];
        let codes = Aligned::of(&codes);
        let mut layer: Vec<Arg> = vec![codes.slice().into(), scales.as_slice().into()];
        layer.extend(bias.as_ref().map_or([Arg::NULL, 0i32.into()], Vector::args));
        layer.push(if self.residual { residual[self.others[0]..].into() } else { Arg::NULL });
        layer.push((&mut out[self.others[0]..]).into());
        match variant {
            Variant::One | Variant::OneNormed => layer.extend([rows, cols].map(Arg::from)),
            _ => layer.extend([tokens, rows, cols, width, self.tokens_per_sequence].map(Arg::from)),
        }
        let (grid, suffix) = ([self.blocks, 1, 1], T::SUFFIX);
        let threshold = self.threshold.unwrap_or(0.0);
        let (mut x_codes, mut x_scales) = (vec![0i8; tokens * cols], vec![0f32; tokens]);
        let mut bits = vec![0u32; self.sequences * cols.div_ceil(32)];
        match variant {
            Variant::Plain => {
                let mut args = vec![x.as_slice().into()];
                args.extend(layer);
                args.extend([threshold.into(), self.activation.into()]);
                launch(&format!("int8_matmul_few_{suffix}"), grid, self.threads, self.shared_bytes(), self.seed, &args);
            }
            Variant::Normed => {
                let mut args = vec![x.as_slice().into()];
                args.extend(norm.iter().flat_map(Vector::args));
                args.push(1e-5f32.into());
                args.extend(layer);
                args.extend([threshold.into(), self.activation.into()]);
                let name = format!("int8_matmul_few_normed_{suffix}");
                launch(&name, grid, self.threads, self.shared_bytes(), self.seed, &args);
            }
            Variant::One | Variant::OneNormed => {
                let mut args = vec![x.as_slice().into()];
                let mut name = "int8_matmul_one".to_string();
                if variant == Variant::OneNormed {
                    args.extend(norm.iter().flat_map(Vector::args));
                    args.push(1e-5f32.into());
                    name += "_normed";
                }
                args.extend(layer);
                args.extend([threshold.into(), self.activation.into()]);
                let shared_bytes = cols + cols / 8;
                launch(&format!("{name}_{suffix}"), grid, 512, shared_bytes, self.seed, &args);
            }
            Variant::Codes => {
                let bits: Arg = if self.threshold.is_some() { bits.as_mut_slice().into() } else { Arg::NULL };
                let Arg::Pointer(bits) = bits else { unreachable!("bits are a pointer") };
                let args = [
                    x.as_slice().into(),
                    x_codes.as_mut_slice().into(),
                    x_scales.as_mut_slice().into(),
                    Arg::Pointer(bits),
                    cols.into(),
                    self.tokens_per_sequence.into(),
                    threshold.into(),
                ];
                launch(&format!("quantize_activations_{suffix}"), [tokens, 1, 1], 256, 0, self.seed, &args);
                let mut args = vec![
                    x_codes.as_slice().into(),
                    x_scales.as_slice().into(),
                    Arg::Pointer(bits),
                    x.as_slice().into(),
                ];
                args.extend(layer);
                args.push(self.activation.into());
                launch(&format!("int8_matmul_few_codes_{suffix}"), grid, self.threads, 0, self.seed, &args);
            }
        }

        let mut x = tensor(&x, &[self.sequences, self.tokens_per_sequence, cols])?;
        if variant.is_normed() {
            let [weight, bias] = [norm[0].tensor()?, norm[1].tensor()?];
            let normed = LayerNorm::new(weight, bias, 1e-5)?.forward(&x)?.flatten_all()?.to_vec1()?;
            x = tensor(&floats::<T>(&normed), x.dims())?;
        }
        let unsigned: Vec<u8> = codes.slice().iter().map(|&code| code as u8).collect();
        let weight = Int8Matrix::new(
            Tensor::from_slice(&unsigned, (rows, cols), &Device::Cpu)?,
            Tensor::from_slice(&scales, rows, &Device::Cpu)?,
        )?;
        let bias = bias.map(|bias| bias.tensor()).transpose()?;
        let mut wanted = int8_matmul(&x, &weight, bias.as_ref(), self.threshold)?.reshape((tokens, rows))?;
        wanted = match self.activation {
            1 => Activation::Relu.forward(wanted)?,
            2 => Activation::Gelu.forward(wanted)?,
            3 => Activation::GeluErf.forward(wanted)?,
            _ => wanted,
        };
        if self.residual {
            let residual = tensor(&residual, &[tokens, width])?.narrow(1, self.others[0], rows)?;
            wanted = add(wanted, &residual.to_dtype(DType::F32)?)?;
        }
        let wanted = wanted.to_vec2::<f32>()?;
        for (token, out) in out.chunks(width).enumerate() {
            for (col, value) in out.iter().enumerate() {
                let found = value.float();
                let Some(&wanted) = col.checked_sub(self.others[0]).and_then(|row| wanted[token].get(row)) else {
                    assert_eq!(found, UNTOUCHED, "{self:?}: column {col} is not the weight's");
                    continue;
                };
                let rounded = T::of(wanted).float();
                // The two exponential functions differ in the last bits.
                let room = if self.activation > 1 {
                    4e-6 * wanted.abs().max(1.0) + (rounded - wanted).abs() * 2.0
                } else {
                    0.0
                };
                assert!(
                    (found - rounded).abs() <= room,
                    "{variant:?} {suffix} {self:?}: token {token} column {col}: {found}, not {rounded}"
                );
            }
        }
        Ok(())
    }

    fn check_all(&self) {
        for variant in [Variant::Plain, Variant::Normed, Variant::Codes] {
            if variant != Variant::Codes && (self.tokens() > 8 || self.threads < 256) {
                continue;
            }
            self.check::<f32>(variant).expect("f32");
            self.check::<f16>(variant).expect("f16");
            self.check::<bf16>(variant).expect("bf16");
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let cols = prop_oneof![Just(64usize), Just(528), Just(1040), 1..70usize, Just(515), Just(1026)];
    let tokens = prop_oneof![Just((1usize, 1usize)), (1..3usize, 1..5usize), Just((8, 1)), Just((1, 6)), Just((3, 1))];
    let vectors = (prop_oneof![Just(None), Just(Some(0)), Just(Some(1)), Just(Some(2))], 0..4i32, any::<bool>());
    let more = (prop_oneof![0..4usize, Just(200)], any::<bool>(), 0..3usize, 0..3usize, any::<u32>());
    (cols, tokens, 1..40usize, 1..4usize, vectors, more).prop_map(
        |(cols, (sequences, tokens_per_sequence), rows, blocks, (bias, activation, residual), more)| {
            let (outliers, has_threshold, before, after, seed) = more;
            Case {
                sequences,
                tokens_per_sequence,
                rows,
                cols,
                outliers,
                threshold: has_threshold.then_some(6.0),
                bias,
                activation,
                residual,
                others: [before, after],
                blocks,
                threads: 256,
                seed,
            }
        },
    )
}

proptest! {
    #![proptest_config(cases(5))]

    #[test]
    fn few_tokens_are_multiplied_as_on_the_cpu(case in case()) {
        case.check_all();
    }
}

#[test]
fn a_lone_token_is_multiplied_by_every_share_of_rows_and_columns() {
    // Rows for every warp and more; few rows, whose columns warps share; more blocks than rows.
    for (rows, cols, blocks) in [(40, 528, 2), (3, 4160, 1), (3, 2048, 7), (9, 3584, 1)] {
        let case = Case { rows, cols, blocks, ..Case::default() };
        case.check::<f32>(Variant::Plain).expect("plain");
        case.check::<f16>(Variant::Codes).expect("codes");
    }
    let case = Case { rows: 37, cols: 1536, blocks: 1, threads: 1024, bias: Some(1), ..Case::default() };
    case.check::<bf16>(Variant::Normed).expect("normed");
}

#[test]
fn one_token_takes_pieces_of_its_rows() {
    // Several rows in a piece, one, and rows in two to eight parts, also of which a warp has several in turn; more rows
    // than threads.
    let sizes = [(70, 512, 2), (37, 1024, 3), (9, 1536, 2), (7, 5120, 3), (530, 512, 1)];
    let of_parts = [(40, 2560, 1), (23, 8704, 1), (5, 16_384, 2)];
    for (rows, cols, blocks) in sizes.into_iter().chain(of_parts) {
        let case = Case { rows, cols, blocks, bias: Some(0), outliers: 12, ..Case::default() };
        case.check::<f32>(Variant::One).expect("one");
        let case = Case { bias: Some(2), residual: true, activation: 1, others: [1, 2], outliers: 3, ..case };
        case.check::<f16>(Variant::One).expect("one");
        case.check::<bf16>(Variant::OneNormed).expect("one, normed");
    }
    let case = Case { rows: 3, cols: 1024, outliers: 400, blocks: 5, activation: 2, ..Case::default() };
    case.check::<f32>(Variant::One).expect("many outliers");
    Case { threshold: None, ..case.clone() }.check::<f16>(Variant::One).expect("no threshold");
    Case { threshold: Some(1e-6), rows: 40, ..case }.check::<f32>(Variant::OneNormed).expect("all outliers");
}

#[test]
fn up_to_8_tokens_are_quantised_at_once() {
    for (tokens_per_sequence, cols) in [(2, 1040), (4, 528), (5, 1040), (8, 515), (3, 1026)] {
        let case = Case { tokens_per_sequence, cols, bias: Some(0), residual: true, others: [1, 2], ..Case::default() };
        case.check::<f32>(Variant::Plain).expect("plain");
        case.check::<f16>(Variant::Normed).expect("normed");
    }
}

#[test]
fn up_to_16_tokens_have_codes() {
    for (sequences, tokens_per_sequence) in [(16, 1), (3, 3), (1, 5), (3, 1)] {
        let case = Case { sequences, tokens_per_sequence, cols: 1040, outliers: 9, bias: Some(2), ..Case::default() };
        Case { rows: 13, ..case }.check::<f32>(Variant::Codes).expect("f32");
    }
    let case = Case { tokens_per_sequence: 16, rows: 70, cols: 80, blocks: 1, threads: 512, ..Case::default() };
    case.check::<f16>(Variant::Codes).expect("f16");
}

#[test]
fn every_column_may_be_an_outlier() {
    for (cols, tokens_per_sequence) in [(96, 3), (33, 1), (31, 3), (640, 1)] {
        let case =
            Case { tokens_per_sequence, sequences: 2, cols, outliers: 0, threshold: Some(1e-6), ..Case::default() };
        case.check_all();
    }
}

#[test]
fn outliers_of_one_sequence_are_not_those_of_another() {
    let case = Case {
        sequences: 4,
        tokens_per_sequence: 2,
        rows: 18,
        cols: 128,
        outliers: 150,
        bias: Some(0),
        ..Case::default()
    };
    case.check_all();
}

#[test]
fn a_norm_of_any_values_is_as_near_as_rounding_allows() {
    // What a token's output is does not depend on what else is in the batch, bit for bit.
    let (rows, cols, tokens) = (6, 272, 5);
    let mut random = Random(5);
    let x = random.floats(tokens * cols, 3.0);
    let norm = [random.floats(cols, 2.0), random.floats(cols, 1.0)];
    let codes: Vec<i8> = (0..rows * cols).map(|_| random.bits() as i8).collect();
    let scales = random.floats(rows, 0.01);
    let run = |first: usize, count: usize| {
        let mut out = vec![0f32; count * rows];
        let case = Case { sequences: count, rows, cols, ..Case::default() };
        let mut args = vec![x[first * cols..].into()];
        args.extend(norm.iter().flat_map(|vector| [vector.as_slice().into(), 0i32.into()]));
        args.extend([
            1e-5f32.into(),
            codes.as_slice().into(),
            scales.as_slice().into(),
            Arg::NULL,
            0i32.into(),
            Arg::NULL,
        ]);
        args.push(out.as_mut_slice().into());
        args.extend([count, rows, cols, rows, 1].map(Arg::from));
        args.extend([6f32.into(), 0i32.into()]);
        launch("int8_matmul_few_normed_f32", [2, 1, 1], 256, case.shared_bytes(), 3, &args);
        out
    };
    let together = run(0, tokens);
    let apart: Vec<f32> = (0..tokens).flat_map(|token| run(token, 1)).collect();
    assert_eq!(together, apart);

    let vector = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu).expect("a vector");
    let check = || -> Result<()> {
        let x = Tensor::from_slice(&x, (tokens, 1, cols), &Device::Cpu)?;
        let normed = LayerNorm::new(vector(&norm[0]), vector(&norm[1]), 1e-5)?.forward(&x)?;
        let unsigned: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
        let weight = Int8Matrix::new(Tensor::from_slice(&unsigned, (rows, cols), &Device::Cpu)?, vector(&scales))?;
        let wanted = int8_matmul(&normed, &weight, None, Some(6.0))?.flatten_all()?.to_vec1::<f32>()?;
        for (found, wanted) in together.iter().zip(&wanted) {
            // A value between two codes may get either: up to 0.05 * 1.28 of an output.
            assert!((found - wanted).abs() <= 0.13 + 1e-5 * wanted.abs(), "{found}, not {wanted}");
        }
        Ok(())
    };
    check().expect("compared");
}

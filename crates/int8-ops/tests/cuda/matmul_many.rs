use candle_core::{Device, Tensor};
use half::{bf16, f16};
use int8_ops::{Activation, Int8Matrix, int8_matmul};
use kernels_on_host::Arg;
use proptest::prelude::*;

use super::support::{Aligned, Float, cases, floats, launch, tensor};

/// One of the kernels, and how it is launched.
#[derive(Debug, Clone, Copy)]
struct Tile {
    kernel: &'static str,
    tokens: usize,
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

const LARGE: Tile = Tile { kernel: "int8_matmul_many", tokens: 128, rows: 256, threads: 256, shared_bytes: 98_560 };
const MEDIUM: Tile =
    Tile { kernel: "int8_matmul_many_medium", tokens: 128, rows: 128, threads: 128, shared_bytes: 49_408 };
const SMALL: Tile = Tile { kernel: "int8_matmul_many_small", tokens: 64, rows: 64, threads: 128, shared_bytes: 49_408 };

const HOPPER: [Tile; 2] = [
    Tile { kernel: "int8_matmul_hopper", tokens: 128, rows: 256, threads: 256, shared_bytes: 197_888 },
    Tile { kernel: "int8_matmul_hopper_small", tokens: 128, rows: 128, threads: 256, shared_bytes: 99_584 },
];

#[derive(Debug, Clone, Copy)]
struct Case {
    sequences: usize,
    tokens: usize,
    rows: usize,
    cols: usize,
    /// Columns of the output that are not this weight's, before and behind.
    others: (usize, usize),
    /// Outliers that are planted.
    outliers: usize,
    /// Whether every column has one besides.
    all_columns: bool,
    threshold: Option<f32>,
    /// 0 for f32, 1 for f16, 2 for bf16.
    bias: Option<i32>,
    residual: bool,
    activation: Option<Activation>,
    seed: u32,
}

const PLAIN: Case = Case {
    sequences: 1,
    tokens: 70,
    rows: 72,
    cols: 160,
    others: (0, 0),
    outliers: 3,
    all_columns: false,
    threshold: Some(6.0),
    bias: None,
    residual: false,
    activation: None,
    seed: 1,
};

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize
    }

    /// From -1 to 1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn floats<T: Float>(&mut self, len: usize, size: f32) -> Vec<T> {
        (0..len).map(|_| T::of(size * self.float())).collect()
    }
}

/// A kernel's outputs beside those of the CPU's op, bit for bit; with GELU to rounding.
fn check<T: Float>(tile: Tile, case: Case) -> candle_core::Result<()> {
    let Case { sequences, tokens, rows, cols, .. } = case;
    let (all_tokens, words) = (sequences * tokens, cols.div_ceil(32));
    let mut numbers = Numbers(u64::from(case.seed) + 1);
    let mut values: Vec<f32> = numbers.floats(all_tokens * cols, 4.0);
    for _ in 0..case.outliers {
        let at = numbers.next() % values.len();
        values[at] = 30.0 * numbers.float().signum() + numbers.float();
    }
    if case.all_columns {
        for col in 0..cols {
            values[numbers.next() % all_tokens * cols + col] = 6.0 + numbers.float().abs();
        }
    }
    let x: Vec<T> = floats(&values);
    // Whole numbers of all 256, -128 too: a stored weight may have it.
    let codes: Vec<i8> = (0..rows * cols).map(|_| numbers.next() as i8).collect();
    let scales: Vec<f32> = (0..rows).map(|_| 0.01 * numbers.float().abs()).collect();
    let bias: Vec<f32> = numbers.floats(rows, 2.0);
    let (bias_f16, bias_bf16): (Vec<f16>, Vec<bf16>) = (floats(&bias), floats(&bias));

    // Outputs that lie as a tensor's do, from an aligned address on.
    let (before, behind) = case.others;
    let width = before + rows + behind;
    let mut room = vec![0u128; (all_tokens * width * size_of::<T>()).div_ceil(16)];
    // SAFETY: the room is as large, more strictly aligned, and any bits are a float.
    let out = unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<T>(), all_tokens * width) };
    out.fill(T::of(-7.0));
    let residual_values: Vec<f32> = numbers.floats(all_tokens * width, 3.0);
    let mut residual_room = vec![0u128; room.len()];
    // SAFETY: as above.
    let residual =
        unsafe { std::slice::from_raw_parts_mut(residual_room.as_mut_ptr().cast::<T>(), all_tokens * width) };
    residual.copy_from_slice(&floats(&residual_values));

    let (mut x_codes, weight) = (Aligned::of(&vec![0; all_tokens * cols]), Aligned::of(&codes));
    let (mut x_scales, mut bits) = (vec![0f32; all_tokens], vec![0u32; sequences * words]);
    let quantize = [
        x.as_slice().into(),
        x_codes.slice_mut().into(),
        x_scales.as_mut_slice().into(),
        if case.threshold.is_some() { bits.as_mut_slice().into() } else { Arg::NULL },
        cols.into(),
        tokens.into(),
        case.threshold.unwrap_or(0.0).into(),
    ];
    launch(&format!("quantize_activations_{}", T::SUFFIX), [all_tokens, 1, 1], 256, 0, case.seed, &quantize);

    let args = [
        x_codes.slice().into(),
        x_scales.as_slice().into(),
        if case.threshold.is_some() { bits.as_slice().into() } else { Arg::NULL },
        x.as_slice().into(),
        weight.slice().into(),
        scales.as_slice().into(),
        match case.bias {
            None => Arg::NULL,
            Some(0) => bias.as_slice().into(),
            Some(1) => bias_f16.as_slice().into(),
            Some(_) => bias_bf16.as_slice().into(),
        },
        case.bias.unwrap_or(0).into(),
        if case.residual { residual[before..].into() } else { Arg::NULL },
        (&mut out[before..]).into(),
        all_tokens.into(),
        rows.into(),
        cols.into(),
        width.into(),
        tokens.into(),
        case.activation.map_or(0, |activation| activation as i32 + 1).into(),
    ];
    let blocks = all_tokens.div_ceil(tile.tokens) * rows.div_ceil(tile.rows);
    let name = format!("{}_{}", tile.kernel, T::SUFFIX);
    launch(&name, [blocks, 1, 1], tile.threads, tile.shared_bytes, case.seed, &args);

    let bias = match case.bias {
        None => None,
        Some(0) => Some(Tensor::from_slice(&bias, rows, &Device::Cpu)?),
        Some(1) => Some(Tensor::from_slice(&bias_f16, rows, &Device::Cpu)?),
        Some(_) => Some(Tensor::from_slice(&bias_bf16, rows, &Device::Cpu)?),
    };
    let wanted = on_the_cpu(&tensor(&x, &[sequences, tokens, cols])?, &codes, scales, bias.as_ref(), case)?;
    for (token, (outs, wanted)) in out.chunks(width).zip(wanted.chunks(rows)).enumerate() {
        for (place, &found) in outs.iter().enumerate() {
            let Some(&wanted) = place.checked_sub(before).and_then(|row| wanted.get(row)) else {
                assert_eq!(found.float(), -7.0, "token {token} place {place} is another weight's");
                continue;
            };
            let other = if case.residual { residual[token * width + place].float() } else { 0.0 };
            let wanted = T::of(wanted + other).float();
            let near = match case.activation {
                None | Some(Activation::Relu) => 0.0,
                // The functions differ in the last bits, which may turn a rounding to 16 bits.
                _ if size_of::<T>() == 4 => 1e-5 * wanted.abs().max(1.0),
                _ => 1e-5 + wanted.abs() / 120.0,
            };
            let found = found.float();
            assert!((found - wanted).abs() <= near, "{name}, {case:?}: token {token} place {place}: {found}, {wanted}");
        }
    }
    Ok(())
}

/// (tokens, rows), of f32 activations.
fn on_the_cpu(
    x: &Tensor,
    codes: &[i8],
    scales: Vec<f32>,
    bias: Option<&Tensor>,
    case: Case,
) -> candle_core::Result<Vec<f32>> {
    let bytes: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
    let codes = Tensor::from_vec(bytes, (case.rows, case.cols), &Device::Cpu)?;
    let weight = Int8Matrix::new(codes, Tensor::from_vec(scales, case.rows, &Device::Cpu)?)?;
    let product = int8_matmul(x, &weight, bias, case.threshold)?;
    let activated = match case.activation {
        Some(activation) => activation.forward(product)?,
        None => product,
    };
    activated.flatten_all()?.to_vec1()
}

#[test]
fn tiles_of_every_size_give_what_the_cpu_gives() -> candle_core::Result<()> {
    check::<f32>(SMALL, PLAIN)?;
    check::<f16>(SMALL, Case { tokens: 64, rows: 64, cols: 512, ..PLAIN })?;
    check::<bf16>(SMALL, Case { bias: Some(2), ..PLAIN })?;
    check::<f32>(MEDIUM, Case { rows: 130, cols: 80, bias: Some(1), ..PLAIN })?;
    check::<f32>(LARGE, Case { tokens: 129, rows: 264, cols: 320, ..PLAIN })?;
    check::<f16>(LARGE, Case { tokens: 17, rows: 256, cols: 272, bias: Some(0), ..PLAIN })
}

#[test]
fn many_tiles_are_each_made_once() -> candle_core::Result<()> {
    // More tiles of tokens than stand together, the last ones fewer.
    check::<f16>(SMALL, Case { tokens: 18 * 64 + 3, rows: 70, cols: 16, outliers: 0, ..PLAIN })
}

#[test]
fn a_tile_may_hold_the_ends_of_several_sequences() -> candle_core::Result<()> {
    check::<f32>(SMALL, Case { sequences: 5, tokens: 29, outliers: 12, ..PLAIN })?;
    check::<bf16>(SMALL, Case { sequences: 70, tokens: 1, outliers: 20, ..PLAIN })?;
    check::<f32>(MEDIUM, Case { sequences: 3, tokens: 50, outliers: 9, ..PLAIN })?;
    check::<f16>(LARGE, Case { sequences: 2, tokens: 21, rows: 300, cols: 64, outliers: 5, ..PLAIN })
}

#[test]
fn any_number_of_outlier_columns_is_right() -> candle_core::Result<()> {
    for tile in [SMALL, LARGE] {
        let case = Case { sequences: 2, tokens: 40, rows: 136, cols: 96, ..PLAIN };
        check::<f32>(tile, Case { threshold: None, ..case })?;
        check::<f32>(tile, Case { outliers: 0, ..case })?;
        check::<f32>(tile, Case { outliers: 60, ..case })?;
        check::<f16>(tile, Case { all_columns: true, ..case })?;
    }
    // More words of bits than threads.
    check::<bf16>(SMALL, Case { tokens: 17, rows: 9, cols: 4160, outliers: 40, ..PLAIN })?;
    check::<f32>(MEDIUM, Case { tokens: 17, rows: 40, cols: 64, all_columns: true, ..PLAIN })
}

#[test]
fn rows_of_a_weight_need_not_be_aligned() -> candle_core::Result<()> {
    for cols in [1, 15, 33, 100, 257] {
        check::<f32>(SMALL, Case { tokens: 19, rows: 67, cols, outliers: 1, ..PLAIN })?;
    }
    check::<bf16>(LARGE, Case { sequences: 2, tokens: 65, rows: 259, cols: 70, ..PLAIN })
}

#[test]
fn what_follows_the_product_is_done_before_the_one_rounding() -> candle_core::Result<()> {
    let [relu, gelu, gelu_erf] = [Activation::Relu, Activation::Gelu, Activation::GeluErf].map(Some);
    let case = Case { rows: 80, others: (16, 8), bias: Some(0), residual: true, ..PLAIN };
    check::<f32>(SMALL, case)?;
    check::<f16>(SMALL, Case { activation: relu, ..case })?;
    check::<bf16>(SMALL, Case { activation: relu, others: (3, 2), bias: Some(1), ..case })?;
    check::<f32>(SMALL, Case { activation: gelu, residual: false, ..case })?;
    check::<f32>(SMALL, Case { activation: gelu_erf, others: (0, 1), bias: None, ..case })?;
    check::<f16>(SMALL, Case { activation: gelu_erf, bias: Some(2), ..case })?;
    check::<bf16>(LARGE, Case { rows: 270, cols: 64, others: (8, 2), activation: relu, ..case })?;
    check::<bf16>(MEDIUM, Case { rows: 270, cols: 64, ..case })
}

#[test]
fn products_of_warpgroups_give_what_the_cpu_gives() -> candle_core::Result<()> {
    for tile in HOPPER {
        // Fewer columns than a stage, as many, and more than all stages.
        check::<f32>(tile, Case { tokens: 70, rows: 72, cols: 48, ..PLAIN })?;
        check::<f16>(tile, Case { tokens: 195, rows: 257, cols: 128, bias: Some(0), ..PLAIN })?;
        check::<f32>(tile, Case { tokens: 17, rows: 260, cols: 656, outliers: 30, ..PLAIN })?;
        // None, more than are looked at together, and all columns, of several sequences.
        let case = Case { sequences: 3, tokens: 50, rows: 136, cols: 96, ..PLAIN };
        check::<bf16>(tile, Case { outliers: 0, threshold: None, ..case })?;
        check::<f32>(tile, Case { outliers: 60, ..case })?;
        check::<f16>(tile, Case { all_columns: true, ..case })?;
        let case = Case { rows: 136, others: (16, 8), bias: Some(1), residual: true, ..PLAIN };
        check::<f32>(tile, Case { others: (3, 2), ..case })?;
        check::<bf16>(tile, Case { activation: Some(Activation::Relu), ..case })?;
        check::<f16>(tile, Case { activation: Some(Activation::Gelu), ..case })?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(8))]

    #[test]
    fn sizes_of_any_kind_are_right(
        (sequences, tokens, rows, cols) in (1..4usize, 1..60usize, 1..140usize, 1..200usize),
        (before, behind, outliers, seed) in (0..9usize, 0..9usize, 0..40usize, any::<u32>()),
        (bias, residual) in (prop::option::of(0..3i32), any::<bool>()),
    ) {
        let others = (before, behind);
        let case = Case { sequences, tokens, rows, cols, others, outliers, bias, residual, seed, ..PLAIN };
        let checked = match seed % 3 {
            0 => check::<f32>(SMALL, case),
            1 => check::<f16>(SMALL, case),
            _ => check::<bf16>(SMALL, case),
        };
        checked.map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

//! The CPU path: kernels for each instruction set, chosen at run time, and the loops around them.
//!
//! A kernel is a plain function on slices. Every instruction set fills the same table, [`Kernels`];
//! codes and integer sums are the same bit for bit in all of them.

mod activations;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "x86_64")]
mod elementwise;
pub mod limits;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod one_token;
mod places;
mod portable;
mod product;
pub(crate) mod team;
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(unused))]
mod tiles;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use bytemuck::Pod;
use candle_core::{CpuStorage, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(crate) use activations::{Activations, Values};
pub use attention::{BlockScales, Bound, KEYS_PER_BLOCK, Pair, Query, RunningSoftmax};
pub(crate) use attention::{
    Cache, CacheCode, CacheValue, FloatCache, IntegerCache, LANES, Queries, attend, key_record, padded, value_record,
    write_key, write_value,
};
pub use product::{CodeLine, Finish, Token, Tokens};
pub(crate) use product::{Epilogue, OutputColumns, Residual, float_product, int8_product};
pub(crate) use tiles::prefetch_near;

use crate::MAX_CODE;

/// The longest row whose integer sum of products of codes fits an `i32`: those of activations are within
/// ±127, and a stored weight may hold -128.
pub const MAX_COLS: usize = i32::MAX as usize / (MAX_CODE as usize * i8::MIN.unsigned_abs() as usize);

/// What one instruction set provides.
#[derive(Debug)]
pub struct Kernels {
    /// The instruction set's name: `portable`, `avx2`, `avx-vnni`, `avx512-vnni-256`,
    /// `avx512-vnni`, `neon-dotprod`.
    pub name: &'static str,
    is_supported: fn() -> bool,
    /// The largest magnitude of `x`, of those below the threshold if there is one; 0 if none is.
    pub absmax: fn(x: &[f32], threshold: Option<f32>) -> f32,
    /// Sets `flags[i]` to 1 where `|x[i]| >= threshold`; other flags stay as they are.
    pub flag_outliers: fn(x: &[f32], threshold: f32, flags: &mut [u8]),
    /// `codes[i] = round_half_even(x[i] * inverse)`; the caller sees to it that codes are within ±127.
    pub quantize: fn(x: &[f32], inverse: f32, codes: &mut [i8]),
    /// The sum of all codes.
    pub sum_codes: fn(codes: &[i8]) -> i32,
    /// Puts the codes (tokens, cols) in the order in which `int8_dots` uses them; empty where it is this one.
    pub pack_codes: fn(codes: &[i8], cols: usize) -> Vec<CodeLine>,
    /// The integer sums of products of codes; see [`Int8Dots`].
    pub int8_dots: Int8Dots,
    /// The codes (columns, rows) of a weight (rows, cols) in the given columns, as floats.
    pub gather_columns: fn(weight: &[i8], cols: usize, columns: &[u32], gathered: &mut [f32]),
    /// What follows the integer sums of a token; see [`FinishSums`].
    pub finish: FinishSums,
    /// The outputs (rows) of one token and a weight (rows, cols), all of which it writes: the sums, the outlier columns
    /// and what follows in one pass over the weight, with the bits that `int8_dots`, `gather_columns` and `finish` give.
    pub token_outputs: fn(token: &Token, weight: &[i8], finish: &Finish, out: &mut [MaybeUninit<f32>]),
    /// A block of attention's scores (64), of which the first `seen`, at least one, count, becomes weights
    /// `exp(score + slope * key - max)`, keys counted from `first_key`; gives what the weights of earlier
    /// blocks are to be multiplied by.
    pub softmax_block:
        fn(scores: &mut [f32], seen: usize, slope: f32, first_key: usize, softmax: &mut RunningSoftmax) -> f32,
    /// The codes (as many as x) of a key, query or value, within their bound, which may be that of 8 bits; and what
    /// turns them back into floats. Values are cut off at ±2^24.
    pub int16_codes: fn(x: &[f32], bound: Bound, codes: &mut [i16]) -> f32,
    /// The codes of weights from integer sums; see [`SoftmaxCodes`].
    pub softmax_codes: SoftmaxCodes,
    /// `context = context * shrink + sums * scale`, both (width).
    pub shrink_and_add: fn(context: &mut [f32], shrink: f32, sums: &[i32], scale: f32),
    /// The norm of one row; see [`LayerNormRow`].
    pub layer_norm: LayerNormRow,
    /// `x += other`.
    pub add: fn(x: &mut [f32], other: &[f32]),
    /// `x = max(x, 0)`.
    pub relu: fn(x: &mut [f32]),
    /// GELU in the form by tanh.
    pub gelu: fn(x: &mut [f32]),
    /// GELU in the exact form, by the error function.
    pub gelu_erf: fn(x: &mut [f32]),
    /// f16 values as f32, as many.
    pub widen: fn(values: &[f16], out: &mut [f32]),
    /// f32 values as the nearest f16 that is finite, half to even, as many; NaN stays NaN. An infinite value in a
    /// cache would be NaN to the queries that give it no weight.
    pub narrow: fn(values: &[f32], out: &mut [f16]),
    /// The sums of products of floats with an f32 weight; see [`FloatDots`].
    pub f32_dots: FloatDots<f32>,
    /// The sums of products of floats with an f16 weight; see [`FloatDots`].
    pub f16_dots: FloatDots<f16>,
    /// The sums of products of floats with a bf16 weight; see [`FloatDots`].
    pub bf16_dots: FloatDots<bf16>,
    /// A sum of outer products with f32 vectors; see [`OuterSum`].
    pub f32_outer: OuterSum<f32>,
    /// A sum of outer products with f16 vectors; see [`OuterSum`].
    pub f16_outer: OuterSum<f16>,
    /// Integer sums of pairs of codes of 16 bits; see [`PairSums`].
    pub pair_sums: PairSums<i16>,
    /// Integer sums with pairs of codes of 8 bits; see [`PairSums`].
    pub byte_pair_sums: PairSums<i8>,
}

/// `sums[t, r] = Σ_c codes[t, c] * weight[r, c]`, exact, for tokens, a weight (rows, cols), and sums (tokens, rows).
pub type Int8Dots = fn(tokens: &Tokens, weight: &[i8], sums: &mut [i32]);

/// A token's integer sums (rows) become outputs (rows), all of which it writes, given the weight's codes
/// (columns, rows) in the outlier columns; see [`Finish`].
pub type FinishSums = fn(sums: &[i32], outlier_weights: &[f32], finish: &Finish, out: &mut [MaybeUninit<f32>]);

/// `sums[t, r] = Σ_c x[t, c] * weight[r, c]`, summed in f32, for x (tokens, cols), a weight
/// (rows, cols), and sums (tokens, rows).
pub type FloatDots<T> = fn(x: &[f32], weight: &[T], cols: usize, sums: &mut [f32]);

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, all of one length.
pub type LayerNormRow = fn(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]);

/// `sums[r, :] += Σ_k a[r, k] * b[k, :]` over the first `depth` k, in the order of k, for a (rows, ..) and
/// sums (rows, width); the width is a multiple of 16. Lanes 16 v to 16 v + 15 of `b[k]` lie side by side
/// from `k * strides[0] + v * strides[1]` on.
pub type OuterSum<T> = fn(a: &[f32], depth: usize, b: &[T], strides: [usize; 2], sums: &mut [f32], width: usize);

/// `sums[r, l] = Σ_k a[r, k][0] * b[k, l][0] + a[r, k][1] * b[k, l][1]` for the first `depth` k and the first
/// `lanes` l, a multiple of 16, for a (rows, ..) and sums (rows, width). Lanes of b lie as in [`OuterSum`], and b ends
/// with the last of them. One row walks along b as it lies in memory, and asks ahead for the rest of it and then for
/// the pieces `next`, which need not exist.
pub type PairSums<C> = fn(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    lanes: usize,
    next: &[Range<*const [C; 2]>],
);

/// The integer sums (queries, 64) of queries with a block of keys become the codes (queries, 64) of their weights, each
/// times its value's scale, zero where a key is not seen: sums beyond what a query sees may be anything. `weights` is
/// room for them on the way.
pub type SoftmaxCodes = fn(
    sums: &[[i32; KEYS_PER_BLOCK]],
    block: &BlockScales,
    queries: &mut [Query],
    weights: &mut [[f32; KEYS_PER_BLOCK]],
    codes: &mut [[i16; KEYS_PER_BLOCK]],
);

/// Every table this build has, the fastest first; `portable` is always last.
static ALL: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &avx_vnni::KERNELS_OF_AVX512,
    #[cfg(target_arch = "x86_64")]
    &avx_vnni::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &avx2::KERNELS,
    #[cfg(target_arch = "aarch64")]
    &neon::KERNELS,
    &portable::KERNELS,
];

static ACTIVE: OnceLock<&'static Kernels> = OnceLock::new();

impl Kernels {
    /// The tables that this machine can run, the fastest first; `portable` is always last.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        ALL.iter().copied().filter(|kernels| (kernels.is_supported)())
    }

    /// The table that the ops use: the fastest, unless [`Kernels::select`] chose another.
    pub fn active() -> &'static Kernels {
        ACTIVE.get_or_init(|| Self::available().next().unwrap_or(&portable::KERNELS))
    }

    /// Makes the ops use the instruction set called `name`.
    ///
    /// Errors when this machine or build does not have it (the error lists what there is), or when
    /// the ops have run with another already.
    pub fn select(name: &str) -> Result<()> {
        let Some(kernels) = Self::available().find(|kernels| kernels.name == name) else {
            let names: Vec<_> = Self::available().map(|kernels| kernels.name).collect();
            bail!("instruction set `{}` is not available here; there is {}", name.escape_debug(), names.join(", "))
        };
        let active = ACTIVE.get_or_init(|| kernels);
        if active.name != name {
            bail!("instruction set `{name}` was asked for after `{}` was in use", active.name)
        }
        Ok(())
    }
}

/// Writes the codes of a row whose largest kept magnitude is `absmax`, and gives its scale,
/// `absmax / 127`; values above `absmax` get codes that mean nothing.
pub(crate) fn quantize_row(kernels: &Kernels, values: &[f32], absmax: f32, codes: &mut [i8]) -> f32 {
    if absmax == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let inverse = MAX_CODE / absmax;
    if inverse.is_finite() {
        (kernels.quantize)(values, inverse, codes);
    } else {
        // Below about 4e-37 the reciprocal overflows. A power of two moves the row up exactly.
        const LIFT: f32 = (1u64 << 63) as f32;
        let lifted: Vec<f32> = values.iter().map(|v| v * LIFT).collect();
        (kernels.quantize)(&lifted, MAX_CODE / (absmax * LIFT), codes);
    }
    absmax / MAX_CODE
}

/// Values that a thread is given at a time. Fewer are one thread's work: sharing moves them from one core's caches to
/// another's and back, which takes longer.
const VALUES_PER_PART: usize = 1 << 14;

/// Rows of `width` values that a thread is given at a time, of so many that there are: as many as the others, so that all
/// end together.
fn rows_per_part(rows: usize, width: usize) -> usize {
    let parts = (rows * width).div_ceil(VALUES_PER_PART).clamp(1, rows.max(1));
    rows.div_ceil(parts).max(1)
}

/// `len` zeros, written by several threads where they are many: new memory has to be cleared, by the system if not here.
pub(crate) fn zeros<T: Pod + Send + Sync>(len: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    let parts = values.spare_capacity_mut()[..len].chunks_mut(ZEROS_PER_PART).collect();
    team::for_each(parts, |part: &mut [MaybeUninit<T>]| part.fill(MaybeUninit::new(T::zeroed())));
    // SAFETY: all of them are written.
    unsafe { values.set_len(len) };
    values
}

/// `len` values that `write` writes.
///
/// # Safety
/// `write` must write them all where it gives no error.
pub(crate) unsafe fn written<T>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>]) -> Result<()>) -> Result<Vec<T>> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len])?;
    // SAFETY: the caller vouches for it.
    unsafe { values.set_len(len) };
    Ok(values)
}

/// Values that a thread clears at a time.
const ZEROS_PER_PART: usize = 1 << 17;

/// Calls `work(first, rows)` with runs of rows (.., width) of `values`, `first` the number of the first of
/// them, from several threads where there are many.
pub(crate) fn for_each_rows<T: Send>(values: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let rows = rows_per_part(values.len() / width.max(1), width);
    let parts = values.chunks_mut((rows * width).max(1)).enumerate().collect();
    team::for_each(parts, |(part, values)| work(part * rows, values));
}

/// Float values of any of the dtypes that weights and activations come in.
#[derive(Clone, Copy)]
pub(crate) enum FloatSlice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> FloatSlice<'a> {
    pub(crate) fn of(storage: &'a CpuStorage) -> Result<Self> {
        match storage {
            CpuStorage::F32(values) => Ok(Self::F32(values)),
            CpuStorage::F16(values) => Ok(Self::F16(values)),
            CpuStorage::BF16(values) => Ok(Self::BF16(values)),
            other => bail!("int8 ops take F32, F16 or BF16 values, found {:?}", storage_dtype(other)),
        }
    }

    pub(crate) fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[range]),
            Self::F16(values) => Self::F16(&values[range]),
            Self::BF16(values) => Self::BF16(&values[range]),
        }
    }

    /// The values of a range as f32, put into `room` where they have to be widened.
    pub(crate) fn widened<'b>(self, range: Range<usize>, room: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Self::F32(values) = self {
            return &values[range];
        }
        if room.len() < range.len() {
            room.resize(range.len(), 0.0);
        }
        let out = &mut room[..range.len()];
        self.widen(range.start, out);
        out
    }

    /// Copies the values from `start` on into `out`, as f32.
    pub(crate) fn widen(self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(values) => out.copy_from_slice(&values[range]),
            Self::F16(values) => (Kernels::active().widen)(&values[range], out),
            Self::BF16(values) => values[range].convert_to_f32_slice(out),
        }
    }
}

fn storage_dtype(storage: &CpuStorage) -> candle_core::DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// A result in f32, rounded once to the dtype that the op's input `like` has.
pub(crate) fn round_to_dtype_of(like: &CpuStorage, values: Vec<f32>) -> CpuStorage {
    match like {
        CpuStorage::F16(_) => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
        CpuStorage::BF16(_) => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
        _ => CpuStorage::F32(values),
    }
}

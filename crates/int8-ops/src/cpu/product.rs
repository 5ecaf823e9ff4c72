//! The loops around the dot kernels: blocks of outputs among threads, and what follows the sums.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::one_token::TILE_ROWS;
use super::places::Places;
use super::tiles::{MANY_TOKENS, prefetch};
use super::{Activations, FloatDots, FloatSlice, Kernels, Values, team};

/// The columns of a result (tokens, width) in f32 that one weight fills, each of them.
pub(crate) struct OutputColumns<'a> {
    /// Not yet written: clearing it first would be one more pass over memory.
    pub(crate) matrix: &'a mut [MaybeUninit<f32>],
    pub(crate) width: usize,
    pub(crate) columns: Range<usize>,
    pub(crate) epilogue: Epilogue<'a>,
}

/// What follows a layer, done to its outputs while they are in the nearest cache.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Of the outputs.
    pub(crate) activation: Option<fn(&mut [f32])>,
    /// Added to them.
    pub(crate) residual: Option<Residual<'a>>,
}

/// What is added to a layer's outputs, and by which kernel.
#[derive(Clone, Copy)]
pub(crate) struct Residual<'a> {
    /// (tokens, width).
    pub(crate) values: &'a [f32],
    pub(crate) add: fn(x: &mut [f32], other: &[f32]),
}

impl Epilogue<'_> {
    /// Does it to the outputs from `place` on.
    fn follow(&self, outputs: &mut [f32], place: usize) {
        if let Some(activate) = self.activation {
            activate(outputs);
        }
        if let Some(Residual { values, add }) = self.residual {
            add(outputs, &values[place..place + outputs.len()]);
        }
    }
}

/// A token on its way through the rows of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Token<'a> {
    /// (cols): zero in the outlier columns.
    pub codes: &'a [i8],
    /// The sum of all codes.
    pub code_sum: i32,
    /// The outlier columns, ascending.
    pub outlier_columns: &'a [u32],
}

/// 64 codes of one token, aligned for a vector.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct CodeLine(pub [i8; 64]);

/// Tokens on their way through the rows of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// (tokens, cols): zero in the outlier columns.
    pub codes: &'a [i8],
    /// Codes of a token.
    pub cols: usize,
    /// What [`Kernels::pack_codes`] makes of these codes.
    pub packed: &'a [CodeLine],
    /// (tokens): the sum of each token's codes.
    pub code_sums: &'a [i32],
}

/// What turns a token's integer sums with a block of weight rows into outputs (rows):
///
/// `y = weight_scale * (x_scale * Σ codes * codes + Σ_outlier columns x * code) + bias`: the weight's
/// scale serves both its int8 part and its outlier columns, which are dequantised as they are read.
/// Operations come in one order whatever the instruction set, so results are the same bit for bit.
#[derive(Debug, Clone, Copy)]
pub struct Finish<'a> {
    /// What turns the token's codes back into floats.
    pub x_scale: f32,
    /// (columns): the token's values in the outlier columns.
    pub outliers: &'a [f32],
    /// (rows).
    pub weight_scales: &'a [f32],
    /// (rows).
    pub bias: Option<&'a [f32]>,
}

/// How the outputs (tokens, weight rows) of a layer are cut up.
struct Blocks {
    /// Weight rows whose sums a kernel makes at a time, where it does not take all that there are.
    rows: usize,
    /// Tokens that are worked on before the weight comes by once more for the next.
    tokens: usize,
    /// The fewest weight rows that a thread is given at a time.
    rows_per_part: usize,
}

/// The fewest bytes of a weight that a thread is given at a time when there are few tokens.
const BYTES_PER_PART: usize = 1 << 15;

impl Blocks {
    /// One token: short blocks, so that what follows the sums of one goes on while the next is on its way
    /// from memory. Few: blocks long enough that finishing them token by token costs little. Both in whole tiles of an
    /// int8 weight, so that threads can end together. Many: blocks that are worth putting the weight in another order
    /// for; and as many tokens at a time as leave their codes and sums in the caches.
    fn of(tokens: usize, row_bytes: usize) -> Self {
        let (rows, least) = match tokens {
            1 => (TILE_ROWS, TILE_ROWS),
            ..MANY_TOKENS => (128, TILE_ROWS),
            _ => (64, 64),
        };
        let rows_per_part = match tokens {
            ..MANY_TOKENS => (BYTES_PER_PART / row_bytes).next_multiple_of(least).max(least),
            _ => rows,
        };
        Self { rows, tokens: 1024, rows_per_part }
    }
}

/// Steps 4 to 6 of LLM.int8(): output (tokens, weight rows) from activations (tokens, cols), weight
/// codes (weight rows, cols) and scales (weight rows), and a bias (weight rows); see [`Finish`].
pub(crate) fn int8_product(
    kernels: &Kernels,
    x: &Activations,
    weight: &[i8],
    weight_scales: &[f32],
    bias: Option<FloatSlice>,
    output: &mut OutputColumns,
) {
    if x.scales.len() == 1 {
        return int8_product_of_one(kernels, x, weight, weight_scales, bias, output);
    }
    let (cols, columns) = (x.cols, x.outliers.len());
    let blocks = Blocks::of(x.scales.len(), cols);
    for (first_token, mut output) in output.in_blocks(blocks.tokens) {
        let tokens = first_token..first_token + output.tokens();
        let codes = &x.codes[tokens.start * cols..tokens.end * cols];
        let packed = &(kernels.pack_codes)(codes, cols);
        let tokens = Tokens { codes, cols, packed, code_sums: &x.code_sums[tokens] };
        output.fill_in_parts(blocks.rows_per_part, |rows, part| {
            let Scratch { mut sums, mut outlier_weights, bias: mut room } = SCRATCH.take();
            let bias = bias.map(|bias| bias.widened(rows.clone(), &mut room));
            sums.resize(part.tokens * blocks.rows, 0);
            outlier_weights.resize(columns * blocks.rows, 0.0);
            for (first, len) in pieces(rows.len(), blocks.rows) {
                let block = rows.start + first..rows.start + first + len;
                // Scales come from memory while the products are made.
                weight_scales[block.clone()].chunks(16).for_each(|scales| prefetch(scales.as_ptr()));
                let weight = &weight[block.start * cols..block.end * cols];
                let sums = &mut sums[..part.tokens * len];
                (kernels.int8_dots)(&tokens, weight, sums);
                // The weight is in the cache by now.
                (kernels.gather_columns)(weight, cols, &x.outliers, &mut outlier_weights[..columns * len]);
                for (token, sums) in sums.chunks(len).enumerate() {
                    part.prefetch(token + TOKENS_AHEAD, first, len);
                    let finish = Finish {
                        x_scale: x.scales[first_token + token],
                        outliers: &x.outlier_values[(first_token + token) * columns..][..columns],
                        weight_scales: &weight_scales[block.clone()],
                        bias: bias.map(|bias| &bias[first..first + len]),
                    };
                    let outlier_weights = &outlier_weights[..columns * len];
                    let write = |out: &mut [_]| (kernels.finish)(sums, outlier_weights, &finish, out);
                    // SAFETY: the kernel writes them all.
                    unsafe { part.fill(token, first, len, write) };
                }
            }
            SCRATCH.set(Scratch { sums, outlier_weights, bias: room });
        });
    }
}

/// The same for one token.
fn int8_product_of_one(
    kernels: &Kernels,
    x: &Activations,
    weight: &[i8],
    weight_scales: &[f32],
    bias: Option<FloatSlice>,
    output: &mut OutputColumns,
) {
    let token = Token { codes: &x.codes, code_sum: x.code_sums[0], outlier_columns: &x.outliers };
    output.fill_in_parts(Blocks::of(1, x.cols).rows_per_part, |rows, part| {
        assert_eq!(part.tokens, 1);
        let mut scratch = SCRATCH.take();
        let finish = Finish {
            x_scale: x.scales[0],
            outliers: &x.outlier_values,
            weight_scales: &weight_scales[rows.clone()],
            bias: bias.map(|bias| bias.widened(rows.clone(), &mut scratch.bias)),
        };
        let weight = &weight[rows.start * x.cols..rows.end * x.cols];
        // SAFETY: the kernel writes them all.
        unsafe { part.fill(0, 0, rows.len(), |out| (kernels.token_outputs)(&token, weight, &finish, out)) };
        SCRATCH.set(scratch);
    });
}

/// Room for what a block needs.
#[derive(Default)]
struct Scratch {
    /// (tokens, rows).
    sums: Vec<i32>,
    /// (columns, rows).
    outlier_weights: Vec<f32>,
    /// (rows of a part), where it has to be widened.
    bias: Vec<f32>,
}

thread_local! {
    /// Kept from one block to the next.
    static SCRATCH: Cell<Scratch> =
        const { Cell::new(Scratch { sums: Vec::new(), outlier_weights: Vec::new(), bias: Vec::new() }) };
}

/// How many tokens ahead a place in the output is brought to the cache: it is as far from the last one
/// as a row is long.
const TOKENS_AHEAD: usize = 8;

/// Output (tokens, weight rows) from float activations and a float weight (weight rows, cols).
pub(crate) fn float_product<T: Sync>(
    dots: FloatDots<T>,
    x: &Values,
    weight: &[T],
    bias: Option<FloatSlice>,
    output: &mut OutputColumns,
) {
    let cols = x.cols;
    let blocks = Blocks::of(x.values.len() / cols, cols * size_of::<T>());
    for (first_token, mut output) in output.in_blocks(blocks.tokens) {
        output.fill_in_parts(blocks.rows_per_part, |rows, part| {
            let values = &x.values[first_token * cols..][..part.tokens * cols];
            let mut sums = vec![0f32; part.tokens * blocks.rows];
            let mut room = Vec::new();
            let bias = bias.map(|bias| bias.widened(rows.clone(), &mut room));
            for (first, len) in pieces(rows.len(), blocks.rows) {
                let block = rows.start + first..rows.start + first + len;
                let weight = &weight[block.start * cols..block.end * cols];
                let sums = &mut sums[..part.tokens * len];
                dots(values, weight, cols, sums);
                for (token, sums) in sums.chunks(len).enumerate() {
                    let write = |out: &mut [MaybeUninit<f32>]| {
                        let out = out.write_copy_of_slice(sums);
                        if let Some(bias) = bias {
                            out.iter_mut().zip(&bias[first..]).for_each(|(out, bias)| *out += bias);
                        }
                    };
                    // SAFETY: they are all copied.
                    unsafe { part.fill(token, first, len, write) };
                }
            }
        });
    }
}

/// `len` in pieces of at most `size`: (start, length) of each.
fn pieces(len: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(size).map(move |start| (start, size.min(len - start)))
}

impl OutputColumns<'_> {
    fn tokens(&self) -> usize {
        self.matrix.len().checked_div(self.width).unwrap_or_default()
    }

    /// The same columns of at most so many tokens at a time, and the number of the first of them. The activations of
    /// a block stay in a core's cache, or one of its neighbours', while all of the weight comes by.
    fn in_blocks(&mut self, tokens: usize) -> impl Iterator<Item = (usize, OutputColumns<'_>)> {
        let Self { matrix, width, columns, epilogue } = self;
        let len = (tokens * *width).max(1);
        matrix.chunks_mut(len).enumerate().map(move |(block, matrix)| {
            let mut epilogue = *epilogue;
            if let Some(Residual { values, .. }) = &mut epilogue.residual {
                *values = &values[block * len..][..matrix.len()];
            }
            (block * tokens, OutputColumns { matrix, width: *width, columns: columns.clone(), epilogue })
        })
    }

    /// Has `fill(rows, part)` write the output in parts, each of one or several times `rows_per_part` weight rows but
    /// the last, from several threads.
    fn fill_in_parts(&mut self, rows_per_part: usize, fill: impl Fn(Range<usize>, &mut Part) + Sync) {
        if self.matrix.is_empty() {
            return;
        }
        assert!(self.columns.end <= self.width && self.matrix.len().is_multiple_of(self.width));
        let (tokens, width, first, epilogue) = (self.tokens(), self.width, self.columns.start, self.epilogue);
        let matrix = &Places::new(self.matrix);
        team::for_each_range(self.columns.len(), rows_per_part, |rows| {
            let (first, len) = (first + rows.start, rows.len());
            fill(rows, &mut Part { matrix, first, rows: len, tokens, width, epilogue });
        });
    }
}

/// What some of a weight's rows fill of an output (tokens, width): theirs alone.
struct Part<'a> {
    matrix: &'a Places<'a, MaybeUninit<f32>>,
    /// The first row's output of the first token.
    first: usize,
    rows: usize,
    tokens: usize,
    width: usize,
    epilogue: Epilogue<'a>,
}

impl Part<'_> {
    /// Has `write` write a token's outputs of `len` rows, of which `first` is the first, and does what follows.
    ///
    /// # Safety
    /// `write` must write them all.
    unsafe fn fill(&mut self, token: usize, first: usize, len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) {
        assert!(token < self.tokens && first + len <= self.rows);
        let place = self.first + token * self.width + first;
        // SAFETY: the token and the rows are the part's (asserted), nobody else has the part, and it is
        // borrowed as long as the outputs are.
        let outputs = unsafe { self.matrix.take(place..place + len) };
        write(outputs);
        // SAFETY: the caller vouches for it.
        self.epilogue.follow(unsafe { outputs.assume_init_mut() }, place);
    }

    /// Asks for a token's outputs to be brought to the cache, where the machine can be asked.
    fn prefetch(&self, token: usize, first: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for row in (first..first + len).step_by(16) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let place = self.matrix.address(self.first + token * self.width + row);
            // SAFETY: a hint reads and writes nothing, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (token, first, len);
    }
}

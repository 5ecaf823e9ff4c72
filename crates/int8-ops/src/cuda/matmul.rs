//! The LLM.int8() product: one launch for few tokens, two for many, whatever the number of outlier columns.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage};
use candle_core::{DType, Device, Layout, Result, Tensor, bail};

use super::{
    Launch, THREADS, address, address_of, compute_capability, multiprocessors, shared_bytes_of_block, suffix,
    uninitialized,
};
use crate::matmul::Int8Matmul;
use crate::matrix::Int8Matrix;

/// Tokens that are multiplied by reading the weight row by row; more come in tiles.
const FEW_TOKENS: usize = 16;
/// Tokens that a block of the single launch quantises for itself, and the shared memory that it has for them.
const FUSED_TOKENS: usize = 8;
const FUSED_BYTES: usize = 43 << 10;
const FUSED_THREADS: u32 = 1024;
/// Threads of a block for few tokens that have been quantised.
const CODES_THREADS: u32 = 512;

/// What kernels/int8_matmul_one.cu takes: columns, of which its steps are whole, and rows of a block.
const ONE_STEP: usize = 512;
const ONE_COLS: usize = 16_384;
const ONE_ROWS: usize = 2048;
const ONE_THREADS: u32 = 512;

/// The product with all weights of `op`, side by side, in the dtype of x.
pub(crate) fn int8_matmul(op: &Int8Matmul, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let Some((&cols, _)) = layout.dims().split_last() else { bail!("int8 matmul: x has no columns") };
    if !layout.is_contiguous() {
        bail!("int8 matmul: x must be contiguous, found strides {:?}", layout.stride());
    }
    let device = &x.device;
    let tokens = layout.shape().elem_count() / cols;
    let tokens_per_sequence = match layout.dims() {
        [_, tokens, _] => *tokens,
        _ => tokens,
    };
    let width: usize = op.weights.iter().map(|(weight, _)| weight.dims().0).sum();
    let out = uninitialized(device, x.dtype(), tokens * width)?;
    let residual = match &op.residual {
        Some(residual) if residual.dtype() != x.dtype() || residual.elem_count() != tokens * width => {
            bail!("int8 matmul: the residual {residual:?} is not ({tokens}, {width}) {:?}", x.dtype())
        }
        Some(residual) => Some(address_of(device, residual)?),
        None => None,
    };
    let input = Input {
        device,
        dtype: x.dtype(),
        address: address(x, layout.start_offset())?,
        tokens,
        tokens_per_sequence,
        cols,
    };
    let method = Method::of(op, &input)?;
    let mut first = 0;
    for (weight, bias) in &op.weights {
        let offset = (first * x.dtype().size_in_bytes()) as u64;
        let product = Product {
            weight,
            bias: bias.as_ref(),
            activation: op.activation.map_or(0, |activation| activation.number()),
            residual: residual.map_or(0, |residual| residual + offset),
            out: address(&out, 0)? + offset,
            width,
        };
        method.launch(op, &input, &product)?;
        first += weight.dims().0;
    }
    Ok(out)
}

/// Activations x (tokens, cols).
struct Input<'a> {
    device: &'a CudaDevice,
    dtype: DType,
    address: u64,
    tokens: usize,
    tokens_per_sequence: usize,
    cols: usize,
}

/// One weight, and what is done with its outputs.
struct Product<'a> {
    weight: &'a Int8Matrix,
    bias: Option<&'a Tensor>,
    /// As the kernels number them.
    activation: usize,
    /// Of the first token, at the weight's first output; 0 for none.
    residual: u64,
    out: u64,
    /// From one token's outputs to the next one's.
    width: usize,
}

/// What a block of `int8_matmul_many` or `int8_matmul_hopper` makes of the outputs.
struct Tile {
    /// The kernel's and its file's.
    name: &'static str,
    file: &'static str,
    tokens: usize,
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

/// As kernels/int8_matmul_many.cu has them, the largest first.
const TILES: [Tile; 3] = [
    Tile::of_many("int8_matmul_many", (128, 256), 256, 98_560),
    Tile::of_many("int8_matmul_many_medium", (128, 128), 128, 49_408),
    Tile::of_many("int8_matmul_many_small", (64, 64), 128, 49_408),
];

/// A tile of kernels/int8_matmul_hopper.cu, and what it was measured to take on an H200.
struct HopperTile {
    tile: Tile,
    /// Blocks that a multiprocessor works on at a time.
    at_once: usize,
    /// What these take, however many they are, and for each column.
    nanoseconds: usize,
    picoseconds_a_column: usize,
}

const HOPPER_TILES: [HopperTile; 2] = [
    HopperTile {
        tile: Tile::of_hopper("int8_matmul_hopper", (128, 256), 256, 197_888),
        at_once: 1,
        nanoseconds: 3300,
        picoseconds_a_column: 7500,
    },
    HopperTile {
        tile: Tile::of_hopper("int8_matmul_hopper_small", (128, 128), 256, 99_584),
        at_once: 2,
        nanoseconds: 2600,
        picoseconds_a_column: 9100,
    },
];

/// Tokens up to which reading the weight takes longer than the products.
const READING_TOKENS: usize = 64;

impl Tile {
    const fn of_many(name: &'static str, (tokens, rows): (usize, usize), threads: u32, shared_bytes: usize) -> Self {
        Self { name, file: "int8_matmul_many", tokens, rows, threads, shared_bytes }
    }

    const fn of_hopper(name: &'static str, (tokens, rows): (usize, usize), threads: u32, shared_bytes: usize) -> Self {
        Self { name, file: "int8_matmul_hopper", tokens, rows, threads, shared_bytes }
    }

    /// The largest that the device has room for and that leaves at most a quarter of it idle.
    fn of(tokens: usize, rows: usize, multiprocessors: usize, shared_bytes: usize) -> &'static Self {
        let [.., small] = &TILES;
        let is_good =
            |tile: &&Self| tile.shared_bytes <= shared_bytes && 4 * tile.blocks(tokens, rows) >= 3 * multiprocessors;
        if tokens <= READING_TOKENS { small } else { TILES.iter().find(is_good).unwrap_or(small) }
    }

    /// The one that is done first on a device with Hopper's tensor cores; none where reading the weight takes longer.
    fn on_hopper(tokens: usize, (rows, cols): (usize, usize), multiprocessors: usize) -> Option<&'static Self> {
        let picoseconds = |of: &&HopperTile| {
            let rounds = of.tile.blocks(tokens, rows).div_ceil(of.at_once * multiprocessors);
            rounds * (1000 * of.nanoseconds + of.picoseconds_a_column * cols)
        };
        let first = HOPPER_TILES.iter().min_by_key(picoseconds);
        first.filter(|_| tokens > READING_TOKENS).map(|of| &of.tile)
    }

    fn blocks(&self, tokens: usize, rows: usize) -> usize {
        tokens.div_ceil(self.tokens) * rows.div_ceil(self.rows)
    }
}

/// The dynamic shared memory of a block that quantises x itself: the codes of as many tokens as its kernel has
/// room for, and the outlier bits of their sequences.
fn fused_bytes(input: &Input) -> usize {
    let sequences = input.tokens.div_ceil(input.tokens_per_sequence.max(1));
    input.tokens.next_power_of_two() * input.cols.next_multiple_of(512) + sequences * input.cols.div_ceil(32) * 4
}

/// How the activations come to the product.
enum Method {
    /// Every block quantises them for itself: one token, in pieces of rows.
    One,
    /// The same for any few tokens.
    Fused,
    /// They have been quantised, in a launch of their own.
    Quantized(Box<Quantized>),
}

struct Quantized {
    codes: CudaStorage,
    scales: CudaStorage,
    /// (sequences, words); none without a threshold.
    outlier_bits: Option<Tensor>,
    /// The normed activations; none where there is no norm.
    normed: Option<CudaStorage>,
}

impl Method {
    fn of(op: &Int8Matmul, input: &Input) -> Result<Self> {
        let is_fused = input.tokens <= FUSED_TOKENS && fused_bytes(input) <= FUSED_BYTES;
        if is_one(op, input)? {
            Ok(Self::One)
        } else if is_fused {
            Ok(Self::Fused)
        } else {
            Ok(Self::Quantized(Box::new(quantize(op, input)?)))
        }
    }

    fn launch(&self, op: &Int8Matmul, input: &Input, product: &Product) -> Result<()> {
        let (rows, cols) = product.weight.dims();
        let (tokens, suffix) = (input.tokens, suffix(input.dtype)?);
        let stream = input.device.cuda_stream();
        let multiprocessors = multiprocessors(&stream)?;
        // A block reads its rows one after the other.
        let few_grid = [rows.min(multiprocessors), 1, 1];
        let start = |file, name: &str| Launch::new(input.device, file, format!("{name}_{suffix}"));
        // The layer norm that the kernel does, where it does one.
        let normed = |file, name: &str| match &op.norm {
            Some(norm) => Ok(start(file, &format!("{name}_normed"))
                .pointer(input.address)
                .vector(Some(norm.weight()))?
                .vector(Some(norm.bias()))?
                .float(norm.eps())),
            None => Ok::<_, candle_core::Error>(start(file, name).pointer(input.address)),
        };
        let weight = product.weight.codes_address(input.device)?;
        let (launch, grid, threads, shared_bytes) = match self {
            Self::One => (normed("int8_matmul_one", "int8_matmul_one")?, few_grid, ONE_THREADS, cols + cols / 8),
            Self::Fused => (normed("int8_matmul_few", "int8_matmul_few")?, few_grid, FUSED_THREADS, fused_bytes(input)),
            Self::Quantized(x) => {
                let codes = address(&x.codes, 0)?;
                let (file, name, grid, threads, shared_bytes) = if tokens <= FEW_TOKENS {
                    ("int8_matmul_few", "int8_matmul_few_codes", few_grid, CODES_THREADS, 0)
                } else {
                    let are_pieces = (codes | weight | cols as u64).is_multiple_of(16);
                    let on_hopper = if are_pieces && compute_capability(&stream)? == (9, 0) {
                        Tile::on_hopper(tokens, (rows, cols), multiprocessors)
                    } else {
                        None
                    };
                    let tile = match on_hopper {
                        Some(tile) => tile,
                        None => Tile::of(tokens, rows, multiprocessors, shared_bytes_of_block(&stream)?),
                    };
                    (tile.file, tile.name, [tile.blocks(tokens, rows), 1, 1], tile.threads, tile.shared_bytes)
                };
                let bits = x.outlier_bits.as_ref();
                let launch = start(file, name)
                    .pointer(codes)
                    .pointer(address(&x.scales, 0)?)
                    .pointer(bits.map_or(Ok(0), |bits| address_of(input.device, bits))?)
                    .pointer(x.normed.as_ref().map_or(Ok(input.address), |normed| address(normed, 0))?);
                (launch, grid, threads, shared_bytes)
            }
        };
        let launch = launch
            .pointer(weight)
            .pointer(address_of(input.device, product.weight.scales())?)
            .vector(product.bias)?
            .pointer(product.residual)
            .pointer(product.out);
        let launch = match self {
            Self::One => launch.int(rows)?.int(cols)?,
            _ => launch.int(tokens)?.int(rows)?.int(cols)?.int(product.width)?.int(input.tokens_per_sequence)?,
        };
        let launch = match self {
            Self::One | Self::Fused => launch.float(op.threshold.unwrap_or(0.0)),
            Self::Quantized(_) => launch,
        };
        // SAFETY: x is (tokens, cols), the weight (rows, cols), the bias (rows), and out and residual have
        // `rows` outputs of every token `width` apart.
        unsafe { launch.int(product.activation)?.run(grid, threads, shared_bytes) }
    }
}

/// Whether kernels/int8_matmul_one.cu takes this input, for all weights.
fn is_one(op: &Int8Matmul, input: &Input) -> Result<bool> {
    let &Input { device, tokens, cols, .. } = input;
    if tokens != 1 || !cols.is_multiple_of(ONE_STEP) || cols > ONE_COLS {
        return Ok(false);
    }
    let most_rows = ONE_ROWS * multiprocessors(&device.cuda_stream())?;
    let mut addresses = input.address;
    for (weight, _) in &op.weights {
        if weight.dims().0 > most_rows {
            return Ok(false);
        }
        addresses |= weight.codes_address(device)?;
    }
    if let Some(norm) = &op.norm {
        addresses |= address_of(device, norm.weight())? | address_of(device, norm.bias())?;
    }
    Ok(addresses.is_multiple_of(16))
}

/// Steps 2 and 3 of the method, after the norm if there is one.
fn quantize(op: &Int8Matmul, input: &Input) -> Result<Quantized> {
    let &Input { device, dtype, tokens, tokens_per_sequence, cols, .. } = input;
    let codes = uninitialized(device, DType::U8, tokens * cols)?;
    let scales = uninitialized(device, DType::F32, tokens)?;
    let sequences = tokens / tokens_per_sequence.max(1);
    let outlier_bits = match op.threshold {
        Some(_) => Some(Tensor::zeros(sequences * cols.div_ceil(32), DType::U32, &Device::Cuda(device.clone()))?),
        None => None,
    };
    let bits = outlier_bits.as_ref().map_or(Ok(0), |bits| address_of(device, bits))?;
    let (launch, normed) = match &op.norm {
        Some(norm) => {
            let normed = uninitialized(device, dtype, tokens * cols)?;
            let launch = Launch::new(device, "layer_norm", format!("layer_norm_quantize_{}", suffix(dtype)?))
                .pointer(input.address)
                .vector(Some(norm.weight()))?
                .vector(Some(norm.bias()))?
                .float(norm.eps())
                .pointer(address(&normed, 0)?);
            (launch, Some(normed))
        }
        None => {
            let launch = Launch::new(device, "quantize", format!("quantize_activations_{}", suffix(dtype)?));
            (launch.pointer(input.address), None)
        }
    };
    let launch = launch
        .pointer(address(&codes, 0)?)
        .pointer(address(&scales, 0)?)
        .pointer(bits)
        .int(cols)?
        .int(tokens_per_sequence)?
        .float(op.threshold.unwrap_or(0.0));
    // SAFETY: x, codes and what is normed are (tokens, cols), scales (tokens), and the bits as many as all
    // sequences have.
    unsafe { launch.run([tokens, 1, 1], THREADS, 0)? };
    Ok(Quantized { codes, scales, outlier_bits, normed })
}

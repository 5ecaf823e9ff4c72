//! The LLM.int8() product: one launch for few tokens, two for many, whatever the number of outlier columns.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage};
use candle_core::{DType, Device, Layout, Result, Tensor, bail};

use super::{Launch, THREADS, address, address_of, multiprocessors, shared_bytes_of_block, suffix, uninitialized};
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

/// What a block of `int8_matmul_many` makes of the outputs.
struct Tile {
    name: &'static str,
    tokens: usize,
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

/// As kernels/int8_matmul_many.cu has them, the largest first.
const TILES: [Tile; 3] = [
    Tile { name: "int8_matmul_many", tokens: 128, rows: 256, threads: 256, shared_bytes: 98_560 },
    Tile { name: "int8_matmul_many_medium", tokens: 128, rows: 128, threads: 128, shared_bytes: 49_408 },
    Tile { name: "int8_matmul_many_small", tokens: 64, rows: 64, threads: 128, shared_bytes: 49_408 },
];

impl Tile {
    /// The largest that the device has room for and that leaves at most a quarter of it idle.
    fn of(tokens: usize, rows: usize, multiprocessors: usize, shared_bytes: usize) -> &'static Self {
        let [.., small] = &TILES;
        let is_good =
            |tile: &&Self| tile.shared_bytes <= shared_bytes && 4 * tile.blocks(tokens, rows) >= 3 * multiprocessors;
        if tokens <= small.tokens { small } else { TILES.iter().find(is_good).unwrap_or(small) }
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
    /// Every block quantises them for itself.
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
        if is_fused { Ok(Self::Fused) } else { Ok(Self::Quantized(Box::new(quantize(op, input)?))) }
    }

    fn launch(&self, op: &Int8Matmul, input: &Input, product: &Product) -> Result<()> {
        let (rows, cols) = product.weight.dims();
        let (tokens, suffix) = (input.tokens, suffix(input.dtype)?);
        let stream = input.device.cuda_stream();
        let multiprocessors = multiprocessors(&stream)?;
        // A block reads its rows one after the other.
        let few_grid = [rows.min(multiprocessors), 1, 1];
        let start = |file, name: &str| Launch::new(input.device, file, format!("{name}_{suffix}"));
        let (launch, grid, threads, shared_bytes) = match self {
            Self::Fused => {
                let launch = match &op.norm {
                    Some(norm) => start("int8_matmul_few", "int8_matmul_few_normed")
                        .pointer(input.address)
                        .vector(Some(norm.weight()))?
                        .vector(Some(norm.bias()))?
                        .float(norm.eps()),
                    None => start("int8_matmul_few", "int8_matmul_few").pointer(input.address),
                };
                (launch, few_grid, FUSED_THREADS, fused_bytes(input))
            }
            Self::Quantized(x) => {
                let (file, name, grid, threads, shared_bytes) = if tokens <= FEW_TOKENS {
                    ("int8_matmul_few", "int8_matmul_few_codes", few_grid, CODES_THREADS, 0)
                } else {
                    let tile = Tile::of(tokens, rows, multiprocessors, shared_bytes_of_block(&stream)?);
                    ("int8_matmul_many", tile.name, [tile.blocks(tokens, rows), 1, 1], tile.threads, tile.shared_bytes)
                };
                let bits = x.outlier_bits.as_ref();
                let launch = start(file, name)
                    .pointer(address(&x.codes, 0)?)
                    .pointer(address(&x.scales, 0)?)
                    .pointer(bits.map_or(Ok(0), |bits| address_of(input.device, bits))?)
                    .pointer(x.normed.as_ref().map_or(Ok(input.address), |normed| address(normed, 0))?);
                (launch, grid, threads, shared_bytes)
            }
        };
        let launch = launch
            .pointer(product.weight.codes_address(input.device)?)
            .pointer(address_of(input.device, product.weight.scales())?)
            .vector(product.bias)?
            .pointer(product.residual)
            .pointer(product.out)
            .int(tokens)?
            .int(rows)?
            .int(cols)?
            .int(product.width)?
            .int(input.tokens_per_sequence)?;
        let launch = match self {
            Self::Fused => launch.float(op.threshold.unwrap_or(0.0)),
            Self::Quantized(_) => launch,
        };
        // SAFETY: x is (tokens, cols), the weight (rows, cols), the bias (rows), and out and residual have
        // `rows` outputs of every token `width` apart.
        unsafe { launch.int(product.activation)?.run(grid, threads, shared_bytes) }
    }
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

//! Times of one linear layer (width, 4 width), without a bias, on a CUDA device: LLM.int8() against cuBLAS in f16, with what the
//! device can do at best, measured in the same run. `make gpu` runs it; `--json` writes a line for each row, and numbers
//! are other widths.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::Module;
use int8_ops::device;
use int8_ops::{FloatLinear, Int8Linear, Int8Matrix, OUTLIER_THRESHOLD};

const WIDTHS: [usize; 7] = [768, 1024, 2048, 4096, 5120, 8192, 12_288];
const TOKENS: [usize; 4] = [1, 8, 512, 2048];
/// One column in a thousand holds outliers, as in trained models.
const COLUMNS_PER_OUTLIER: usize = 1000;
/// Weights that are used in turn take so many bytes, so that none is in a cache when its turn comes.
const BYTES_IN_TURN: usize = 256 << 20;
const REPETITIONS: usize = 9;

fn main() -> Result<()> {
    let is_json = std::env::args().any(|arg| arg == "--json");
    let mut widths: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    if widths.is_empty() {
        widths = WIDTHS.to_vec();
    }
    let device = device::cuda(0).map_err(candle_core::Error::wrap)?;
    let (Some(bandwidth), Some(peaks)) = (device::copy_bandwidth(&device, 1 << 30)?, device::matmul_peaks(&device)?)
    else {
        bail!("the device has too little memory free")
    };
    let (f16_peak, int8_peak) = (peaks.f16, peaks.int8);
    match is_json {
        true => println!(
            r#"{{"copy_bytes_per_second":{bandwidth:.4e},"f16_peak":{f16_peak:.4e},"int8_peak":{int8_peak:.4e}}}"#
        ),
        false => {
            println!(
                "memory {:.0} GB/s by a copy, matmul of 8192: f16 {:.0} TFLOP/s by cuBLAS, int8 {:.0} TOP/s by cuBLASLt",
                bandwidth / 1e9,
                f16_peak / 1e12,
                int8_peak / 1e12
            );
            println!(
                "{:>6} {:>6} {:>11} {:>11} {:>7} {:>14} {:>12}",
                "width", "tokens", "int8 us", "f16 us", "times", "of the memory", "of int8 peak"
            );
        }
    }
    for width in widths {
        let layers = Layers::new(&device, width)?;
        for tokens in TOKENS {
            let (int8, f16) = layers.seconds(tokens)?;
            let weights = 4 * width * width;
            let (memory, peak) =
                (weights as f64 / int8 / bandwidth, 2.0 * (tokens * weights) as f64 / int8 / int8_peak);
            match is_json {
                true => println!(
                    r#"{{"width":{width},"tokens":{tokens},"int8_seconds":{int8:.4e},"f16_seconds":{f16:.4e},"times":{:.3},"share_of_memory":{memory:.3},"share_of_int8_peak":{peak:.3}}}"#,
                    f16 / int8
                ),
                false => println!(
                    "{width:>6} {tokens:>6} {:>11.1} {:>11.1} {:>7.2} {:>13.0}% {:>11.0}%",
                    int8 * 1e6,
                    f16 * 1e6,
                    f16 / int8,
                    100.0 * memory,
                    100.0 * peak
                ),
            }
        }
    }
    Ok(())
}

/// The same layer again and again, at places of its own.
struct Layers {
    device: Device,
    inputs: usize,
    int8: Vec<Int8Linear>,
    f16: Vec<FloatLinear>,
}

impl Layers {
    fn new(device: &Device, width: usize) -> Result<Self> {
        let (inputs, outputs) = (width, 4 * width);
        let weight = Tensor::randn(0f32, 0.02, (outputs, inputs), device)?.to_dtype(DType::F16)?;
        let copies = |bytes: usize| BYTES_IN_TURN.div_ceil(bytes).clamp(2, 64);
        let quantized = Int8Matrix::quantize(&weight)?;
        let int8 = (0..copies(inputs * outputs)).map(|_| {
            let matrix = Int8Matrix::new(quantized.codes()?.copy()?, quantized.scales().copy()?)?;
            Int8Linear::new(matrix, None, Some(OUTLIER_THRESHOLD))
        });
        let f16 = (0..copies(2 * inputs * outputs)).map(|_| FloatLinear::new(weight.copy()?, None));
        Ok(Self {
            device: device.clone(),
            inputs,
            int8: int8.collect::<Result<_>>()?,
            f16: f16.collect::<Result<_>>()?,
        })
    }

    /// Seconds of the layer at int8 and in f16, measured in turns.
    fn seconds(&self, tokens: usize) -> Result<(f64, f64)> {
        let Self { device, inputs, int8, f16 } = self;
        let mut x = Tensor::randn(0f32, 1.0, (1, tokens, *inputs), device)?.clamp(-5.0, 5.0)?;
        for column in (COLUMNS_PER_OUTLIER / 2..*inputs).step_by(COLUMNS_PER_OUTLIER) {
            x = x.slice_assign(&[0..1, 0..1, column..column + 1], &Tensor::full(20f32, (1, 1, 1), device)?)?;
        }
        let x = x.to_dtype(DType::F16)?;
        let (mut int8_seconds, mut f16_seconds) = (Vec::new(), Vec::new());
        for _ in 0..REPETITIONS {
            int8_seconds
                .push(seconds_each(device, int8.len().max(20), |turn| int8[turn % int8.len()].forward(&x).map(drop))?);
            f16_seconds
                .push(seconds_each(device, f16.len().max(20), |turn| f16[turn % f16.len()].forward(&x).map(drop))?);
        }
        Ok((median(int8_seconds), median(f16_seconds)))
    }
}

/// Seconds of one of `count` launches that follow one another.
fn seconds_each(device: &Device, count: usize, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
    launch(0)?;
    device.synchronize()?;
    let start = Instant::now();
    (0..count).try_for_each(&launch)?;
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / count as f64)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

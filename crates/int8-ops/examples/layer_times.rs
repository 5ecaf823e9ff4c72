//! Times of one linear layer (width, 4 width), without a bias, on a CUDA device: LLM.int8() against cuBLAS in f16, with what the
//! device can do at best, measured in the same run. `make gpu` runs it; `--json` writes a line for each row.

use std::time::Instant;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::{result as lt, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};
use candle_nn::Module;
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
    let device = int8_ops::device::cuda(0).map_err(candle_core::Error::wrap)?;
    let cuda = device.as_cuda_device()?;
    let bandwidth = copy_bandwidth(cuda)?;
    let (f16_peak, int8_peak) = (f16_peak(&device)?, int8_peak(cuda)?);
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
    for width in WIDTHS {
        for tokens in TOKENS {
            let (int8, f16) = layer_seconds(&device, width, tokens)?;
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

/// Seconds of a layer at int8 and in f16, measured in turns.
fn layer_seconds(device: &Device, width: usize, tokens: usize) -> Result<(f64, f64)> {
    let (inputs, outputs) = (width, 4 * width);
    let weight =
        (Tensor::randn(0f32, 0.02, (outputs, inputs), &Device::Cpu)?).to_dtype(DType::F16)?.to_device(device)?;
    let mut x = Tensor::randn(0f32, 1.0, (1, tokens, inputs), &Device::Cpu)?.clamp(-5.0, 5.0)?;
    for column in (COLUMNS_PER_OUTLIER / 2..inputs).step_by(COLUMNS_PER_OUTLIER) {
        x = x.slice_assign(&[0..1, 0..1, column..column + 1], &Tensor::full(20f32, (1, 1, 1), &Device::Cpu)?)?;
    }
    let x = x.to_dtype(DType::F16)?.to_device(device)?;
    let copies = |bytes: usize| BYTES_IN_TURN.div_ceil(bytes).clamp(2, 64);
    let quantized = Int8Matrix::quantize(&weight)?;
    let int8 = (0..copies(inputs * outputs)).map(|_| {
        let matrix = Int8Matrix::new(quantized.codes()?.copy()?, quantized.scales().copy()?)?;
        Int8Linear::new(matrix, None, Some(OUTLIER_THRESHOLD))
    });
    let int8 = int8.collect::<Result<Vec<_>>>()?;
    let f16 = (0..copies(2 * inputs * outputs)).map(|_| FloatLinear::new(weight.copy()?, None));
    let f16 = f16.collect::<Result<Vec<_>>>()?;
    let (mut int8_seconds, mut f16_seconds) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        int8_seconds
            .push(seconds_each(device, int8.len().max(20), |turn| int8[turn % int8.len()].forward(&x).map(drop))?);
        f16_seconds.push(seconds_each(device, f16.len().max(20), |turn| f16[turn % f16.len()].forward(&x).map(drop))?);
    }
    Ok((median(int8_seconds), median(f16_seconds)))
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

/// Bytes read and written a second by a copy of a gigabyte within the device's memory.
fn copy_bandwidth(cuda: &CudaDevice) -> Result<f64> {
    let bytes = 1 << 30;
    let (from, mut to) = (cuda.alloc_zeros::<u8>(bytes)?, cuda.alloc_zeros::<u8>(bytes)?);
    let mut seconds = Vec::new();
    for _ in 0..REPETITIONS {
        cuda.cuda_stream().synchronize().w()?;
        let start = Instant::now();
        cuda.memcpy_dtod(&from, &mut to)?;
        cuda.cuda_stream().synchronize().w()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / median(seconds))
}

const PEAK_SIZE: usize = 8192;

/// Operations a second of cuBLAS, as Candle calls it.
fn f16_peak(device: &Device) -> Result<f64> {
    // Zeros would take less power, and so be faster than any model.
    let matrix = || Tensor::randn(0f32, 1.0, (PEAK_SIZE, PEAK_SIZE), device)?.to_dtype(DType::F16);
    let (a, b) = (matrix()?, matrix()?);
    let seconds = (0..REPETITIONS).map(|_| seconds_each(device, 10, |_| a.matmul(&b.t()?).map(drop)));
    Ok(2.0 * (PEAK_SIZE as f64).powi(3) / median(seconds.collect::<Result<_>>()?))
}

/// The same of cuBLASLt's int8 product with 32-bit sums, without scales: the yardstick of `int8_matmul_many`.
/// Both matrices are row-major, (rows, size) and (tokens, size): to cuBLASLt, the transpose of the first times the
/// second.
fn int8_peak(cuda: &CudaDevice) -> Result<f64> {
    use sys::cublasComputeType_t::CUBLAS_COMPUTE_32I;
    use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
    use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    use sys::cudaDataType_t::{CUDA_R_8I, CUDA_R_32I};
    static TRANSPOSED: i32 = 1;
    static WORKSPACE_BYTES: usize = 32 << 20;
    let error = |error| candle_core::Error::Msg(format!("cuBLASLt: {error:?}"));
    let (size, stream) = (PEAK_SIZE, cuda.cuda_stream());
    let codes: Vec<i8> = (0..size * size).map(|index| (index * 7919 % 251) as i8).collect();
    let (weight, x) = (cuda.clone_htod(&codes)?, cuda.clone_htod(&codes)?);
    let (mut out, mut workspace) = (cuda.alloc_zeros::<i32>(size * size)?, cuda.alloc_zeros::<u8>(WORKSPACE_BYTES)?);
    let ((weight, _weight), (x, _x)) = (weight.device_ptr(&stream), x.device_ptr(&stream));
    let ((out, _out), (workspace, _workspace)) = (out.device_ptr_mut(&stream), workspace.device_ptr_mut(&stream));
    let (one, zero) = (1i32, 0i32);
    let mut seconds = Vec::new();
    // SAFETY: the descriptors are of the matrices above, which live to the end.
    unsafe {
        let handle = lt::create_handle().map_err(error)?;
        let product = lt::create_matmul_desc(CUBLAS_COMPUTE_32I, CUDA_R_32I).map_err(error)?;
        let transposed = (&raw const TRANSPOSED).cast();
        lt::set_matmul_desc_attribute(product, CUBLASLT_MATMUL_DESC_TRANSA, transposed, size_of::<i32>())
            .map_err(error)?;
        let layout = |dtype| lt::create_matrix_layout(dtype, size as u64, size as u64, size as i64).map_err(error);
        let (codes, sums) = (layout(CUDA_R_8I)?, layout(CUDA_R_32I)?);
        let preference = lt::create_matmul_pref().map_err(error)?;
        let bytes = (&raw const WORKSPACE_BYTES).cast();
        lt::set_matmul_pref_attribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes, size_of::<usize>())
            .map_err(error)?;
        let chosen =
            lt::get_matmul_algo_heuristic(handle, product, codes, codes, sums, sums, preference).map_err(error)?;
        for _ in 0..REPETITIONS {
            stream.synchronize().w()?;
            let start = Instant::now();
            for _ in 0..10 {
                lt::matmul(
                    handle,
                    product,
                    (&raw const one).cast(),
                    (&raw const zero).cast(),
                    weight as *const _,
                    codes,
                    x as *const _,
                    codes,
                    out as *const _,
                    sums,
                    out as *mut _,
                    sums,
                    &chosen.algo,
                    workspace as *mut _,
                    WORKSPACE_BYTES,
                    stream.cu_stream() as *mut _,
                )
                .map_err(error)?;
            }
            stream.synchronize().w()?;
            seconds.push(start.elapsed().as_secs_f64() / 10.0);
        }
    }
    Ok(2.0 * (size as f64).powi(3) / median(seconds))
}

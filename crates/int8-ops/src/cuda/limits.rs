//! What a device can do at best with matrices, by NVIDIA's own libraries.

use std::time::Instant;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::{result as lt, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};

/// Rows and columns of the matrices: large enough for any device.
const SIZE: usize = 8192;
/// Bytes that the matrices take, and some.
pub(crate) const BYTES: usize = 1 << 30;
/// Products that are timed, as often as this: the median counts.
const PRODUCTS: usize = 10;
const REPETITIONS: usize = 5;

/// The middle of the rates of `PRODUCTS` products each, in operations a second.
fn rate(device: &CudaDevice, mut product: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut rates = Vec::with_capacity(REPETITIONS);
    // The first round warms up.
    for _ in 0..=REPETITIONS {
        device.cuda_stream().synchronize().w()?;
        let start = Instant::now();
        (0..PRODUCTS).try_for_each(|_| product())?;
        device.cuda_stream().synchronize().w()?;
        rates.push(2.0 * (SIZE as f64).powi(3) * PRODUCTS as f64 / start.elapsed().as_secs_f64());
    }
    let rates = &mut rates[1..];
    rates.sort_by(f64::total_cmp);
    Ok(rates[REPETITIONS / 2])
}

/// Operations a second of cuBLAS in f16, as Candle calls it.
pub(crate) fn f16_matmul_peak(device: &CudaDevice) -> Result<f64> {
    // Zeros would take less power, and so be faster than any model.
    let matrix = || Tensor::randn(0f32, 1.0, (SIZE, SIZE), &Device::Cuda(device.clone()))?.to_dtype(DType::F16);
    let (a, b) = (matrix()?, matrix()?.t()?);
    rate(device, || a.matmul(&b).map(drop))
}

/// Operations a second of cuBLASLt's int8 product with 32-bit sums, without scales.
pub(crate) fn int8_matmul_peak(device: &CudaDevice) -> Result<f64> {
    let codes: Vec<i8> = (0..SIZE * SIZE).map(|index| (index * 7919 % 251) as i8).collect();
    let (weight, x) = (device.clone_htod(&codes)?, device.clone_htod(&codes)?);
    let mut out = device.alloc_zeros::<i32>(SIZE * SIZE)?;
    let mut workspace = device.alloc_zeros::<u8>(WORKSPACE_BYTES)?;
    let stream = device.cuda_stream();
    let ((weight, _weight), (x, _x)) = (weight.device_ptr(&stream), x.device_ptr(&stream));
    let ((out, _out), (workspace, _workspace)) = (out.device_ptr_mut(&stream), workspace.device_ptr_mut(&stream));
    let plan = Plan::new()?;
    let (one, zero) = (1i32, 0i32);
    rate(device, || {
        // SAFETY: the plan is of matrices of this size and these types, and all is on the device until the end.
        unsafe {
            lt::matmul(
                plan.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight as *const _,
                plan.codes,
                x as *const _,
                plan.codes,
                out as *const _,
                plan.sums,
                out as *mut _,
                plan.sums,
                &plan.algorithm,
                workspace as *mut _,
                WORKSPACE_BYTES,
                stream.cu_stream() as *mut _,
            )
        }
        .map_err(error)
    })
}

/// Room that cuBLASLt may use besides.
static WORKSPACE_BYTES: usize = 32 << 20;

/// What cuBLASLt is told of the product. Both matrices are row-major, so that to cuBLASLt it is the transpose of the
/// first times the second.
struct Plan {
    handle: sys::cublasLtHandle_t,
    product: sys::cublasLtMatmulDesc_t,
    codes: sys::cublasLtMatrixLayout_t,
    sums: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new() -> Result<Self> {
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32I;
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        use sys::cudaDataType_t::{CUDA_R_8I, CUDA_R_32I};
        /// CUBLAS_OP_T, which the bindings of cuBLASLt lack.
        static TRANSPOSED: i32 = 1;
        let layout = |dtype| lt::create_matrix_layout(dtype, SIZE as u64, SIZE as u64, SIZE as i64).map_err(error);
        let handle = lt::create_handle().map_err(error)?;
        let product = lt::create_matmul_desc(CUBLAS_COMPUTE_32I, CUDA_R_32I).map_err(error)?;
        let (codes, sums) = (layout(CUDA_R_8I)?, layout(CUDA_R_32I)?);
        let preference = lt::create_matmul_pref().map_err(error)?;
        let (transposed, bytes) = ((&raw const TRANSPOSED).cast(), (&raw const WORKSPACE_BYTES).cast());
        // SAFETY: the attributes are an i32 and a size_t, and what they are of was made above.
        let chosen = unsafe {
            lt::set_matmul_desc_attribute(product, CUBLASLT_MATMUL_DESC_TRANSA, transposed, size_of::<i32>())
                .and_then(|()| {
                    let attribute = CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
                    lt::set_matmul_pref_attribute(preference, attribute, bytes, size_of::<usize>())
                })
                .and_then(|()| lt::get_matmul_algo_heuristic(handle, product, codes, codes, sums, sums, preference))
        };
        // SAFETY: it was made above, and is not used any more.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        let algorithm = chosen.map_err(error)?.algo;
        Ok(Self { handle, product, codes, sums, algorithm })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: all of it is the plan's own, and is not used any more.
        unsafe {
            let _ = lt::destroy_matrix_layout(self.codes);
            let _ = lt::destroy_matrix_layout(self.sums);
            let _ = lt::destroy_matmul_desc(self.product);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

fn error(error: lt::CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuBLASLt: {error:?}"))
}

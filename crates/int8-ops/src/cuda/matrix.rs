//! Int8 matrices: quantising, and reading rows of them.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Result, Storage, Tensor, bail};

use super::{Launch, THREADS, address, address_of, suffix, uninitialized};

/// The codes (rows, cols) in `U8` and the scales (rows) of a float matrix on a CUDA device, quantised row by row;
/// the first row that holds NaN or infinity is the error.
pub(crate) fn quantize_weight(matrix: &Tensor) -> Result<std::result::Result<(Tensor, Tensor), usize>> {
    let (rows, cols) = matrix.dims2()?;
    let (storage, layout) = matrix.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("wanted a matrix on a CUDA device, found {matrix:?}") };
    let device = &storage.device;
    let codes = uninitialized(device, DType::U8, rows * cols)?;
    let scales = uninitialized(device, DType::F32, rows)?;
    let bad_row = Tensor::new(&[i32::MAX], &Device::Cuda(device.clone()))?;
    let launch = Launch::new(device, "quantize_weight", format!("quantize_rows_{}", suffix(storage.dtype())?))
        .pointer(address(storage, layout.start_offset())?)
        .pointer(address(&codes, 0)?)
        .pointer(address(&scales, 0)?)
        .pointer(address_of(device, &bad_row)?)
        .int(cols)?;
    // SAFETY: the matrix and the codes are (rows, cols), the scales (rows).
    unsafe { launch.run([rows, 1, 1], THREADS, 0)? };
    let bad_row = bad_row.to_vec1::<i32>()?[0];
    if bad_row != i32::MAX {
        return Ok(Err(bad_row as usize));
    }
    let codes = Tensor::from((Storage::Cuda(codes), (rows, cols)));
    Ok(Ok((codes, Tensor::from((Storage::Cuda(scales), rows)))))
}

/// The rows at `ids`, each of which there is, of codes (rows, width) and scales (rows), in `dtype`.
pub(crate) fn dequantize_rows(
    device: &CudaDevice,
    codes: &Tensor,
    scales: &Tensor,
    ids: &[u32],
    dtype: DType,
) -> Result<Tensor> {
    let width = codes.dim(1)?;
    let uploaded = Tensor::from_slice(ids, ids.len(), &Device::Cuda(device.clone()))?;
    let out = uninitialized(device, dtype, ids.len() * width)?;
    let launch = Launch::new(device, "dequantize_rows", format!("dequantize_rows_{}", suffix(dtype)?))
        .pointer(address_of(device, codes)?)
        .pointer(address_of(device, scales)?)
        .pointer(address_of(device, &uploaded)?)
        .pointer(address(&out, 0)?)
        .int(width)?;
    // SAFETY: there are such rows (the caller's check), and out is (ids, width).
    unsafe { launch.run([ids.len(), 1, 1], THREADS, 0)? };
    Ok(Tensor::from((Storage::Cuda(out), (ids.len(), width))))
}

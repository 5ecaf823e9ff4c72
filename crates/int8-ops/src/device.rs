//! CUDA devices: opening one, and what it says of itself. On the CPU, and in a build without the feature `cuda`,
//! there is nothing to ask.

use candle_core::{Device, DeviceLocation, Result};

/// Why there is no CUDA device to compute on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The feature `cuda` is off.
    #[error("CUDA support is not built in")]
    NotBuilt,
    /// There is no NVIDIA driver, or only a library that stands in for it where programs are built.
    #[error("no NVIDIA driver is installed")]
    NoDriver,
    /// The driver finds no device.
    #[error("the NVIDIA driver finds no CUDA device")]
    NoDevice,
    /// There are devices, but not as many.
    #[error("there is no CUDA device {ordinal}; {count} found, counted from 0")]
    NoSuchDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many devices there are.
        count: usize,
    },
    /// The driver is older than what the kernels were compiled with.
    #[error("the NVIDIA driver is for CUDA {found}, which is too old: wanted {wanted} or later")]
    DriverTooOld {
        /// The CUDA version of the driver.
        found: String,
        /// The CUDA version that this was built with.
        wanted: String,
    },
    /// The kernels were not compiled for a device of this kind.
    #[error("the kernels are not compiled for CUDA device {ordinal}, {name}")]
    NoKernels {
        /// What was asked for.
        ordinal: usize,
        /// What the device calls itself.
        name: String,
    },
    /// What the driver says.
    #[error("CUDA device {ordinal}: {problem}")]
    Other {
        /// What was asked for.
        ordinal: usize,
        /// What went wrong.
        problem: String,
    },
}

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What no program has taken.
    pub free: usize,
    /// All there is.
    pub total: usize,
}

/// Opens the CUDA device of this number, and runs a kernel on it: an error here is better than one in the middle
/// of a model. Every call opens it anew; tensors of two calls do not meet.
///
/// All work on the device goes through one stream, in order, whichever thread it comes from.
pub fn cuda(ordinal: usize) -> std::result::Result<Device, DeviceError> {
    #[cfg(feature = "cuda")]
    return driver::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(DeviceError::NotBuilt)
    }
}

/// The memory of a CUDA device; `None` for the CPU.
pub fn memory(device: &Device) -> Result<Option<DeviceMemory>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return driver::memory(device).map(Some);
    }
    let _ = device;
    Ok(None)
}

/// What a CUDA device calls itself, such as `NVIDIA H100 80GB HBM3`; `None` for the CPU.
pub fn name(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return device.cuda_stream().context().name().ok();
    }
    let _ = device;
    None
}

/// What a device is called on a command line: `cpu`, or `cuda:N` by its number.
pub fn label(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// Waits until all work on the device is done.
pub fn synchronize(device: &Device) -> Result<()> {
    device.synchronize()
}

/// Bytes of tensors on a CUDA device now, of this process; `None` for the CPU, and where the device does not
/// count them. Work that is under way may still hold memory: see [`synchronize`].
pub fn used_bytes(device: &Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return driver::pool_bytes(device, driver::Pool::Used);
    }
    let _ = device;
    None
}

/// The most that [`used_bytes`] has been since [`reset_peak`], or else in this process.
pub fn peak_bytes(device: &Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let all = [driver::Pool::Used, driver::Pool::Peak].map(|what| driver::pool_bytes(device, what));
        return all.into_iter().flatten().max();
    }
    let _ = device;
    None
}

/// Begins a new count of [`peak_bytes`], from what is used now.
pub fn reset_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        driver::reset_peak(device);
    }
    let _ = device;
}

/// Gives memory back to the system that a CUDA device keeps for tensors to come.
pub fn give_back(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        driver::give_back(device);
    }
    let _ = device;
}

/// Bytes a second that a copy from one place of a CUDA device's memory to another moves, read and written ones
/// together: the median of several copies of a buffer of `bytes`. `None` for the CPU.
pub fn copy_bandwidth(device: &Device, bytes: usize) -> Result<Option<f64>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return driver::copy_bandwidth(device, bytes).map(Some);
    }
    let _ = (device, bytes);
    Ok(None)
}

/// Operations a second (a product and its addition are two) of NVIDIA's own libraries, for large matrices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatmulPeaks {
    /// cuBLAS, with sums in f32.
    pub f16: f64,
    /// cuBLASLt, with sums in 32-bit integers.
    pub int8: f64,
}

/// What a CUDA device can do at best with matrices, measured. `None` for the CPU, and where the device has less than
/// 1 GB free.
pub fn matmul_peaks(device: &Device) -> Result<Option<MatmulPeaks>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        use crate::cuda::limits::{BYTES, f16_matmul_peak, int8_matmul_peak};
        if driver::memory(device)?.free < BYTES {
            return Ok(None);
        }
        return Ok(Some(MatmulPeaks { f16: f16_matmul_peak(device)?, int8: int8_matmul_peak(device)? }));
    }
    let _ = device;
    Ok(None)
}

/// Whether an error says that a CUDA device has no memory left.
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    #[cfg(feature = "cuda")]
    return driver::code(error) == Some(driver::OUT_OF_MEMORY);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = error;
        false
    }
}

#[cfg(feature = "cuda")]
mod driver {
    use std::time::Instant;

    use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute, CUresult};
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};
    use candle_core::cuda_backend::{CudaError, WrapErr};
    use candle_core::{CudaDevice, DType, Device, Error, Result, Tensor};

    use super::{DeviceError, DeviceMemory};

    pub(super) const OUT_OF_MEMORY: CUresult = CUresult::CUDA_ERROR_OUT_OF_MEMORY;

    /// Copies that are timed.
    const COPIES: usize = 9;

    pub(super) fn open(ordinal: usize) -> std::result::Result<Device, DeviceError> {
        let count = match CudaContext::device_count() {
            Ok(count) => count as usize,
            Err(DriverError(code)) => return Err(without_device(ordinal, code)),
        };
        let version = driver_version();
        // Later minor versions run what an earlier driver of the same major version can.
        if version / 1000 < sys::CUDA_VERSION / 1000 {
            return Err(too_old());
        }
        if count == 0 {
            return Err(DeviceError::NoDevice);
        }
        if ordinal >= count {
            return Err(DeviceError::NoSuchDevice { ordinal, count });
        }
        open_and_try(ordinal).map_err(|error| match code(&error) {
            Some(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUresult::CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER) => {
                too_old()
            }
            Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_PTX) => {
                let name = CudaContext::new(ordinal).and_then(|context| context.name()).unwrap_or_default();
                DeviceError::NoKernels { ordinal, name }
            }
            // A Candle error may carry a backtrace.
            _ => {
                let problem = error.to_string().lines().next().unwrap_or_default().to_string();
                DeviceError::Other { ordinal, problem }
            }
        })
    }

    /// Why there is not even a number of devices.
    fn without_device(ordinal: usize, code: CUresult) -> DeviceError {
        match code {
            CUresult::CUDA_ERROR_NO_DEVICE => DeviceError::NoDevice,
            // The stub of the library says the one, a container without the driver's files the others.
            CUresult::CUDA_ERROR_STUB_LIBRARY
            | CUresult::CUDA_ERROR_SHARED_OBJECT_INIT_FAILED
            | CUresult::CUDA_ERROR_OPERATING_SYSTEM => DeviceError::NoDriver,
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
            | CUresult::CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER => too_old(),
            code => DeviceError::Other { ordinal, problem: DriverError(code).to_string() },
        }
    }

    fn too_old() -> DeviceError {
        let name = |version: u32| format!("{}.{}", version / 1000, version % 1000 / 10);
        DeviceError::DriverTooOld { found: name(driver_version()), wanted: name(sys::CUDA_VERSION) }
    }

    /// 1000 times the major version of CUDA that the driver is for, and 10 times the minor one; 0 for none.
    fn driver_version() -> u32 {
        let mut version = 0;
        // SAFETY: the driver writes one int, and may be asked before it is initialised.
        let result = unsafe { sys::cuDriverGetVersion(&mut version) };
        result.result().map_or(0, |()| version as u32)
    }

    fn open_and_try(ordinal: usize) -> Result<Device> {
        let device = Device::new_cuda_with_stream(ordinal)?;
        if let Device::Cuda(device) = &device {
            // SAFETY: there is one stream for all tensors of this device, on which everything is in order; events
            // would only say so again, at a cost for every tensor.
            unsafe { device.disable_event_tracking() };
            keep_freed_memory(device);
        }
        // The kernel that looks up embeddings.
        let table = Tensor::zeros((1, 1), DType::F32, &device)?;
        table.index_select(&Tensor::zeros(1, DType::U32, &device)?, 0)?;
        device.synchronize()?;
        Ok(device)
    }

    /// The driver's code for an error, where it is the driver's.
    pub(super) fn code(error: &Error) -> Option<CUresult> {
        match error {
            Error::Cuda(error) => match error.downcast_ref::<CudaError>()? {
                CudaError::Cuda(DriverError(code)) | CudaError::Load { cuda: DriverError(code), .. } => Some(*code),
                _ => None,
            },
            Error::WithBacktrace { inner, .. } => code(inner),
            Error::Context { inner, .. } => code(inner),
            Error::WithPath { inner, .. } => code(inner),
            _ => None,
        }
    }

    pub(super) fn memory(device: &CudaDevice) -> Result<DeviceMemory> {
        let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
        Ok(DeviceMemory { free, total })
    }

    /// What the pool that tensors come from counts.
    #[derive(Clone, Copy)]
    pub(super) enum Pool {
        Used,
        Peak,
    }

    /// The pool that cudarc's allocations come from: the device's current one. `None` where the device has none.
    fn pool(device: &CudaDevice) -> Option<sys::CUmemoryPool> {
        let stream = device.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            return None;
        }
        context.bind_to_thread().ok()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the driver writes one pointer; the device is that of a living context.
        unsafe { sys::cuDeviceGetMemPool(&mut pool, context.cu_device()) }.result().ok()?;
        Some(pool)
    }

    pub(super) fn pool_bytes(device: &CudaDevice, what: Pool) -> Option<usize> {
        let attribute = match what {
            Pool::Used => CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            Pool::Peak => CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
        };
        let mut bytes = 0u64;
        // SAFETY: the value of both attributes is a cuuint64_t.
        unsafe { sys::cuMemPoolGetAttribute(pool(device)?, attribute, (&raw mut bytes).cast()) }.result().ok()?;
        Some(bytes as usize)
    }

    /// What is freed stays with the pool: by default it goes back to the system whenever the host waits for the
    /// device, which is at every token, and has to be mapped again for the next.
    fn keep_freed_memory(device: &CudaDevice) {
        let Some(pool) = pool(device) else { return };
        let mut threshold = u64::MAX;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a cuuint64_t. Where it fails, work is slower and no less right.
        let _ = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()) };
    }

    pub(super) fn give_back(device: &CudaDevice) {
        let Some(pool) = pool(device) else { return };
        // SAFETY: the pool is the device's own; what is in use stays. Where it fails, the pool keeps what it has.
        let _ = unsafe { sys::cuMemPoolTrimTo(pool, 0) };
    }

    pub(super) fn reset_peak(device: &CudaDevice) {
        let Some(pool) = pool(device) else { return };
        let mut zero = 0u64;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a cuuint64_t; it can be set to 0, which begins a new count. Where it fails, the
        // older peak stands.
        let _ = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast()) };
    }

    pub(super) fn copy_bandwidth(device: &CudaDevice, bytes: usize) -> Result<f64> {
        let from = device.alloc_zeros::<u8>(bytes)?;
        let mut to = device.alloc_zeros::<u8>(bytes)?;
        let stream = device.cuda_stream();
        let mut rates = Vec::with_capacity(COPIES);
        // The first copy warms up.
        for _ in 0..=COPIES {
            stream.synchronize().w()?;
            let start = Instant::now();
            device.memcpy_dtod(&from, &mut to)?;
            stream.synchronize().w()?;
            rates.push(2.0 * bytes as f64 / start.elapsed().as_secs_f64());
        }
        let rates = &mut rates[1..];
        rates.sort_by(f64::total_cmp);
        Ok(rates[COPIES / 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_nothing_to_tell() -> Result<()> {
        assert_eq!(memory(&Device::Cpu)?, None);
        assert_eq!((used_bytes(&Device::Cpu), peak_bytes(&Device::Cpu)), (None, None));
        assert_eq!(label(&Device::Cpu), "cpu");
        assert_eq!((name(&Device::Cpu), copy_bandwidth(&Device::Cpu, 1)?), (None, None));
        assert_eq!(matmul_peaks(&Device::Cpu)?, None);
        give_back(&Device::Cpu);
        reset_peak(&Device::Cpu);
        synchronize(&Device::Cpu)
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_so() {
        assert_eq!(cuda(0).unwrap_err(), DeviceError::NotBuilt);
    }
}
